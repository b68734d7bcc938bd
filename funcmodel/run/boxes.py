"""Boxes of stored tensors, as byte ranges and in parts that fit a scratch buffer. Arithmetic only.

A box says, for every axis of a row-major tensor, which runs `(start, length)` of it are wanted, in that order. Packed
element types count as torch counts them: two `F4` are one.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain, product
from math import prod
from typing import Final, TypeAlias

from funcmodel.errors import PlanError
from funcmodel.plan.routing import BUFFER, CALLS, FEW, SCATTERED
from funcmodel.records.expressions import At
from funcmodel.records.tensors import TensorSpec

Runs: TypeAlias = tuple[tuple[int, int], ...]
Box: TypeAlias = tuple[Runs, ...]
Place: TypeAlias = tuple[tuple[int, int], ...]

CHUNK: Final = BUFFER  # what cannot be read in place is read in parts of this size
PAGE: Final = 4096
RUN: Final = 64  # and any number of those that have so many bytes


def counts(box: Box) -> tuple[int, ...]:
    """The shape of what a box selects."""
    # Mostly one run, and asked for 100,000 tensors several times.
    return tuple([runs[0][1] if len(runs) == 1 else sum([length for _, length in runs]) for runs in box])


def whole(shape: Sequence[int]) -> Box:
    """The box that selects everything."""
    return tuple([((0, size),) for size in shape])


def ranges(shape: Sequence[int], itemsize: int, box: Box) -> Iterator[tuple[int, int]]:
    """Byte ranges (first, length) of a box in a row-major tensor, in the row-major order of the selection."""
    split = _split(shape, box)
    if split < 0:
        if size := itemsize * prod(shape):
            yield 0, size
        return
    inner = itemsize * prod(shape[split + 1 :])
    if not inner:
        return
    steps = [itemsize * prod(shape[axis + 1 :]) for axis in range(split)]
    rows = [
        [step * (start + i) for start, length in runs for i in range(length)]
        for runs, step in zip(box[:split], steps, strict=True)
    ]
    last = [(inner * start, inner * length) for start, length in box[split] if length]
    for row in product(*rows):
        base = sum(row)
        for start, size in last:
            yield base + start, size


def distinct(box: Box) -> Box:
    """The box with nothing twice."""
    return tuple([runs if len(runs) == 1 else _distinct(runs) for runs in box])


def _split(shape: Sequence[int], box: Box) -> int:
    """The last axis of which not everything is wanted, or -1."""
    axis = len(shape) - 1
    while axis >= 0 and box[axis] == ((0, shape[axis]),):
        axis -= 1
    return axis


def widened(shape: Sequence[int], itemsize: int, box: Box) -> Box:
    """The box to read for `box`: nothing twice, and more than is wanted only of many runs less than a page apart.

    Of runs that are worth a call of their own it is at most a tenth more, so that the slices of many ranks together
    read a file once.
    """
    box = distinct(box)
    while (axis := _split(shape, box)) >= 0:
        before = counts(box[:axis])
        runs = box[axis]
        if prod(before) * len(runs) <= FEW:
            break
        first, last = min(start for start, _ in runs), max(start + length for start, length in runs)
        span = (first, last - first) if prod(before) == 1 else (0, shape[axis])
        missing = (span[1] - sum(length for _, length in runs)) * itemsize * prod(shape[axis + 1 :])
        wanted = sum(length for _, length in runs) * itemsize * prod(shape[axis + 1 :])
        if runs == (span,) or missing > PAGE * len(runs) or (wanted >= RUN * len(runs) and missing * 10 > wanted):
            break
        box = (*box[:axis], (span,), *box[axis + 1 :])
    return box


@lru_cache(maxsize=1024)  # a model has few shapes and many tensors
def scattered(shape: tuple[int, ...], itemsize: int, box: Box) -> bool:
    """Whether a box lies in so many small runs that a call for each would cost more than the bytes."""
    axis = _split(shape, box)
    if axis < 0:
        return False
    count = prod(counts(box[:axis])) * len(box[axis])
    return count > CALLS and itemsize * prod(counts(box)) < SCATTERED * count


def chunks(shape: Sequence[int], itemsize: int, box: Box, most: int = CHUNK) -> Iterator[tuple[Box, Box, Place]]:
    """A box in parts of at most 4 MiB to read: (part, part as it is read, where in the selection it goes)."""
    return _chunks(partial(widened, shape, itemsize), itemsize, box, tuple([(0, n) for n in counts(box)]), most)


def parts(itemsize: int, box: Box, most: int = CHUNK) -> Iterator[tuple[Box, Place]]:
    """A box of what lies in memory in parts of at most 4 MiB: (part, where in the selection it goes)."""
    size = counts(box)
    to = tuple([(0, n) for n in size])
    if itemsize * prod(size) <= most:
        return iter([(box, to)] if 0 not in size else [])
    return ((part, place) for part, _, place in _chunks(lambda part: part, itemsize, box, to, most))


def _chunks(
    as_read: Callable[[Box], Box], itemsize: int, box: Box, to: Place, most: int
) -> Iterator[tuple[Box, Box, Place]]:
    wide = as_read(box)
    nbytes = itemsize * prod(counts(wide))
    axis = next((i for i, (_, n) in enumerate(to) if n > 1), None)
    if nbytes <= most or axis is None:
        if prod(n for _, n in to):
            yield box, wide, to
        return
    start, count = to[axis]
    step = max(1, count // -(-nbytes // most))
    for at, runs in _cut(box[axis], step):
        place = (start + at, sum(length for _, length in runs))
        inner = (*box[:axis], runs, *box[axis + 1 :])
        yield from _chunks(as_read, itemsize, inner, (*to[:axis], place, *to[axis + 1 :]), most)


def _cut(runs: Runs, step: int) -> Iterator[tuple[int, Runs]]:
    """Runs in groups of `step` elements, each with its place in the selection."""
    at, room, group = 0, step, []
    for start, length in runs:
        while length:
            taken = min(length, room)
            group.append((start, taken))
            start, length, room = start + taken, length - taken, room - taken
            if not room:
                yield at, tuple(group)
                at, room, group = at + step, step, []
    if group:
        yield at, tuple(group)


def _distinct(runs: Runs) -> Runs:
    """The runs themselves, or where an element is in two of them, their union in ascending order."""
    ascending = sorted(runs)
    stops = (start + length for start, length in ascending)
    if all(stop <= start for stop, (start, _) in zip(stops, ascending[1:], strict=False)):
        return runs
    return runs_of(sorted(set(indices(runs))))


def indices(runs: Runs) -> Iterator[int]:
    """What the runs select, one by one."""
    return chain.from_iterable(range(start, start + length) for start, length in runs)


def runs_of(picked: Sequence[int], base: int = 0) -> Runs:
    """Indices, each raised by `base`, as runs of consecutive ones."""
    out: list[tuple[int, int]] = []
    start = end = -1
    for i in picked:
        if i != end:
            if end >= 0:
                out.append((base + start, end - start))
            start = i
        end = i + 1
    if end >= 0:
        out.append((base + start, end - start))
    return tuple(out)


def box_of(spec: TensorSpec, at: At, picks: Sequence[tuple[int, ...] | None]) -> Box:
    """The box that `Index(at)` and then, on each axis that is left, the indices `picks` select.

    Raises:
        PlanError: elements of a packed type that do not fill whole bytes.
    """
    rest = iter(picks)
    box: list[Runs] = []
    for of in at:
        if isinstance(of, int):
            box.append(((of, 1),))
            continue
        pick = next(rest)
        box.append(((of[0], of[1] - of[0]),) if pick is None else runs_of(pick, of[0]))
    if spec.dtype.pack > 1 and box:
        box[-1] = tuple((packed(start, spec), packed(length, spec)) for start, length in box[-1])
    return tuple(box)


def packed(position: int, spec: TensorSpec) -> int:
    """A position on the last axis, counted as torch counts it.

    Raises:
        PlanError: it lies within a byte.
    """
    if position % spec.dtype.pack:
        raise PlanError(f"position {position} of {spec!r} lies within a byte, {spec.dtype.pack} elements share one")
    return position // spec.dtype.pack
