"""How bytes travel from files into tensors: `Route`, `Storage`, `Machine`, `Routing`."""

from typing import Final, Literal, TypeAlias, get_args

from attrs import field, frozen
from attrs.validators import ge

from funcmodel.records.mapping import FrozenMap

Route: TypeAlias = Literal["map", "read", "slab", "transform", "stage"]
"""One way for a tensor:

* "map": the tensor *is* pages of the file; nothing is copied, and another process that changes the file changes it.
* "read": its bytes are read into memory that is its alone, or into the storage that a module already has.
* "slab": its bytes are read into a block of fresh memory that small tensors share.
* "transform": it is computed from what is read: cast, transposed, joined, cut out in more pieces than one.
* "stage": it passes through a few reused buffers, on the way to a GPU pinned ones that are copied while others fill.
"""

Memory: TypeAlias = Literal["own", "borrow"]
"""Whether tensors own their bytes, or may borrow those of the file for as long as they live."""

Into: TypeAlias = Literal["fresh", "existing"]
"""Where tensors go."""

ROUTES: Final[tuple[Route, ...]] = get_args(Route)


@frozen(kw_only=True)
class Storage:
    """What one file lies on.

    Attributes:
        kind: the file system, as the kernel calls it ("ext4", "tmpfs", "nfs4"); empty where nobody looked.
        mappable: whether its bytes stand in it as tensors hold them, on a file system that maps reliably.
        cached: part of its bytes that are in memory already, between 0 and 1, from a few samples.
        direct: whether it can be read past the page cache.
    """

    kind: str = ""
    mappable: bool = False
    cached: float = 1.0
    direct: bool = False


@frozen(kw_only=True)
class Machine:
    """What a probe found: all that choosing routes needs to know besides the plan.

    Attributes:
        threads: how many may read at once.
        available: bytes of memory that can still be had; None where the system does not say.
        storage: per file path; a file that is not listed is read as if it were in the page cache.
    """

    threads: int = 1
    available: int | None = None
    storage: FrozenMap[str, Storage] = FrozenMap()


@frozen(kw_only=True)
class Routing:
    """How every tensor of a plan is read: the choice, as a value.

    Attributes:
        routes: key to route.
        mapped: paths of files whose bytes a "transform" takes out of a mapping, without a copy in between.
        direct: paths of files that are read past the page cache, but for slices of those that are `sliced`.
        threads: how many read at once.
        buffers: how many buffers of `buffer` bytes there are for what cannot be read in place, or is staged.
        buffer: bytes of each.
        pinned: whether the buffers of "stage" are pinned, so that a GPU copies out of one while the next is filled.
        sliced: paths of files of which slices of many small runs are taken out of a mapping: a call for each would
            take longer than their bytes.
        into: "fresh" memory, or "existing" tensors that are overwritten.
        span: bytes that each thread has for itself to read past the page cache; 0 leaves it to the engine.
    """

    routes: FrozenMap[str, Route] = FrozenMap()
    mapped: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()
    threads: int = field(default=1, validator=ge(1))
    buffers: int = field(default=0, validator=ge(0))
    buffer: int = field(default=0, validator=ge(0))
    pinned: bool = False
    sliced: tuple[str, ...] = ()
    into: Into = "fresh"
    span: int = field(default=0, validator=ge(0))
