"""Errors, in three families: the plan is wrong, the bytes on disk are wrong, the machine or the moment is wrong.

An exception is made from its fields, so that code (and tests) compare fields, never text. Every message says what,
where, found against expected, and what to do.
"""

from typing import Any, Literal

from funcmodel.records.reports import Damage, LoadReport


class FuncmodelError(Exception):
    """Root of every error that funcmodel raises on purpose. Fields are keyword arguments and survive pickling."""

    def __init__(self, message: str = "", /, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields
        for name, value in fields.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self.message, self.fields)


def _rebuild(cls: type[FuncmodelError], message: str, fields: dict[str, Any]) -> FuncmodelError:
    return cls(message, **fields)


# -- the plan ------------------------------------------------------------------------------------------------------


class PlanError(FuncmodelError):
    """Raised by pure code; nothing was touched.

    Attributes:
        keys: the keys concerned.
    """

    keys: tuple[str, ...] = ()


class KeyMismatchError(PlanError):
    """Module and source do not fit; all findings at once.

    Attributes:
        report: everything that was found.
        hints: transforms, as text, that would fix it.
        unused: waivers that matched nothing, as text.
    """

    report: LoadReport
    hints: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


class ShapeError(PlanError, ValueError):
    """An expression whose shapes or dtypes do not fit; fields `expected` and `found` where there are two sides."""


class RuleError(PlanError):
    """A rule that does not apply, collides, or has no inverse; field `rule` is the rule where there is one."""


class TieConflictError(PlanError):
    """Keys that are one tensor in the module have different values in the source."""


class TemplateError(PlanError, ValueError):
    """A template that cannot be parsed, matched or filled; field `template`."""


class PlacementError(PlanError):
    """A device map or budget that leaves a tensor without a place."""


# -- the bytes on disk ---------------------------------------------------------------------------------------------


class CheckpointError(FuncmodelError):
    """The bytes on disk are wrong.

    Attributes:
        code: a stable word for the finding, for example "DUPLICATE_KEY".
        path: the file.
    """

    code: str = ""
    path: str = ""


class HeaderError(CheckpointError):
    """A header that breaks its format; field `key` names the tensor where there is one."""

    key: str | None = None


class TruncatedError(CheckpointError):
    """A file shorter than its header says; fields `expected` and `found` in bytes."""


class IndexMismatchError(CheckpointError):
    """An index that is malformed or disagrees with the shards; fields `key` and `file` where there are such."""


class UnsafePathError(CheckpointError):
    """A path that leaves the checkpoint's folder, or is no regular file."""


class UnknownFormatError(CheckpointError):
    """No format reads this file."""


class DigestError(CheckpointError):
    """Bytes that differ from their recorded digest, or bytes that should have one and have none.

    Attributes:
        file: the first file concerned.
        tensor: the first tensor concerned; None where it is the file's header, or the file as a whole.
        expected: the digest that is recorded.
        found: the digest that the bytes have.
        findings: everything that was found.
    """

    file: str = ""
    tensor: str | None = None
    expected: Any = None
    found: Any = None
    findings: tuple[Damage, ...] = ()


class AmbiguousCheckpointError(CheckpointError):
    """More than one checkpoint in the folder; field `candidates` names the files."""

    candidates: tuple[str, ...] = ()


# -- the machine or the moment ---------------------------------------------------------------------------------------


class ApplyError(FuncmodelError):
    """The plan was right and could not be carried out."""


class StalePlanError(ApplyError):
    """A file or module changed since it was planned; fields `path` or `keys`, `expected`, `found`."""


class ChangedError(ApplyError):
    """A file changed while it was read; field `path`."""


class NoMemoryError(ApplyError, MemoryError):
    """The machine can never hold what is wanted, refused before a byte is read.

    Attributes:
        needed: in bytes.
        available: all memory that the machine has, in bytes; None where it does not say.
    """

    needed: int = 0
    available: int | None = None


class ActionError(ApplyError):
    """An action failed.

    Attributes:
        action: the action.
        done: keys that hold their new value.
        torn: keys that may hold part of it.
        cause: the exception below, also `__cause__`.
    """

    action: Any = None
    done: tuple[str, ...] = ()
    torn: tuple[str, ...] = ()
    cause: BaseException | None = None


class SaveError(ApplyError):
    """A save that failed.

    Attributes:
        committed: whether a reader of the folder now sees the new checkpoint.
    """

    committed: Literal["yes", "no", "unknown"] = "unknown"


class BusyError(SaveError):
    """Another writer holds the folder.

    Attributes:
        path: the folder.
        lock: the file, or folder, that is the lock; "" where others come and go too fast to tell.
        owner: who took it, as "pid 12 on host"; None where it does not say.
        pid: the same, as a number.
        host: the name of its machine.
        alive: whether the owner still runs; None where that cannot be seen from here. The lock of a dead one is held
            by a process that it forked while it saved.
        holders: such processes, by number, as far as they are visible.
    """

    path: str = ""
    lock: str = ""
    owner: str | None = None
    pid: int | None = None
    host: str | None = None
    alive: bool | None = None
    holders: tuple[int, ...] = ()


class NoSpaceError(SaveError):
    """The disk is full; fields `needed` and `available` in bytes."""
