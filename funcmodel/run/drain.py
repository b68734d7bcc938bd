"""The way back: the bytes of tensors on a device pass through two buffers, one is written while the other fills."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Final

import torch
from attrs import define

from funcmodel.plan.routing import PINNED
from funcmodel.run.lanes import Lane, Mark, Stream, lane_to
from funcmodel.run.slabs import flat_bytes

_LEAST: Final = 64


class Drains:
    """The ways back from several devices, for threads that each write a file of their own.

    What the devices were given before this is made, by the thread that makes it, is done before any byte comes back;
    the threads that ask for bytes have streams of their own.

    Args:
        devices: none is the CPU.
        lane: the way to one.
    """

    def __init__(self, devices: Iterable[torch.device], lane: Callable[[torch.device], Lane] = lane_to) -> None:
        lanes = {device: lane(device) for device in devices}
        self._ways = {device: (way, way.record()) for device, way in lanes.items()}

    def bytes_of(self, tensors: Iterable[torch.Tensor]) -> Iterator[list[memoryview]]:
        """The bytes of tensors on these devices, one after the other, each in row-major order.

        Tensors may have any strides. Host memory is two buffers of at most 8 MiB, device memory one part of that size
        of a tensor that is not contiguous.

        Yields:
            Bytes, which must be used before the next are asked for.
        """
        for device, run in groupby(tensors, key=lambda tensor: tensor.device):
            lane, begun = self._ways[device]
            yield from Drain(lane).bytes_of(list(run), begun)


@define(eq=False)
class _Slot:
    flat: torch.Tensor
    filled: int = 0
    mark: Mark = None


class Drain:
    """A way for bytes from one device, with its two buffers.

    Args:
        lane: how.
        nbytes: bytes of each buffer.
    """

    def __init__(self, lane: Lane, nbytes: int = PINNED) -> None:
        self._lane = lane
        self._nbytes = nbytes

    def bytes_of(self, tensors: Sequence[torch.Tensor], begun: Mark) -> Iterator[list[memoryview]]:
        """As `Drains.bytes_of`, of tensors on this device, after a mark."""
        lane = self._lane
        # Small saves pin no more than they need.
        size = max(_LEAST, min(self._nbytes, sum(tensor.nbytes for tensor in tensors)))
        stream = lane.stream()
        free: list[_Slot] = []
        filling: list[_Slot] = []
        try:
            with lane.using(stream):
                lane.after(begun)
            trips = _trips(tensors, size)
            while True:
                while len(filling) < 2 and (trip := next(trips, None)) is not None:
                    slot = free.pop() if free else _Slot(lane.host(size, True))
                    filling.append(slot)
                    self._fill(slot, trip, stream)
                if not filling:
                    return
                slot = filling[0]
                lane.wait(slot.mark)
                yield [slot.flat.numpy().data[: slot.filled]]
                free.append(filling.pop(0))
        finally:
            for slot in filling:  # no buffer is let go of while the device writes to it
                if slot.mark is not None:
                    lane.wait(slot.mark)

    def _fill(self, slot: _Slot, trip: "list[tuple[torch.Tensor, int]]", stream: Stream) -> None:
        slot.filled = 0
        with self._lane.using(stream), torch.no_grad():
            try:
                for part, at in trip:
                    self._lane.give(partial(_bring, self._lane, part, slot.flat[at : at + part.nbytes]))
                    slot.filled = at + part.nbytes
            finally:
                slot.mark = self._lane.record()


def _bring(lane: Lane, part: torch.Tensor, to: torch.Tensor) -> None:
    # What this makes belongs to the stream in use, and is taken again by work that comes after the copy.
    lane.copy(to, flat_bytes(part.resolve_conj().resolve_neg().contiguous()))


def _trips(tensors: Iterable[torch.Tensor], most: int) -> "Iterator[list[tuple[torch.Tensor, int]]]":
    """Parts of tensors that fill a buffer together, each with its place."""
    trip: list[tuple[torch.Tensor, int]] = []
    top = 0
    for tensor in tensors:
        for part in _parts(tensor.detach(), most):
            if top + part.nbytes > most:
                yield trip
                trip, top = [], 0
            trip.append((part, top))
            top += part.nbytes
    if trip:
        yield trip


def _parts(tensor: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """A tensor in parts of its leading axes that follow one another in row-major order."""
    if not tensor.nbytes:
        return
    if tensor.nbytes <= most:
        yield tensor
    elif tensor.is_contiguous() and tensor.ndim > 1:
        yield from _parts(tensor.view(-1), most)
    else:
        rows = most * len(tensor) // tensor.nbytes
        for part in torch.split(tensor, rows) if rows else tensor.unbind():
            yield from _parts(part, most)
