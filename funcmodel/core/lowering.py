"""Expression to box copies into one preallocated destination, and to the boxes and bytes that it reads."""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

from attrs import frozen

from funcmodel.core.build import rebuilt
from funcmodel.core.shapes import shape_of, spec_of
from funcmodel.errors import ShapeError
from funcmodel.records.expressions import (
    At,
    Call,
    Cast,
    Concat,
    Expr,
    Full,
    Index,
    Leaf,
    Live,
    Noise,
    Permute,
    Read,
    Reshape,
    Stack,
    Take,
)

Box = tuple[tuple[int, int], ...]


@frozen
class Copy:
    """One box of the destination and what goes there.

    Attributes:
        to: an int or a `(start, stop)` per axis of the destination.
        of: a chain of `Cast`, `Permute`, `Take`, `Index` (in this order, outermost first, each at most once but `Take`
            and `Cast`) over one leaf, `Reshape` or `Call`; its shape is the shape of `destination[to]`.
    """

    to: At
    of: Expr


def lowered(expr: Expr) -> tuple[Copy, ...]:
    """The copies that fill a destination of `spec_of(expr)`, each element exactly once; none for an empty tensor.

    Example:
        >>> from funcmodel.core.build import concat, live, narrow
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = live("x", TensorSpec([4, 2], "float32"))
        >>> [c.to for c in lowered(concat([narrow(x, 0, 2, 4), x]))]
        [((0, 2), (0, 2)), ((2, 6), (0, 2))]
    """
    shape = shape_of(expr)
    if 0 in shape:
        return ()
    to = tuple([(0, n) for n in shape])
    if not joins(expr):
        return (Copy(to, expr),)
    out: list[Copy] = []
    _lower(expr, list(to), list(range(len(shape))), out)
    return tuple(out)


def _lower(expr: Expr, to: list[int | tuple[int, int]], axes: list[int], out: list[Copy]) -> None:
    """Append the copies of `expr`, whose axis `i` is axis `axes[i]` of the destination, starting where `to` starts."""
    match expr:
        case Concat(parts, dim):
            axis = axes[dim]
            start, _ = to[axis]  # type: ignore[misc]
            for part in parts:
                length = shape_of(part)[dim]
                if length:
                    _lower(part, [*to[:axis], (start, start + length), *to[axis + 1 :]], axes, out)
                start += length
        case Stack(parts, dim):
            axis = axes[dim]
            start, _ = to[axis]  # type: ignore[misc]
            rest = [*axes[:dim], *axes[dim + 1 :]]
            for i, part in enumerate(parts, start):
                _lower(part, [*to[:axis], i, *to[axis + 1 :]], rest, out)
        case _:
            if joins(expr):
                _lower(rebuilt(expr), to, axes, out)
            else:
                out.append(Copy(tuple(to), expr))


def joins(expr: Expr) -> bool:
    """Whether it puts parts together, so that there is more than one copy.

    Example:
        >>> from funcmodel.core.build import cast, live, stack
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = live("x", TensorSpec([4, 2], "float32"))
        >>> joins(cast(stack([x, x]), "bfloat16")), joins(cast(x, "bfloat16"))
        (True, False)
    """
    return isinstance(_source(expr), Concat | Stack)


def _source(expr: Expr) -> Expr:
    while isinstance(expr, Cast | Permute | Take | Index):
        expr = expr.of
    return expr


def nodes(expr: Expr) -> Iterator[Expr]:
    """`expr` and every expression below it, also below opaque nodes, left to right, as often as it occurs.

    Example:
        >>> from funcmodel.core.build import cast, live
        >>> from funcmodel.records.tensors import TensorSpec
        >>> [type(node).__name__ for node in nodes(cast(live("x", TensorSpec([4, 2], "float32")), "bfloat16"))]
        ['Cast', 'Live']
    """
    pending = [expr]
    while pending:
        node = pending.pop()
        yield node
        if node.__class__ is not Read:
            pending.extend(reversed(below(node)))


def below(expr: Expr) -> tuple[Expr, ...]:
    """What an expression is made of, left to right; nothing for a leaf.

    Example:
        >>> from funcmodel.core.build import live, stack
        >>> from funcmodel.records.tensors import TensorSpec
        >>> [leaf.key for leaf in below(stack([live(key, TensorSpec([2], "float32")) for key in "ab"]))]
        ['a', 'b']
    """
    if expr.__class__ is Read:
        return ()
    match expr:
        case Index(of) | Permute(of) | Take(of) | Reshape(of) | Cast(of):
            return (of,)
        case Concat(parts) | Stack(parts) | Call(_, parts):
            return parts
        case _:
            return ()


