"""What cannot be read where it is wanted passes through a few buffers: some are filled while one is emptied."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import TypeAlias

import torch
from attrs import field, frozen

from funcmodel.records.dtypes import DType
from funcmodel.run.boxes import Box, counts, ranges
from funcmodel.run.crew import Crew
from funcmodel.run.engine import Piece, Source, jobs
from funcmodel.run.memory import ALIGNED, memory, tensor_at
from funcmodel.run.moves import move, picked

Batch: TypeAlias = "list[tuple[Part, int]]"


@frozen(eq=False)
class Part:
    """A box of a stored tensor on its way into a tensor, small enough for a buffer.

    Attributes:
        source: the open file.
        base: first byte of the stored tensor in it.
        shape: of the stored tensor, as torch has it.
        kind: its dtype.
        box: what is wanted of it.
        wide: what is read for that.
        to: where it goes.
        casts: what happens to it on the way, one after the other.
    """

    source: Source
    base: int
    shape: tuple[int, ...]
    kind: torch.dtype
    box: Box
    wide: Box
    to: torch.Tensor
    casts: tuple[DType, ...]
    size: tuple[int, ...] = field(init=False)
    nbytes: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        size = counts(self.wide)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "nbytes", prod(size) * self.kind.itemsize)

    def pieces(self, where: memoryview) -> Iterator[Piece]:
        """The byte ranges to read, and the places that they have in `where`."""
        at = 0
        for first, size in ranges(self.shape, self.kind.itemsize, self.wide):
            yield self.base + first, where[at : at + size]
            at += size


def batches(parts: Iterable[Part], most: int) -> Iterator[Batch]:
    """Consecutive parts that fit one buffer of `most` bytes together, each with its place in it."""
    batch: Batch = []
    end = 0
    for part in parts:
        start = -(-end // ALIGNED) * ALIGNED
        if batch and start + part.nbytes > most:
            yield batch
            batch, start = [], 0
        batch.append((part, start))
        end = start + part.nbytes
    if batch:
        yield batch


def read_batch(batch: Batch, where: memoryview) -> None:
    """Fill a buffer."""
    run: list[Piece] = []
    source: Source | None = None
    for part, at in batch:
        if part.source is not source and source is not None:
            _read(source, run)
            run = []
        source = part.source
        run += part.pieces(where[at : at + part.nbytes])
    if source is not None:
        _read(source, run)


def _read(source: Source, pieces: list[Piece]) -> None:
    for file, offset, views in jobs(source, pieces):
        file.readv_into(views, offset)


def use_batch(batch: Batch, where: memoryview) -> None:
    """Empty a buffer: every part goes where it is wanted."""
    for part, at in batch:
        source = tensor_at(where, at, part.kind, part.size)
        move(picked(source, part.box, part.wide), part.to, part.casts)


def pass_through(parts: Sequence[Part], *, threads: int, buffers: int, nbytes: int) -> None:
    """Read parts in a few threads and move each to its place in the calling one.

    Torch computes in the calling thread, with the threads of its own that it always has, and in no other: threads that
    read do nothing else, so nothing that torch was told about threads changes, and nobody waits for a team of them.

    Args:
        parts: what to read.
        threads: how many read.
        buffers: how many buffers there are.
        nbytes: bytes of each; one is larger where a part is.
    """
    work = list(batches(parts, nbytes))
    if not work:
        return
    if len(work) == 1:
        where = memory(_size(work[0]))
        read_batch(work[0], where)
        use_batch(work[0], where)
        return
    readers = min(threads, len(work))
    free = deque(memory(max(nbytes, *map(_size, work))) for _ in range(max(2, min(buffers, len(work)))))
    full: deque[tuple[Batch, memoryview]] = deque()
    crew, shared = Crew(), iter(work)

    def read() -> None:
        while (where := crew.take(free)) is not None and (batch := crew.next(shared)) is not None:
            read_batch(batch, where)
            crew.give(full, (batch, where))

    def use() -> None:
        for _ in work:
            found = crew.take(full)
            if found is None:
                return  # a reader has failed
            use_batch(*found)
            crew.give(free, found[1])

    crew.together([read] * readers, own=use)


def _size(batch: Batch) -> int:
    part, start = batch[-1]
    return start + part.nbytes
