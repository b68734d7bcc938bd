"""The ring: a few threads, each with buffers and a stream of its own, bring bytes from files to a device.

A thread reads into one buffer while the device still copies the other. Nothing is handed from thread to thread.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import cycle

import torch
from attrs import define

from funcmodel.plan.routing import PINNED
from funcmodel.records.routes import Routing
from funcmodel.run.crew import Crew
from funcmodel.run.engine import Piece, Source, jobs
from funcmodel.run.lanes import Lane, Mark, Stream, lane_to
from funcmodel.run.memory import ALIGNED
from funcmodel.run.passages import Change, Passage, Span, Stop, in_file_order, trips
from funcmodel.run.slabs import alignment


@define(eq=False)
class _Slot:
    """A buffer, and the mark behind the last copy out of it."""

    flat: torch.Tensor | None = None
    mark: Mark = None

    def taken(self, lane: Lane, nbytes: int, pinned: bool) -> torch.Tensor:
        """The buffer, when the device needs nothing of it any more."""
        if self.mark is not None:
            lane.wait(self.mark)
            self.mark = None
        if self.flat is None or len(self.flat) < nbytes:
            self.flat = None  # before the next is there
            self.flat = lane.host(nbytes, pinned)
        return self.flat


@define(eq=False)
class _Desk:
    """What one thread has to itself.

    Attributes:
        slots: its buffers.
        stream: its stream.
        last: the mark behind everything that the stream was given.
    """

    slots: list[_Slot]
    stream: Stream
    last: Mark = None


class Ring:
    """A way for bytes to one device, with its buffers, which are made when they are first needed and kept.

    Args:
        device: where it leads.
        lane: how.
        threads: how many read at most.
        buffers: how many buffers there are at most; a thread has two where they are pinned, or else one, because out of
            memory that is not pinned the device has copied what it needs when the call returns.
        nbytes: bytes of each, a multiple of 64.
        pinned: whether they are.
    """

    def __init__(
        self, device: torch.device, lane: Lane, *, threads: int, buffers: int, nbytes: int, pinned: bool = False
    ) -> None:
        self.device = device
        self.lane = lane
        self.nbytes = nbytes
        self._pinned = pinned
        self._each = 2 if pinned else 1
        self._most = max(1, min(threads, buffers // self._each))
        self._desks: list[_Desk] = []

    @property
    def room(self) -> tuple[int, int]:
        """Bytes of a buffer, and of how many elements a thread may ask torch at once (0: of any number)."""
        return self.nbytes, self.lane.cells

    def run(self, passing: Iterable[Passage]) -> None:
        """Bring everything to its place. What the caller's stream is given afterwards comes after that.

        Whatever is raised, `KeyboardInterrupt` too, no thread still reads and the device still copies nothing when this
        returns.
        """
        work = in_file_order(passing)
        total = sum(one.room + ALIGNED for one in work)
        if not total:
            return
        count = min(self._most, -(-total // self.nbytes))
        while len(self._desks) < count:
            self._desks.append(_Desk([_Slot() for _ in range(self._each)], self.lane.stream()))
        size = min(self.nbytes, -(-total // ALIGNED) * ALIGNED)
        bare = any(type(one) is Change and one.flat is None for one in work)
        # By this thread, on its stream, like the destinations: the others wait for the mark behind all of it.
        scratches = [torch.empty(size if bare else 0, dtype=torch.uint8, device=self.device) for _ in range(count)]
        begun = self.lane.record()
        crew, shared = Crew(), trips(work, self.nbytes, alignment(self.device))
        each = [
            partial(self._carry, desk, crew, shared, begun, size, scratch)
            for desk, scratch in zip(self._desks, scratches, strict=False)
        ]
        try:
            crew.together(each)
        except BaseException:
            # Buffers, scratches and destinations may be let go of only when the device has done with them.
            for desk in self._desks[:count]:
                if desk.last is not None:
                    self.lane.wait(desk.last)
            raise
        for desk in self._desks[:count]:
            self.lane.after(desk.last)

    def _carry(
        self, desk: _Desk, crew: Crew, shared: Iterator[list[Stop]], begun: Mark, size: int, scratch: torch.Tensor
    ) -> None:
        lane = self.lane
        # Destinations may be inference tensors, and whether a thread may write to those is a setting of each thread.
        with lane.using(desk.stream), torch.inference_mode():
            try:
                lane.after(begun)
                for slot in cycle(desk.slots):
                    trip = crew.next(shared)
                    if trip is None:
                        return
                    flat = slot.taken(lane, max(size, _end(trip)), self._pinned)
                    _fill(trip, flat.numpy().data)
                    _send(trip, flat, scratch, lane)
                    slot.mark = lane.record()
            finally:
                desk.last = lane.record()


def ring_to(device: torch.device, routes: Routing) -> Ring:
    """The ring to a device that a routing describes; one of no other size where it describes none."""
    return Ring(
        device,
        lane_to(device),
        threads=routes.threads,
        buffers=routes.buffers or routes.threads,
        nbytes=routes.buffer or PINNED,
        pinned=routes.pinned,
    )


def _end(trip: list[Stop]) -> int:
    one, _, size, start, _ = trip[-1]
    return start + (size if type(one) is Span else one.room)


def _fill(trip: list[Stop], where: memoryview) -> None:
    source: Source | None = None
    pieces: list[Piece] = []
    for one, done, size, start, _ in trip:
        if one.source is not source and source is not None:
            _read(source, pieces)
            pieces = []
        source = one.source
        if type(one) is Span:
            pieces.append((one.first + done, where[start : start + size]))
        elif isinstance(one, Change):
            pieces += one.part.pieces(where[start : start + one.part.nbytes])
    if source is not None:
        _read(source, pieces)


def _read(source: Source, pieces: list[Piece]) -> None:
    for file, offset, views in jobs(source, pieces):
        file.readv_into(views, offset)


def _send(trip: list[Stop], flat: torch.Tensor, scratch: torch.Tensor, lane: Lane) -> None:
    """Give the device everything that is in a buffer."""
    to, at, first, last = scratch, 0, 0, 0  # the copy that is being collected: flat[first:last] to `to[at:]`
    for one, done, size, start, joins in trip:
        if isinstance(one, Change):
            one.recast(flat[start:])
            target, place = (scratch, start) if one.flat is None else (one.flat, 0)
            joins = to is scratch is target and start - last < ALIGNED
        else:
            target, place = one.to, one.at + done
        if not joins or last == first:
            if last > first:
                lane.copy(to[at : at + last - first], flat[first:last])
            to, at, first = target, place, start
        last = start + size
    lane.copy(to[at : at + last - first], flat[first:last])
    for one, _, _, start, _ in trip:
        if isinstance(one, Change) and one.flat is None:
            lane.give(partial(one.settle, scratch[start:]))