def stored(expr: Expr) -> Read | None:
    """The expression as one stored tensor, where its bytes stand in a file as they are wanted; else None.

    Example:
        >>> from funcmodel.core.build import narrow, read
        >>> from funcmodel.records.expressions import FileRef
        >>> from funcmodel.records.tensors import TensorSpec
        >>> w = read(FileRef("f", "safetensors", 4096, ""), "w", TensorSpec([4, 8], "float32"), 128)
        >>> rows = stored(narrow(w, 0, 1, 3))
        >>> rows.offset, rows.spec, stored(narrow(w, 1, 0, 3))
        (160, [2, 8] float32, None)
    """
    if type(expr) is Read:
        return expr
    if not isinstance(expr, Index | Reshape):
        return None
    base = stored(expr.of)
    if base is None or base.spec.dtype.pack > 1:
        return None
    start = _start(base.spec.shape, expr.at) if isinstance(expr, Index) else 0
    if start < 0:
        return None
    return Read(base.file, base.name, spec_of(expr), base.offset + start * base.spec.dtype.bits // 8)


def _start(shape: tuple[int, ...], at: At) -> int:
    """The first element of a slicing that is one run of elements, or -1. As `byte_runs`, for up to 100,000 tensors."""
    start, step, partial = 0, 1, False
    for size, a in zip(reversed(shape), reversed(at), strict=True):
        low, high = (a, a + 1) if isinstance(a, int) else a
        if high <= low or (partial and high - low > 1):
            return -1
        partial = partial or high - low < size
        start += low * step
        step *= size
    return start


def as_box(at: At) -> Box:
    """A slicing as a `(start, stop)` per axis.

    Example:
        >>> as_box((3, (0, 8)))
        ((3, 4), (0, 8))
    """
    return tuple([(a, a + 1) if isinstance(a, int) else a for a in at])


def leaves(expr: Expr) -> Iterator[Leaf]:
    """Every leaf of `expr`, also below opaque nodes, left to right, as often as it occurs.

    Example:
        >>> from funcmodel.core.build import live, stack
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = live("x", TensorSpec([4, 2], "float32"))
        >>> [leaf.key for leaf in leaves(stack([x, x]))]
        ['x', 'x']
    """
    return (node for node in nodes(expr) if isinstance(node, Read | Live | Full | Noise))


def has_call(expr: Expr) -> bool:
    """Whether anything in the expression runs a function.

    Example:
        >>> from funcmodel.core.build import live
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = live("x", TensorSpec([4], "float32"))
        >>> has_call(x), has_call(Call("torch:relu", (x,), x.spec))
        (False, True)
    """
    return type(expr) is not Read and any(type(node) is Call for node in nodes(expr))


def reads(expr: Expr) -> Iterator[tuple[Read, Box]]:
    """Which boxes of which stored tensors `expr` uses, a `(start, stop)` per axis of the stored tensor.

    An element that the expression uses twice may be in two boxes, but the boxes of one chain are disjoint. The
    arguments of a `Call` or an opaque `Reshape` are used whole.

    Example:
        >>> from funcmodel.core.build import index, permute, read, take
        >>> from funcmodel.records.expressions import FileRef
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = read(FileRef("f", "safetensors", 200, ""), "x", TensorSpec([6, 8], "float32"), 8)
        >>> [box for _, box in reads(permute(take(x, [0, 4, 5], dim=0), [1, 0]))]
        [((0, 1), (0, 8)), ((4, 6), (0, 8))]
    """
    pending = [expr]
    while pending:
        match pending.pop():
            case Read() as leaf:
                yield leaf, tuple([(0, n) for n in leaf.spec.shape])
            case Live() | Full() | Noise():
                pass
            case Concat(parts) | Stack(parts) | Call(_, parts):
                pending.extend(reversed(parts))
            case Reshape(of):
                pending.append(of)
            case Index(Read() as leaf, at):
                yield leaf, as_box(at)
            case (Index() | Permute() | Take() | Cast()) as chain:
                source = _source(chain)
                if isinstance(source, Read):
                    for box in _boxes(chain):
                        yield source, box
                elif isinstance(source, Concat | Stack):
                    pending.append(rebuilt(chain))
                else:
                    pending.append(source)


def _boxes(chain: Expr) -> Iterator[Box]:
    """The boxes of its leaf that a chain of `Cast`, `Permute`, `Take`, `Index` uses."""
    rows: list[Sequence[int]] = [range(n) for n in shape_of(_source(chain))]
    axes = list(range(len(rows)))
    for node in _inside_out(chain):
        match node:
            case Index(_, at):
                for axis, a in zip(axes, at, strict=True):
                    rows[axis] = rows[axis][a : a + 1] if isinstance(a, int) else rows[axis][a[0] : a[1]]
                axes = [axis for axis, a in zip(axes, at, strict=True) if not isinstance(a, int)]
            case Permute(_, dims):
                axes = [axes[d] for d in dims]
            case Take(_, dim, indices):
                rows[axes[dim]] = [rows[axes[dim]][i] for i in indices]
    return product(*map(runs_of, rows))


def _inside_out(chain: Expr) -> list[Expr]:
    nodes: list[Expr] = []
    while isinstance(chain, Cast | Permute | Take | Index):
        nodes.append(chain)
        chain = chain.of
    return nodes[::-1]


def runs_of(rows: Sequence[int]) -> list[tuple[int, int]]:
    """The set of `rows` as ascending, maximal `(start, stop)` runs.

    Example:
        >>> runs_of([7, 2, 3, 2]), runs_of(range(4, 9)), runs_of(range(3, 3))
        ([(2, 4), (7, 8)], [(4, 9)], [(3, 3)])
    """
    if isinstance(rows, range):
        return [(rows.start, rows.stop)]
    runs: list[tuple[int, int]] = []
    for row in sorted(set(rows)):
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


@frozen
class ByteRuns:
    """Equally long, evenly spaced runs of bytes: nested loops over `counts`, outermost first, `strides` bytes apart.

    Iterating yields `(first byte, nbytes)` in ascending order; `len` is the number of runs.

    Attributes:
        start: first byte of the first run, from the start of the tensor.
        nbytes: length of every run in bytes.
        counts: how often each loop turns; no loop where the box is one run.
        strides: bytes from one turn of each loop to the next.
    """

    start: int
    nbytes: int
    counts: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()

    def __len__(self) -> int:
        return prod(self.counts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        steps = [range(0, n * step, step) for n, step in zip(self.counts, self.strides, strict=True)]
        for offsets in product(*steps):
            yield self.start + sum(offsets), self.nbytes


def byte_runs(shape: tuple[int, ...], bits: int, box: Box) -> ByteRuns:
    """Where the elements of `box` lie in a tensor stored in row-major order, as few runs as there are.

    Args:
        shape: of the stored tensor, in elements.
        bits: width of one element.
        box: a `(start, stop)` per axis.

    Returns:
        the runs, longest possible; none for an empty box.

    Raises:
        ShapeError: a run does not start and end on a byte (elements narrower than a byte).

    Example:
        >>> byte_runs((4, 6), 16, ((1, 3), (0, 6)))
        ByteRuns(start=12, nbytes=24, counts=(), strides=())
        >>> list(byte_runs((4, 6), 16, ((1, 3), (2, 5))))
        [(16, 6), (28, 6)]
    """
    start, length, stride = 0, 1, 1
    counts: list[int] = []
    strides: list[int] = []
    for n, (low, high) in zip(reversed(shape), reversed(box), strict=True):
        if high <= low:
            return ByteRuns(0, 0, (0,), (1,))
        start += low * stride
        count = high - low
        if count > 1:
            if not counts and stride == length:
                length *= count
            elif counts and stride == counts[-1] * strides[-1]:
                counts[-1] *= count
            else:
                counts.append(count)
                strides.append(stride)
        stride *= n
    if bits % 8 and any((v * bits) % 8 for v in (start, length, *strides)):
        raise ShapeError(
            f"the box {box} of a stored tensor {list(shape)} of {bits}-bit elements does not start and end on whole "
            "bytes; cut it elsewhere",
            found=box,
        )
    return ByteRuns(
        start * bits // 8, length * bits // 8, tuple(counts[::-1]), tuple([s * bits // 8 for s in strides[::-1]])
    )
