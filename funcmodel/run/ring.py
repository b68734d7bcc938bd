"""The ring: a few threads, each with buffers and streams of its own, bring bytes from files to devices.

A thread reads into one buffer while a device still copies the other. Nothing is handed from thread to thread, and any
thread serves any device, so that several are filled side by side by as many buffers as one would be.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import cycle, groupby
from typing import TypeAlias

import torch
from attrs import Factory, define, frozen

from funcmodel._toolz import interleave
from funcmodel.plan.routing import PINNED
from funcmodel.records.routes import Routing
from funcmodel.run.crew import Crew
from funcmodel.run.direct import DirectFile
from funcmodel.run.engine import Piece, jobs
from funcmodel.run.lanes import Lane, Mark, Stream
from funcmodel.run.memory import ALIGNED, PAGE
from funcmodel.run.passages import Change, Passage, Span, Stop, follows, in_file_order, once, trips
from funcmodel.run.slabs import alignment


@frozen(eq=False)
class _Way:
    """What leads to one device during one run.

    Attributes:
        scratches: memory on it for each desk, for what is changed there; empty where nothing is.
        begun: the mark behind everything that the caller's stream was given before.
    """

    scratches: list[torch.Tensor]
    begun: Mark


_Load: TypeAlias = "tuple[Lane, list[Stop]]"


@define(eq=False)
class _Slot:
    """A buffer, and the marks behind the last copies out of it."""

    flat: torch.Tensor | None = None
    marks: list[tuple[Lane, Mark]] = Factory(list)

    def taken(self, lane: Lane, nbytes: int, pinned: bool) -> torch.Tensor:
        """The buffer, when no device needs anything of it any more."""
        for busy, mark in self.marks:
            busy.wait(mark)
        self.marks = []
        if self.flat is None or len(self.flat) < nbytes:
            self.flat = None  # before the next is there
            self.flat = lane.host(nbytes, pinned)
        return self.flat


@define(eq=False)
class _Desk:
    """What one thread has to itself.

    Attributes:
        slots: its buffers.
        streams: its stream on each device.
        last: the mark behind everything that each of them was given.
    """

    slots: list[_Slot]
    streams: dict[Lane, Stream] = Factory(dict)
    last: dict[Lane, Mark] = Factory(dict)


class Ring:
    """A way for bytes to devices, with its buffers, which are made when they are first needed and kept.

    Args:
        threads: how many read at most.
        buffers: how many buffers there are at most; a thread has two where they are pinned, or else one, because out of
            memory that is not pinned the device has copied what it needs when the call returns.
        nbytes: bytes of each, a multiple of 64.
        pinned: whether they are.
    """

    def __init__(self, *, threads: int, buffers: int, nbytes: int, pinned: bool = False) -> None:
        self.nbytes = nbytes
        self._pinned = pinned
        self._each = 2 if pinned else 1
        self._most = max(1, min(threads, buffers // self._each))
        self._desks: list[_Desk] = []

    def run(self, passing: Mapping[Lane, Iterable[Passage]]) -> None:
        """Bring everything to its place. What the caller's streams are given afterwards comes after that.

        Whatever is raised, `KeyboardInterrupt` too, no thread still reads and no device still copies anything when this
        returns.
        """
        passing = {lane: [*items] for lane, items in passing.items()}
        work = {lane: in_file_order(items) for lane, items in once(passing).items()}
        total = sum(one.room + ALIGNED for items in work.values() for one in items)
        if not total:
            return
        count = min(self._most, -(-total // self.nbytes))
        while len(self._desks) < count:
            self._desks.append(_Desk([_Slot() for _ in range(self._each)]))
        size = min(self.nbytes, -(-total // ALIGNED) * ALIGNED)
        ways = {lane: _way(lane, items, count, size) for lane, items in passing.items()}
        crew, shared = Crew(), interleave([self._loads(lane, items) for lane, items in work.items()])
        each = [partial(self._carry, i, crew, shared, ways, size) for i in range(count)]
        desks = self._desks[:count]
        try:
            crew.together(each)
        except BaseException:
            # Buffers, scratches and destinations may be let go of only when the devices have done with them.
            for desk in desks:
                for lane, mark in desk.last.items():
                    lane.wait(mark)
            raise
        for desk in desks:
            for lane in work:
                if lane in desk.last:
                    lane.after(desk.last[lane])

    def _loads(self, lane: Lane, items: list[Passage]) -> Iterator[_Load]:
        return ((lane, trip) for trip in trips(items, self.nbytes, alignment(lane.device)))

    def _carry(self, number: int, crew: Crew, shared: Iterator[_Load], ways: Mapping[Lane, _Way], size: int) -> None:
        desk = self._desks[number]
        used: set[Lane] = set()

        @contextmanager
        def at_work(lane: Lane) -> Iterator[None]:
            if lane not in desk.streams:
                desk.streams[lane] = lane.stream()
            with lane.using(desk.streams[lane]):
                if lane not in used:
                    used.add(lane)
                    lane.after(ways[lane].begun)
                yield

        # Destinations may be inference tensors, and whether a thread may write to those is a setting of each thread.
        with torch.inference_mode():
            try:
                for slot in cycle(desk.slots):
                    load = crew.next(shared)
                    if load is None:
                        return
                    lane, trip = load
                    flat = slot.taken(lane, max(size, _room(trip)), self._pinned)
                    _fill(trip, flat)
                    for to, stops in ((lane, trip), *_also(trip)):
                        with at_work(to):
                            _send(stops, flat, ways[to].scratches[number], to)
                            slot.marks.append((to, to.record()))
            finally:
                for lane in used:
                    with lane.using(desk.streams[lane]):
                        desk.last[lane] = lane.record()


def _way(lane: Lane, items: Iterable[Passage], count: int, size: int) -> _Way:
    bare = any(type(one) is Change and one.flat is None for one in items)
    # By this thread, on its stream, like the destinations: the others wait for the mark behind all of it.
    scratches = [torch.empty(size if bare else 0, dtype=torch.uint8, device=lane.device) for _ in range(count)]
    return _Way(scratches, lane.record())


def ring_of(routes: Routing) -> Ring:
    """The ring that a routing describes; one of no other size where it describes none."""
    return Ring(
        threads=routes.threads,
        buffers=routes.buffers or routes.threads,
        nbytes=routes.buffer or PINNED,
        pinned=routes.pinned,
    )


def _room(trip: list[Stop]) -> int:
    last = trip[-1]
    end = last.start + (last.size if type(last.one) is Span else last.one.room)
    return -(-end // PAGE) * PAGE if last.direct else end


def _fill(trip: list[Stop], flat: torch.Tensor) -> None:
    where = flat.numpy().data
    for source, stops in groupby(trip, lambda stop: stop.one.source):
        pieces: list[Piece] = []
        for stop in stops:
            if isinstance(stop.one, Change):
                pieces += stop.one.pieces(where[stop.start : stop.start + stop.one.part.nbytes])
            elif not stop.direct:
                pieces.append((stop.offset, where[stop.start : stop.end]))
        for file, offset, views in jobs(source, pieces):
            file.readv_into(views, offset)
    _fill_pages([stop for stop in trip if stop.direct], where)
    for stop in trip:
        if isinstance(stop.one, Change):
            stop.one.recast(flat[stop.start :])


def _fill_pages(stops: list[Stop], where: memoryview) -> None:
    """Read what lies in whole pages; what goes on in the file is one call."""
    while stops:
        first = last = stops.pop(0)
        while stops and stops[0].one.source is last.one.source and stops[0].start == last.end:
            last = stops.pop(0)
        if isinstance(first.one.source, DirectFile):
            first.one.source.read_pages(where, first.start, last.end, first.offset)


def _also(trip: list[Stop]) -> Iterable[tuple[Lane, list[Stop]]]:
    """What of a buffer goes to further places, and how."""
    found: dict[Lane, list[Stop]] = {}
    for stop in trip:
        for lane, one in stop.one.also:
            stops = found.setdefault(lane, [])
            joins = bool(stops) and follows(one, stop, stops[-1], alignment(lane.device))
            stops.append(stop._replace(one=one, joins=joins))
    return found.items()


def _send(trip: list[Stop], flat: torch.Tensor, scratch: torch.Tensor, lane: Lane) -> None:
    """Give the device everything that is in a buffer."""
    to, at, first, last = scratch, 0, 0, 0  # the copy that is being collected: flat[first:last] to `to[at:]`
    for one, done, size, start, joins, _ in trip:
        if isinstance(one, Change):
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
    for one, _, _, start, _, _ in trip:
        if isinstance(one, Change) and one.flat is None:
            lane.give(partial(one.settle, scratch[start:]))
