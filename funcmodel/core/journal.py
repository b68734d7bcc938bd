"""The journal of an unfinished save: what replaces what, and which of the two a reader of the folder must take."""

import json
from collections.abc import Container, Mapping
from typing import Any, Final, Literal, TypeAlias

from attrs import frozen

from funcmodel.core.limits import LIMITS, Limits
from funcmodel.core.strict_json import parsed
from funcmodel.errors import CheckpointError
from funcmodel.records.mapping import FrozenMap

JOURNAL: Final = ".funcmodel-save.json"
LOCK: Final = ".funcmodel.lock"
_PART: Final = (".fm-", ".part")
_VERSION: Final = 1

Side: TypeAlias = Literal["old", "new"]


@frozen(kw_only=True)
class Journal:
    """One save, from before its first rename until its last removal.

    Attributes:
        commit: the file whose rename, or whose removal, makes the new checkpoint the visible one.
        by: which of the two.
        head: the file that a reader of the new checkpoint opens first: its only file of weights, or its index.
        old: the files that the save replaces, name to fingerprint.
        new: the files that it writes, name to fingerprint.
        parts: where each new file waits until it gets its name.
    """

    commit: str
    by: Literal["rename", "removal"]
    head: str
    old: FrozenMap[str, str] = FrozenMap()
    new: FrozenMap[str, str] = FrozenMap()
    parts: FrozenMap[str, str] = FrozenMap()


def part_name(mark: str) -> str:
    """The name of a staged file.

    Example:
        >>> part_name("1f2e3d4c-00001")
        '.fm-1f2e3d4c-00001.part'
    """
    return f"{_PART[0]}{mark}{_PART[1]}"


def is_part(name: str) -> bool:
    """Whether a name is that of a file which a save has staged.

    Example:
        >>> is_part(".fm-1f2e3d4c-00001.part"), is_part("model.safetensors")
        (True, False)
    """
    return name.startswith(_PART[0]) and name.endswith(_PART[1])


def side(journal: Journal, found: Mapping[str, str], waiting: Container[str]) -> Side | None:
    """Which checkpoint the folder holds; None where the journal does not fit what is there.

    Args:
        journal: the journal.
        found: the files that are there, name to fingerprint; at least those that the journal names.
        waiting: the new files whose part is still there, by the name they are to get.

    Example:
        >>> journal = Journal(commit="m", by="rename", head="m", new=FrozenMap({"m": "2"}), old=FrozenMap({"m": "1"}))
        >>> side(journal, {"m": "1"}, {"m"}), side(journal, {"m": "2"}, set()), side(journal, {"m": "3"}, set())
        ('old', 'new', None)
    """
    there, head = found.get(journal.commit), found.get(journal.head)
    if journal.by == "rename":
        if journal.commit in waiting:
            return "old" if there == journal.old.get(journal.commit) else None
        return "new" if there is not None and there == journal.new.get(journal.commit) else None
    if there is None:
        return "new" if head is not None and head == journal.new.get(journal.head) else None
    return "old" if there == journal.old.get(journal.commit) else None


def hidden(journal: Journal, holds: Side) -> frozenset[str]:
    """The files that belong to the other side alone, which no reader may take and the next save removes.

    Example:
        >>> journal = Journal(commit="i", by="rename", head="i", old=FrozenMap({"i": "", "a": ""}),
        ...                   new=FrozenMap({"i": "", "b": ""}))
        >>> hidden(journal, "old"), hidden(journal, "new")
        (frozenset({'b'}), frozenset({'a'}))
    """
    old, new = frozenset(journal.old), frozenset(journal.new)
    return new - old if holds == "old" else old - new


def render_journal(journal: Journal) -> str:
    """A journal as JSON text.

    Example:
        >>> journal = Journal(commit="m", by="rename", head="m", new=FrozenMap({"m": "2"}))
        >>> parse_journal(render_journal(journal).encode()) == journal
        True
    """
    names = {field: dict(getattr(journal, field)) for field in ("old", "new", "parts")}
    head = {"funcmodel_save": _VERSION, "commit": journal.commit, "by": journal.by, "head": journal.head}
    return json.dumps({**head, **names}, indent=1)


def parse_journal(data: bytes, *, path: str = "", limits: Limits = LIMITS) -> Journal:
    """A journal from the bytes of its file. Like all of a checkpoint they are not trusted.

    Raises:
        CheckpointError: it is no journal; code "JOURNAL" or that of the JSON error.

    Example:
        >>> parse_journal(b'{"funcmodel_save": 1, "commit": "../m", "by": "rename", "head": "m", "new": {"m": ""}}')
        Traceback (most recent call last):
        ...
        funcmodel.errors.CheckpointError: : names '../m'; the journal of a save is damaged
    """

    def fail(code: str, found: str, **fields: Any) -> CheckpointError:
        return CheckpointError(f"{path}: {found}; the journal of a save is damaged", code=code, path=path, **fields)

    if len(data) > limits.index_bytes:
        raise fail("INDEX_TOO_LARGE", f"{len(data)} bytes, at most {limits.index_bytes} are read")
    found = parsed(data, fail, depth=limits.json_depth, digits=limits.int_digits)
    if (
        type(found) is not dict
        or found.get("funcmodel_save") != _VERSION
        or found.get("by") not in ("rename", "removal")
    ):
        raise fail("JOURNAL", "not what this version writes")
    maps: dict[str, FrozenMap[str, str]] = {}
    for field in ("old", "new", "parts"):
        table = found.get(field, {})
        if type(table) is not dict or not all(type(value) is str for value in table.values()):
            raise fail("JOURNAL", f"{field!r} is no table of texts")
        maps[field] = FrozenMap(table)
    if found.get("head") not in maps["new"]:
        raise fail("JOURNAL", "its head is none of the new files")
    for name in (found.get("commit"), *maps["old"], *maps["new"], *maps["parts"]):
        # Indexes may list files of folders below; what a save writes lies in the folder itself, and is never hidden.
        if type(name) is not str or not _inside(name) or ("/" in name and name not in maps["old"]):
            raise fail("JOURNAL", f"names {name!r:.80}")
    for part in maps["parts"].values():
        if not is_part(part.rpartition("/")[2]) or "\0" in part:
            raise fail("JOURNAL", f"waits for {part!r:.80}")
    return Journal(commit=found["commit"], by=found["by"], head=found["head"], **maps)


def _inside(name: str) -> bool:
    return not any(c in name for c in "\\:\0") and not any(p == "" or p.startswith(".") for p in name.split("/"))
