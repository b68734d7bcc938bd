"""Actions: what will *happen* when a plan is applied."""

from typing import Literal, TypeAlias

from attrs import frozen

from funcmodel.records.config import Json
from funcmodel.records.devices import Device
from funcmodel.records.expressions import Expr
from funcmodel.records.mapping import FrozenMap


@frozen
class Assign:
    """The leaf `key` becomes the value of `expr` on `device`."""

    key: str
    expr: Expr
    device: Device


@frozen
class Tie:
    """The leaf `key` becomes the same object (or the same elements) as the leaf `to`.

    Attributes:
        expr: what the source holds for `key` itself, where that is another expression than the one for `to`; it must
            equal the value of `to` bit for bit, which is checked before anything is committed.
    """

    key: str
    to: str
    expr: Expr | None = None


@frozen
class Initialize:
    """Leaves `keys` of submodule `module` are drawn afresh.

    Attributes:
        how: "reset_parameters", "_init_weights", "constructor" (the leaf keeps the value it has), or
            "pkg.mod:function" with `(key, spec, generator) -> tensor`; None where nothing is known that could do it,
            which `checked` and `apply` refuse.
        seed: the plan's seed; each key's own seed is derived from it and from the key.
        nbytes: size of the leaves together, so that `cost` needs no second table.
    """

    module: str
    keys: tuple[str, ...]
    how: str | None
    seed: int
    device: Device
    nbytes: int = 0


@frozen
class Move:
    """A leaf that no checkpoint holds (a non-persistent buffer) keeps its constructor's value, on `device`.

    Attributes:
        nbytes: size of the leaf, so that `cost` needs no second table.
    """

    key: str
    device: Device
    nbytes: int = 0


@frozen
class Offload:
    """The leaf stays on disk; `copy=False` where it already is a plain stored tensor."""

    key: str
    expr: Expr
    copy: bool


@frozen
class WriteShard:
    """One file of weights, in the order of `entries`.

    Attributes:
        metadata: text to text, for the header.
        digests: "sha256" records the digest of every tensor, and that of the header, in the metadata.
    """

    file: str
    entries: FrozenMap[str, Expr]
    metadata: FrozenMap[str, str] = FrozenMap()
    digests: Literal["none", "sha256"] = "none"


@frozen
class WriteIndex:
    """An index file: key to file name."""

    file: str
    weight_map: FrozenMap[str, str]
    metadata: FrozenMap[str, Json] = FrozenMap()


@frozen
class WriteText:
    """A text file in UTF-8, for example `config.json`."""

    file: str
    text: str


@frozen
class Publish:
    """Everything staged gets its final name.

    Attributes:
        renames: files to publish before the commit, in order; each was staged beside its final name.
        commit: the one file whose rename makes the new checkpoint the visible one.
        removes: files of the old checkpoint that are removed after the commit, never before.
    """

    renames: tuple[str, ...]
    commit: str
    removes: tuple[str, ...] = ()


LoadAction: TypeAlias = Assign | Tie | Initialize | Move | Offload
SaveAction: TypeAlias = WriteShard | WriteIndex | WriteText | Publish
