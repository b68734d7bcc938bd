"""The bytes of a save: stored tensors as they stand, live tensors as they lie, everything else computed."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

import torch

from funcmodel.core.lowering import stored
from funcmodel.core.shapes import spec_of
from funcmodel.plan.sharding import Outbound
from funcmodel.records.expressions import Expr, FileRef, Live, Read
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.checks import LiveTensors, check_plan
from funcmodel.run.engine import Source
from funcmodel.run.evaluate import stream
from funcmodel.run.files import Digest
from funcmodel.run.formats import Format
from funcmodel.run.memory import memory, tensor_at
from funcmodel.run.moves import move
from funcmodel.run.tensors import FROM_TORCH, byte_view

if TYPE_CHECKING:
    from funcmodel.run.drain import Drains

_BUFFER: Final = 8 << 20  # what cannot be written as it lies passes through as much, for each thread that writes
_SLAB: Final = 4 << 20  # small tensors are joined into blocks of this size
_SMALL: Final = 64 << 10  # and are smaller than this


class Outgoing:
    """Where the bytes come from: stored tensors as they stand, live tensors as they lie, everything else computed."""

    def __init__(
        self, entries: Mapping[str, Expr], live: LiveTensors, formats: tuple[Format, ...], digest: Digest
    ) -> None:
        self._computed: dict[str, Expr] = {}
        self._live = live
        self._formats = formats
        self._digest = digest
        self.refs: dict[int, FileRef] = {}
        leaves: list[Live] = []
        for key, expr in entries.items():
            if type(expr) is Live:
                leaves.append(expr)
            elif (read := stored(expr)) is not None:
                if not 0 <= read.offset <= read.file.nbytes - read.spec.nbytes:
                    check_plan({key: read}, live)
                self.refs[id(read.file)] = read.file
            else:
                self._computed[key] = expr
        far = _check_live(leaves, live)
        self.refs.update((id(ref), ref) for ref in check_plan(self._computed, live))
        self._drains = _drains(far) if far else None
        self.kind: Outbound = "computed" if self._computed else "far" if far else "near"

    def computed(self) -> Any:
        """The tensors that are neither stored nor live as they are wanted, in the order of the entries."""
        return stream(self._computed, live=self._live, formats=self._formats, digest=self._digest)

    def buffers(
        self,
        entries: Mapping[str, Expr],
        files: Mapping[FileRef, Source],
        values: Iterator[tuple[str, torch.Tensor]],
    ) -> Iterator[list[memoryview]]:
        """The data of a shard, in order. Each batch must be written before the next is asked for."""
        exprs: Any = entries.values()
        for kind, run in groupby(zip(map(type, exprs), exprs, strict=True), key=itemgetter(0)):
            if kind is Read:
                yield from _stored((expr for _, expr in run), files)
            elif kind is not Live:
                for stands, some in groupby((expr for _, expr in run), lambda expr: stored(expr) is not None):
                    if stands:
                        yield from _stored(filter(None, map(stored, some)), files)
                    else:
                        yield from _joined((next(values)[1], spec_of(expr)) for expr in some)
            else:
                leaves = ((self._live[expr.key], expr.spec) for _, expr in run)
                drains = self._drains
                parts = [(True, leaves)] if drains is None else groupby(leaves, key=lambda leaf: leaf[0].is_cpu)
                for near, several in parts:
                    yield from _joined(several) if near or drains is None else drains.bytes_of(t for t, _ in several)


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


def _check_live(leaves: Iterable[Live], live: LiveTensors) -> set[torch.device]:
    """What `check_plan` checks, with one look at each tensor that is as planned; the devices but the CPU."""
    far: set[torch.device] = set()
    for leaf in leaves:  # there may be 100,000
        tensor, spec = live.get(leaf.key), leaf.spec
        if (
            isinstance(tensor, torch.Tensor)
            and tensor.shape == spec.shape
            and FROM_TORCH.get(tensor.dtype) is spec.dtype
            and tensor.layout is torch.strided
        ):
            if tensor.is_cpu:
                continue
            if not tensor.is_meta:
                far.add(tensor.device)
                continue
        check_plan({leaf.key: leaf}, live)
        if not live[leaf.key].is_cpu:
            far.add(live[leaf.key].device)
    return far


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


def _drains(far: Iterable[torch.device]) -> "Drains":
    from funcmodel.run.drain import Drains

    return Drains(far)


def _joined(tensors: Iterable[tuple[torch.Tensor, TensorSpec]]) -> Iterator[list[memoryview]]:
    """The bytes of tensors: small ones copied together into one buffer, large ones as they lie in memory."""
    small: list[torch.Tensor] = []
    room = tensor_at(memory(_BUFFER), 0, torch.uint8, (_BUFFER,))
    last: TensorSpec | None = None
    size = nbytes = 0  # of what waits in `small`, and of one tensor
    even = True
    for tensor, spec in tensors:
        if last is None or spec.shape != last.shape or spec.dtype is not last.dtype:
            nbytes, even = spec.nbytes, False
        if small and (size + nbytes > _SLAB or nbytes > _SMALL or last is None or spec.dtype is not last.dtype):
            yield [_together(small, even, room[:size])]
            small, size = [], 0
        if nbytes > _SMALL:
            yield from _pieces(tensor, room)
        else:
            if not small:
                even = bool(spec.shape)
            small.append(tensor)
            size += nbytes
        last = spec
        del tensor  # or the next one would be made while this one is still held
    if small:
        yield [_together(small, even, room[:size])]


def _together(tensors: list[torch.Tensor], even: bool, room: torch.Tensor) -> memoryview:
    """The bytes of tensors of one dtype, one after the other; those of one shape need not be flattened first."""
    if tensors[0].dtype is torch.bool:  # torch would make a 1 of a 2
        tensors = [tensor.view(torch.uint8) for tensor in tensors]
    flat = room.view(tensors[0].dtype)
    if even:
        rows, *row = tensors[0].shape
        torch.cat(tensors, out=flat.view(rows * len(tensors), *row))
    else:
        torch.cat([tensor.reshape(-1) for tensor in tensors], out=flat)
    return byte_view(flat)


def _pieces(tensor: torch.Tensor, room: torch.Tensor) -> Iterator[list[memoryview]]:
    """The bytes of one tensor on the CPU in row-major order, by way of `room` where it does not lie so."""
    if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        yield [byte_view(tensor)]
    elif tensor.nbytes <= len(room):
        move(tensor.detach(), room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        yield [byte_view(room[: tensor.nbytes])]
    else:
        rows = max(1, len(room) * len(tensor) // tensor.nbytes)
        for part in torch.split(tensor, rows) if len(tensor) > 1 else tensor.unbind():
            yield from _pieces(part, room)
