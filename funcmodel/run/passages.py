"""What passes through the ring: bytes as they stand, and boxes of stored tensors that are changed on the way."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Final, NamedTuple, TypeAlias

import torch
from attrs import evolve, field, frozen

from funcmodel.records.dtypes import DType
from funcmodel.run.boxes import Box, chunks, distinct, ranges, widened
from funcmodel.run.buffers import Part
from funcmodel.run.direct import DirectFile
from funcmodel.run.engine import Piece, Source, plain_file
from funcmodel.run.lanes import CELLS, Lane
from funcmodel.run.mapped import Held
from funcmodel.run.memory import ALIGNED, PAGE
from funcmodel.run.moves import cut, move, picked, placed
from funcmodel.run.slabs import flat_bytes
from funcmodel.run.tensors import FROM_TORCH, torch_dtype

_TAIL: Final = 4096  # less room than this at the end of a buffer is left empty
_LARGE: Final = 256 << 10  # of files that are read past the page cache, what a disk writes into the buffer at once


@frozen(eq=False)
class Span:
    """Bytes of a file that arrive as they are.

    Attributes:
        source: the open file.
        first: the first byte in it.
        nbytes: how many.
        to: the flat bytes that they are part of.
        at: where, in `to`.
        padded: whether what lies between the last multiple of the alignment before it and itself is nobody's.
        also: the ways to further places for the same bytes, and what passes there.
    """

    source: Source
    first: int
    nbytes: int
    to: torch.Tensor
    at: int
    padded: bool = False
    also: "tuple[tuple[Lane, Passage], ...]" = ()

    @property
    def same(self) -> Hashable:
        """Alike for passages that are one in a buffer."""
        return id(self.source), self.first, self.nbytes

    @property
    def paged(self) -> bool:
        """Whether a disk may write its pages into a buffer at once: they take more room than its bytes."""
        return self.nbytes >= _LARGE and isinstance(self.source, DirectFile)

    @property
    def room(self) -> int:
        """Bytes that it takes in a buffer, at most."""
        return self.nbytes + 2 * PAGE if self.paged else self.nbytes


@frozen(eq=False)
class Change:
    """A box of a stored tensor, small enough for a buffer.

    Attributes:
        part: what is read, where it goes, and what happens to it on the way.
        here: casts that are made in the buffer, before the device gets it.
        there: casts that the device makes.
        first: its first byte in the file, about.
        arrives: the dtype in which the device gets it.
        nbytes: how many bytes that are.
        room: bytes that it takes in a buffer.
        flat: where it goes, as bytes, if nothing is left to be done there; None: it goes to a scratch first.
        held: the mapping that it is taken out of; None where it is read.
        also: as in `Span`.
    """

    part: Part
    here: tuple[DType, ...]
    there: tuple[DType, ...]
    held: Held | None = None
    also: "tuple[tuple[Lane, Passage], ...]" = ()
    first: int = field(init=False)
    arrives: torch.dtype = field(init=False)
    nbytes: int = field(init=False)
    room: int = field(init=False)
    flat: torch.Tensor | None = field(init=False)

    def __attrs_post_init__(self) -> None:
        part = self.part
        arrives = torch_dtype(self.here[-1]) if self.here else part.kind
        nbytes = prod(part.size) * arrives.itemsize
        done = not self.there and part.box == part.wide and part.to.is_contiguous()
        object.__setattr__(self, "first", _first(part))
        object.__setattr__(self, "arrives", arrives)
        object.__setattr__(self, "nbytes", nbytes)
        object.__setattr__(self, "room", max(nbytes, part.nbytes))
        object.__setattr__(self, "flat", flat_bytes(part.to) if done else None)

    @property
    def source(self) -> Source:
        """The open file."""
        return self.part.source

    @property
    def same(self) -> Hashable:
        """Alike for passages that are one in a buffer, whatever a device makes of them there."""
        part = self.part
        return id(part.source), part.base, part.shape, part.kind, part.wide, self.here

    def pieces(self, where: memoryview) -> Iterable[Piece]:
        """The byte ranges that are to be read, and their places in a buffer; none where a mapping had the bytes."""
        part = self.part
        file = plain_file(part.source)
        pages = None if self.held is None or file is None else self.held.bytes_of(file)
        if pages is None:
            return part.pieces(where)
        cut(pages, part.base, part.shape, part.kind.itemsize, part.wide, where)
        return ()

    def recast(self, where: torch.Tensor) -> None:
        """Make the casts of `here`, in the bytes that it was read into, in this thread alone."""
        if not self.here:
            return
        numel = prod(self.part.size)
        old = where[: self.part.nbytes].view(self.part.kind)
        new = where[: self.nbytes].view(self.arrives)
        starts: Iterable[int] = range(0, numel, CELLS)
        # In this direction no element is overwritten before it is read.
        for start in starts if new.itemsize <= old.itemsize else reversed(range(0, numel, CELLS)):
            block = old[start : start + CELLS]
            for kind in self.here:
                block = block.to(torch_dtype(kind))
            new[start : start + CELLS].copy_(block)

    def settle(self, where: torch.Tensor) -> None:
        """Move it from a scratch, on the device, to its place."""
        source = where[: self.nbytes].view(self.arrives).reshape(self.part.size)
        move(picked(source, self.part.box, self.part.wide), self.part.to, self.there)


Passage: TypeAlias = Span | Change


class Stop(NamedTuple):
    """A passage or a part of a span, on one trip.

    Attributes:
        one: what.
        done: from which of its bytes on.
        size: how many.
        start: where in the buffer.
        joins: whether one copy serves it and the stop before.
        direct: whether it lies in pages as it lies in the file, and the rest of these pages is nobody's, or its
            neighbors' in the file: a disk may write them whole.
    """

    one: Passage
    done: int
    size: int
    start: int
    joins: bool
    direct: bool

    @property
    def offset(self) -> int:
        """Its first byte in the file."""
        return self.one.first + self.done

    @property
    def end(self) -> int:
        """Where the next byte in the buffer is."""
        return self.start + self.size


def passages(
    source: Source,
    base: int,
    shape: tuple[int, ...],
    kind: torch.dtype,
    box: Box,
    to: torch.Tensor,
    casts: tuple[DType, ...],
    *,
    most: int,
    cells: int = 0,
    held: Held | None = None,
) -> Iterator[Passage]:
    """A box of a stored tensor on its way to a tensor of its shape on a device.

    Args:
        source: the open file.
        base: first byte of the stored tensor in it.
        shape: of the stored tensor, as torch has it.
        kind: its dtype.
        box: what is wanted of it.
        to: where it goes.
        casts: what happens to it on the way, one after the other.
        most: bytes of a buffer.
        cells: as in `Lane`.
        held: the mapping of its file, where so many small runs are wanted that a call for each would take too long.
    """
    size = kind.itemsize
    if not to.numel():
        return
    if held is None and not casts and to.is_contiguous() and widened(shape, size, box) == box:
        flat, at = flat_bytes(to), 0
        for first, nbytes in ranges(shape, size, box):
            yield Span(source, base + first, nbytes, flat, at)
            at += nbytes
        return
    here, there = ((), casts) if exact(FROM_TORCH[kind], casts) else (casts, ())
    widest = max(size, torch_dtype(here[-1]).itemsize) if here else size
    room = most * size // widest
    room = min(room, cells * size) if cells else room
    for part, wide, place in chunks(shape, size, box, room):
        reads = wide if held is None else distinct(part)  # of a mapping, no more than is wanted
        yield Change(Part(source, base, shape, kind, part, reads, placed(to, place), casts), here, there, held)


def exact(kind: DType, casts: Sequence[DType]) -> bool:
    """Whether every cast gives each number room, so that every device gives the same bits, and fewer travel before it.

    Example:
        >>> from funcmodel.records.dtypes import dtype
        >>> exact(dtype("bfloat16"), [dtype("float32")]), exact(dtype("float32"), [dtype("int64")])
        (True, False)
    """
    for to in casts:
        wider = to.bits > kind.bits and to.precision >= kind.precision
        holds = to.largest >= kind.largest and to.tiniest <= kind.tiniest and to.signed >= kind.signed
        if not (wider and holds and "bool" not in (kind.kind, to.kind)) or (kind.kind != "int" and to.kind == "int"):
            return False
        if kind.kind == "complex" != to.kind:
            return False
        kind = to
    return True


def trips(passing: Iterable[Passage], most: int, step: int) -> Iterator[list[Stop]]:
    """What fits into one buffer together, again and again; where bytes go side by side they lie so in the buffer.

    Args:
        passing: in the order in which it is read.
        most: bytes of a buffer, a multiple of 64; one is larger only where a `Change` is.
        step: to a multiple of what `padded` spans are aligned.
    """
    trip: list[Stop] = []
    top = end = 0  # of the buffer, and of the bytes of `to` that the last stop filled
    to: torch.Tensor | None = None
    for one in passing:
        done = 0
        while done < one.nbytes:
            start, joins, direct = _up(top, ALIGNED), False, False
            if type(one) is Span:
                gap = one.at + done - end if trip and one.to is to else -1
                direct = one.paged and min(one.nbytes - done, most) >= _LARGE
                if direct:
                    start, joins = _in_pages(one, done, trip, top, gap)
                elif not gap or (one.padded and not done and 0 < gap < step):
                    joins = not trip[-1].direct
                    start = top + gap if joins else start
            left = most - start
            if trip and (left < min(_TAIL, one.nbytes - done) if type(one) is Span else left < one.room):
                yield trip
                trip, top, to = [], 0, None
                continue
            if type(one) is Span:
                size = min(one.nbytes - done, left)
                to, end = one.to, one.at + done + size
                top = start + size
            else:
                size, to, top = one.nbytes, None, start + one.room
            trip.append(Stop(one, done, size, start, joins, direct))
            top = _up(top, PAGE) if direct else top
            done += size
    if trip:
        yield trip


def follows(one: Passage, stop: Stop, last: Stop, step: int) -> bool:
    """Whether one copy serves `last` and `one`, which lies in the buffer as `stop` does; `step` as in `trips`."""
    if type(one) is not Span or type(last.one) is not Span or one.to is not last.one.to:
        return False
    gap = one.at + stop.done - (last.one.at + last.done + last.size)
    return gap == stop.start - last.end and (not gap or (one.padded and not stop.done and 0 < gap < step))


def _in_pages(one: Span, done: int, trip: list[Stop], top: int, gap: int) -> tuple[int, bool]:
    """Where a span starts whose pages a disk writes whole, and whether it joins the stop before."""
    offset = one.first + done
    if trip and trip[-1].direct and trip[-1].one.source is one.source:
        last = trip[-1]
        if last.offset + last.size == offset:  # there it goes on, and so it does here
            return last.end, not gap
    return _up(top, PAGE) + offset % PAGE, False


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def once(passing: Mapping[Lane, Iterable[Passage]]) -> dict[Lane, list[Passage]]:
    """The same passages, but what goes to several places, on one device or several, is one of them, and read once."""
    work: dict[Lane, list[Passage]] = {}
    first: dict[Hashable, Passage] = {}
    also: dict[Passage, list[tuple[Lane, Passage]]] = {}
    for lane, items in passing.items():
        kept = work[lane] = []
        for one in items:
            found = first.setdefault(one.same, one)
            if found is one:
                kept.append(one)
            else:
                also.setdefault(found, []).append((lane, one))
    if also:
        for kept in work.values():
            kept[:] = [evolve(one, also=tuple(also[one])) if one in also else one for one in kept]
    return work


def in_file_order(passing: Iterable[Passage]) -> list[Passage]:
    """File after file, each from its start."""
    files: dict[int, int] = {}
    return sorted(passing, key=lambda one: (files.setdefault(id(one.source), len(files)), one.first))


def _first(part: Part) -> int:
    at, step = 0, part.kind.itemsize
    for runs, size in zip(reversed(part.wide), reversed(part.shape), strict=True):
        at += step * runs[0][0]
        step *= size
    return part.base + at
