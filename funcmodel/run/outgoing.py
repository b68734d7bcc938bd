"""The bytes of a save: stored tensors as they stand, live tensors as they lie, everything else computed."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, Final

import torch

from funcmodel.records.expressions import Expr, FileRef, Live, Read
from funcmodel.run.checks import LiveTensors, check_plan
from funcmodel.run.engine import Source
from funcmodel.run.evaluate import stream
from funcmodel.run.files import Digest
from funcmodel.run.formats import Format
from funcmodel.run.memory import memory
from funcmodel.run.tensors import FROM_TORCH, byte_view

_BUFFER: Final = 8 << 20  # stored bytes pass through a buffer of this size, one for each thread that writes
_SLAB: Final = 4 << 20  # small tensors are joined into blocks of this size
_SMALL: Final = 64 << 10  # and are smaller than this
_PIECE: Final = 8 << 20  # what is not contiguous on the CPU is made so in pieces of this size


class Outgoing:
    """Where the bytes come from: stored tensors as they stand, live tensors as they lie, everything else computed."""

    def __init__(
        self, entries: Mapping[str, Expr], live: LiveTensors, formats: tuple[Format, ...], digest: Digest
    ) -> None:
        self._computed = {key: expr for key, expr in entries.items() if not isinstance(expr, Read | Live)}
        self._live = live
        self._leaves: set[str] = set()
        self._formats = formats
        self._digest = digest
        self.refs = {id(ref): ref for ref in check_plan(self._computed, live)}
        for key, expr in entries.items():
            if isinstance(expr, Read):
                if not 0 <= expr.offset <= expr.file.nbytes - expr.spec.nbytes:
                    check_plan({key: expr}, live)
                self.refs[id(expr.file)] = expr.file
            elif isinstance(expr, Live):
                self._leaves.add(expr.key)
                _check_live(expr, live)

    def computed(self) -> Any:
        """The tensors that are neither stored nor live as they are wanted, in the order of the entries."""
        return stream(self._computed, live=self._live, formats=self._formats, digest=self._digest)

    def independent(self) -> bool:
        """Whether any part of it can be had beside any other: nothing is computed, and nothing lies on a device."""
        return not self._computed and all(self._live[key].is_cpu for key in self._leaves)

    def buffers(
        self,
        entries: Mapping[str, Expr],
        files: Mapping[FileRef, Source],
        values: Iterator[tuple[str, torch.Tensor]],
    ) -> Iterator[list[memoryview]]:
        """The data of a shard, in order. Each batch must be written before the next is asked for."""
        for kind, run in groupby(entries.items(), key=lambda entry: type(entry[1])):
            if kind is Read:
                yield from _stored((expr for _, expr in run if isinstance(expr, Read)), files)
            elif kind is Live:
                leaves = (self._live[expr.key] for _, expr in run if isinstance(expr, Live))
                for near, some in groupby(leaves, key=lambda tensor: tensor.is_cpu):
                    passed = _joined if near else _drained
                    yield from passed(some)
            else:
                yield from _joined(next(values)[1] for _ in run)


def _stored(reads: Iterable[Read], files: Mapping[FileRef, Source]) -> Iterator[list[memoryview]]:
    """Stored bytes through one buffer; tensors that are neighbors on both sides are read in one call."""
    ranges = list(_ranges(reads))
    buffer = memory(min(_BUFFER, sum(stop - start for _, start, stop in ranges)))
    filled = 0
    for ref, start, stop in ranges:
        while start < stop:
            count = min(stop - start, len(buffer) - filled)
            files[ref].readv_into([buffer[filled : filled + count]], start)
            filled += count
            start += count
            if filled == len(buffer):
                yield [buffer]
                filled = 0
    if filled:
        yield [buffer[:filled]]


def _check_live(leaf: Live, live: LiveTensors) -> None:
    """What `check_plan` checks, with one look at tensors that are as planned: there may be 100,000 of them."""
    tensor, spec = live.get(leaf.key), leaf.spec
    if not (
        isinstance(tensor, torch.Tensor)
        and tensor.shape == spec.shape
        and FROM_TORCH.get(tensor.dtype) is spec.dtype
        and not tensor.is_meta
        and tensor.layout is torch.strided
    ):
        check_plan({leaf.key: leaf}, live)


def _ranges(reads: Iterable[Read]) -> Iterator[tuple[FileRef, int, int]]:
    """The byte ranges of stored tensors, those joined that follow one another in their file."""
    ref, start, stop = None, 0, 0
    for read in reads:
        if read.file is not ref or read.offset != stop:
            if ref is not None:
                yield ref, start, stop
            ref, start, stop = read.file, read.offset, read.offset
        stop += read.spec.nbytes
    if ref is not None:
        yield ref, start, stop


def _joined(tensors: Iterable[torch.Tensor]) -> Iterator[list[memoryview]]:
    """The bytes of tensors: small ones copied together, large ones as they lie in memory."""
    small: list[torch.Tensor] = []
    size = 0
    kind = None
    for tensor in tensors:
        nbytes = tensor.nbytes
        fits = nbytes <= _SMALL
        if small and not (fits and tensor.dtype is kind and size + nbytes <= _SLAB):
            yield [byte_view(torch.cat(small))]
            small, size = [], 0
        if fits:
            small.append(tensor.reshape(-1))
            size, kind = size + nbytes, tensor.dtype
        else:
            yield from _pieces(tensor)
        del tensor  # or the next one would be made while this one is still held
    if small:
        yield [byte_view(torch.cat(small))]


def _drained(tensors: Iterable[torch.Tensor]) -> Iterator[list[memoryview]]:
    from funcmodel.run.drain import drained

    yield from drained(tensors)


def _pieces(tensor: torch.Tensor) -> Iterator[list[memoryview]]:
    """The bytes of one tensor in row-major order, without a copy where it lies so on the CPU."""
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    if plain:
        yield [byte_view(tensor)]
    elif tensor.nbytes <= _PIECE:
        yield [byte_view(tensor.resolve_conj().resolve_neg().contiguous())]
    else:
        rows = max(1, _PIECE * len(tensor) // tensor.nbytes)
        for part in torch.split(tensor, rows) if len(tensor) > 1 else tensor.unbind():
            yield from _pieces(part)
