"""Tensors that lie in a file with strides, as reads of dense blocks that are sliced, permuted and joined."""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from math import gcd
from typing import Final, TypeAlias

from attrs import frozen

from funcmodel.core.normal import concatenated, permuted, sliced, taken
from funcmodel.core.shapes import shape_of
from funcmodel.records.checkpoint import StoredTensor
from funcmodel.records.expressions import At, Expr, FileRef, Read
from funcmodel.records.tensors import TensorSpec

_MOST_PICKED: Final = 1 << 14  # rows picked by a step stand in the plan one by one


@frozen(kw_only=True)
class Block:
    """A dense block of elements, and what of it is wanted.

    Attributes:
        start: of the block's first element, in elements.
        shape: of the block, row-major.
        at: the slice of it that is wanted.
        steps: of each axis that is left of the slice, every how many rows are wanted.
        dims: axis `i` of the result is axis `dims[i]` of what is left.
    """

    start: int
    shape: tuple[int, ...]
    at: At
    steps: tuple[int, ...]
    dims: tuple[int, ...]


@frozen
class Joined:
    """Two arrangements side by side along an axis of the tensor."""

    head: "Arrangement"
    tail: "Arrangement"
    axis: int


Arrangement: TypeAlias = Block | Joined


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a dense tensor in row-major order.

    Example:
        >>> row_major((2, 3, 4))
        (12, 4, 1)
    """
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements are dense and in row-major order; the stride of an axis of size 1 means nothing.

    Example:
        >>> is_row_major((2, 1, 3), (3, 99, 1)), is_row_major((2, 3), (1, 2))
        (True, False)
    """
    return 0 in shape or all(n == 1 or a == b for n, a, b in zip(shape, strides, row_major(shape), strict=True))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements lie between the first one and the last one, both included.

    Example:
        >>> extent((4, 3), (10, 2)), extent((0, 3), (3, 1))
        (35, 0)
    """
    return 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def arranged(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int, numel: int, *, most: int = 256
) -> Arrangement | None:
    """The blocks of a storage that hold a strided tensor, if slicing, permuting and joining them gives the tensor.

    It does for whatever slicing (with steps too), transposing and splitting axes make of a dense tensor; it does not
    where elements share memory. One block does, unless the storage ends inside its last row, or rows of odd lengths
    were cut and then split.

    Args:
        shape: sizes; none is 0.
        strides: distances between neighbors, in elements.
        offset: of the first element in the storage.
        numel: elements of the storage, which holds all those of the tensor.
        most: how many parts may be joined along axes that no block spans.

    Returns:
        A block, which lies within the storage, or a few that are joined. It starts where a row of the storage starts,
        if that is possible.

    Example:
        >>> arranged((3, 4), (1, 10), 5, 40)
        Block(start=0, shape=(4, 10), at=((0, 4), (5, 8)), steps=(1, 1), dims=(1, 0))
        >>> [block.start for block in blocks(arranged((2,), (3,), 0, 5))]
        [0, 3]
    """
    if is_row_major(shape, strides):
        at = tuple([(0, n) for n in shape])
        return Block(start=offset, shape=shape, at=at, steps=(1,) * len(shape), dims=tuple(range(len(shape))))
    axis = next(axis for axis in _order(shape, strides) if shape[axis] > 1)
    length = shape[axis]
    frame = _frame(shape, strides)
    if frame is not None:
        begin = _begin(frame.spans, frame.rows, frame.units, offset, numel)
        if begin is not None:
            return _block(frame, begin, offset)
        cut = length - 1
    else:
        row = extent((*shape[:axis], 1, *shape[axis + 1 :]), strides)
        if strides[axis] < row or length > most:
            return None
        cut, most = length // 2, most // 2
    head = arranged((*shape[:axis], cut, *shape[axis + 1 :]), strides, offset, numel, most=most)
    start = offset + cut * strides[axis]
    tail = arranged((*shape[:axis], length - cut, *shape[axis + 1 :]), strides, start, numel, most=most)
    return None if head is None or tail is None else Joined(head, tail, axis)


@frozen(kw_only=True)
class _Frame:
    """The axes of a block, the largest stride first, with one more at the end where neighbors do not touch.

    Attributes:
        order: all axes of the tensor in that order.
        real: those of more than one element.
        units: the strides of the block's axes.
        steps: how many units neighbors are apart, for each of `real`.
        spans: how many units the wanted elements extend over.
        rows: sizes of the block.
    """

    order: list[int]
    real: list[int]
    units: list[int]
    steps: list[int]
    spans: list[int]
    rows: list[int]


def _frame(shape: tuple[int, ...], strides: tuple[int, ...]) -> _Frame | None:
    order = _order(shape, strides)
    real = [axis for axis in order if shape[axis] > 1]
    if strides[real[-1]] < 1:
        return None
    units = list(accumulate((strides[axis] for axis in real), gcd))
    steps = [strides[axis] // unit for axis, unit in zip(real, units, strict=True)]
    spans = [(shape[axis] - 1) * step + 1 for axis, step in zip(real, steps, strict=True)]
    if units[-1] > 1:  # what lies between two neighbors is one more axis, of which one row is wanted
        units.append(1)
        spans.append(1)
    rows = [spans[0], *[big // small for big, small in pairwise(units)]]
    if any(n > m for n, m in zip(spans, rows, strict=True)):
        return None
    if sum(shape[axis] for axis, step in zip(real, steps, strict=True) if step > 1) > _MOST_PICKED:
        return None
    return _Frame(order=order, real=real, units=units, steps=steps, spans=spans, rows=rows)


def _block(frame: _Frame, begin: list[int], offset: int) -> Block:
    place = {axis: i for i, axis in enumerate(frame.real)}
    inside = [place.get(axis) for axis in frame.order]
    extra = range(len(frame.real), len(frame.units))
    at = [(0, 1) if i is None else (begin[i], begin[i] + frame.spans[i]) for i in inside]
    return Block(
        start=offset - sum(b * unit for b, unit in zip(begin, frame.units, strict=True)),
        shape=tuple([1 if i is None else frame.rows[i] for i in (*inside, *extra)]),
        at=(*at, *[begin[i] for i in extra]),
        steps=tuple([1 if i is None else frame.steps[i] for i in inside]),
        dims=tuple([frame.order.index(axis) for axis in range(len(frame.order))]),
    )


def _order(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """Axes from the largest stride to the smallest; an axis of size 1 stays behind the one it follows."""
    keys, last = [], max(strides, default=0) + 1
    for n, stride in zip(shape, strides, strict=True):
        last = stride if n > 1 else last
        keys.append(last)
    return sorted(range(len(shape)), key=lambda axis: -keys[axis])


def _begin(spans: list[int], rows: list[int], units: list[int], offset: int, numel: int) -> list[int] | None:
    """Where the wanted elements begin along each axis of the block; the block lies within the storage."""
    room = [m - n for n, m in zip(spans, rows, strict=True)]
    length = spans[0] * units[0]

    def fits(begin: list[int]) -> bool:
        start = offset - sum(b * unit for b, unit in zip(begin, units, strict=True))
        return start + length <= numel and all(b <= r for b, r in zip(begin, room, strict=True))

    aligned, left = [0], offset % units[0]
    for unit in units[1:]:
        aligned.append(left // unit)
        left %= unit
    if fits(aligned):
        return aligned
    largest, left, free = [0], offset, False  # as far back as the slice may begin: the end is reached last there
    for unit, r in zip(units[1:], room[1:], strict=True):
        digit = r if free else min(left // unit, r)
        free = free or digit < left // unit
        largest.append(digit)
        left -= digit * unit
    return largest if fits(largest) else None


def blocks(found: Arrangement) -> Iterator[Block]:
    """The blocks of an arrangement, in the order in which they are joined.

    Example:
        >>> [(block.start, block.shape) for block in blocks(arranged((3,), (2,), 0, 5))]
        [(0, (2, 2)), (4, (1,))]
    """
    if isinstance(found, Block):
        yield found
    else:
        yield from blocks(found.head)
        yield from blocks(found.tail)


def intricacy(found: Arrangement) -> int:
    """How much of a plan an arrangement takes: a measure of its blocks and of the rows picked from them.

    Example:
        >>> intricacy(arranged((3, 4), (1, 10), 5, 40)), intricacy(arranged((2, 3), (10, 3), 0, 20))
        (0, 3)
    """
    each = list(blocks(found))
    picked = sum(-(-(a[1] - a[0]) // step) for b in each for a, step in _stepped(b))
    return 16 * (len(each) - 1) + picked


def _stepped(block: Block) -> Iterator[tuple[tuple[int, int], int]]:
    """The axes of which not every row is wanted."""
    kept = [a for a in block.at if isinstance(a, tuple)]
    return ((a, step) for a, step in zip(kept, block.steps, strict=True) if step > 1)


def stored_arrangement(stored: StoredTensor) -> Arrangement:
    """The arrangement of a stored tensor; `start` counts elements from the tensor's `start`.

    Raises:
        ValueError: its strides are none that `arranged` expresses, which readers of files refuse.

    Example:
        >>> from funcmodel.records.checkpoint import StoredView
        >>> stored = StoredTensor(TensorSpec([3, 2], "int8"), 100, 106, StoredView("w", 0, (1, 3)))
        >>> [(block.shape, block.dims) for block in blocks(stored_arrangement(stored))]
        [((2, 3), (1, 0))]
    """
    view, shape = stored.view, stored.spec.shape
    strides, offset = (row_major(shape), 0) if view is None else (view.strides, view.offset)
    found = arranged(shape, strides, offset, (stored.stop - stored.start) * 8 // stored.spec.dtype.bits)
    if found is None:
        raise ValueError(f"no block holds a tensor of shape {list(shape)} with strides {list(strides)}")
    return found


def viewed(file: FileRef, stored: StoredTensor) -> Expr:
    """The expression for a stored tensor with a view: reads of blocks, sliced, permuted, joined.

    Where several names share bytes, the read bears the first of them, so that equal tensors are equal expressions.

    Args:
        file: the file it is in.
        stored: what the file says.

    Raises:
        ValueError: it has no view.

    Example:
        >>> from funcmodel.records.checkpoint import StoredView
        >>> file = FileRef("m.bin", "torch_zip", 200, "")
        >>> stored = StoredTensor(TensorSpec([3, 2], "int8"), 100, 106, StoredView("w", 0, (1, 3)))
        >>> viewed(file, stored)  # doctest: +ELLIPSIS
        Permute(of=Read(file=FileRef(...), name='w', spec=[2, 3] int8, offset=100), dims=(1, 0))
    """
    view, dtype = stored.view, stored.spec.dtype
    if view is None:
        raise ValueError(f"{stored!r} has no view; a Read of its bytes is all it is")

    def expression(found: Arrangement) -> Expr:
        if isinstance(found, Joined):
            return concatenated([expression(found.head), expression(found.tail)], found.axis)
        offset = stored.start + found.start * dtype.bits // 8
        expr = sliced(Read(file, view.name, TensorSpec(found.shape, dtype), offset), found.at)
        for axis, step in enumerate(found.steps):
            if step > 1:
                expr = taken(expr, axis, tuple(range(0, shape_of(expr)[axis], step)))
        return permuted(expr, found.dims)

    return expression(stored_arrangement(stored))
