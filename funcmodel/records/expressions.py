"""The twelve expressions: what a tensor *will be*. Data only; `core.build` makes them, `core.shapes` types them.

Build expressions through `funcmodel.expr`, which keeps them in normal form; the classes are for matching.
"""

from typing import Any, TypeAlias

from attrs import field, frozen

from funcmodel.records.dtypes import DType, dtype
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec

At: TypeAlias = tuple[int | tuple[int, int], ...]
Static: TypeAlias = FrozenMap[str, str | int | float | bool | tuple[int, ...] | None]


def _static(value: Any) -> Static:
    return value if isinstance(value, FrozenMap) else FrozenMap(value)


@frozen
class FileRef:
    """One file of a checkpoint as a plan names it; all leaves that read the file share one object.

    Attributes:
        path: as found, relative paths stay relative.
        format: name of the `Format` that reads it.
        nbytes: size of the whole file in bytes.
        fingerprint: BLAKE2b-128 of header bytes and file size, in hex; checked again before anything is read.
    """

    path: str
    format: str
    nbytes: int
    fingerprint: str


@frozen
class Read:
    """`spec.nbytes` bytes at `offset` (bytes from the start) of `file`, stored there under `name`."""

    file: FileRef
    name: str
    spec: TensorSpec
    offset: int


@frozen
class Live:
    """A tensor in memory, supplied under `key` when the plan is applied."""

    key: str
    spec: TensorSpec


@frozen
class Full:
    """A constant tensor."""

    spec: TensorSpec
    value: float | int | bool | complex


@frozen
class Noise:
    """A normal draw: whole, on the CPU, in float32, by a generator of its own seed, then cast to `spec.dtype`."""

    spec: TensorSpec
    mean: float
    std: float
    seed: int


@frozen
class Index:
    """Slicing. `at[i]` is an int (the axis goes) or a `(start, stop)` pair (the axis stays), one per axis."""

    of: "Expr"
    at: At


@frozen
class Concat:
    """Parts joined along an existing axis."""

    parts: "tuple[Expr, ...]"
    dim: int


@frozen
class Stack:
    """Parts of one spec joined along a new axis."""

    parts: "tuple[Expr, ...]"
    dim: int


@frozen
class Permute:
    """Axis `i` of the result is axis `dims[i]` of `of`."""

    of: "Expr"
    dims: tuple[int, ...]


@frozen
class Take:
    """Rows `indices` along `dim`, in that order."""

    of: "Expr"
    dim: int
    indices: tuple[int, ...]


@frozen
class Reshape:
    """The same elements in row-major order under another shape."""

    of: "Expr"
    shape: tuple[int, ...]


@frozen
class Cast:
    """The same numbers in another dtype, as torch's `Tensor.to(dtype)` converts them."""

    of: "Expr"
    dtype: DType = field(converter=dtype)


@frozen
class Call:
    """Escape hatch: `fn`, a module-level function written "pkg.mod:name", of `args`, with its *declared* result."""

    fn: str
    args: "tuple[Expr, ...]"
    spec: TensorSpec
    static: Static = field(default=FrozenMap(), converter=_static)


Leaf: TypeAlias = Read | Live | Full | Noise
Expr: TypeAlias = Read | Live | Full | Noise | Index | Concat | Stack | Permute | Take | Reshape | Cast | Call
