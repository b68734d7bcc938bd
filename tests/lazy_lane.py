"""A device that does nothing until somebody waits: the worst that a stream may do, made on the CPU."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from funcmodel.run.lanes import Lane
from funcmodel.run.memory import PAGE

Mark = tuple["LazyStream", int]


class LazyStream:
    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.done = 0


class LazyDevice:
    """Streams whose work is done when a mark behind it is waited for, by the host or by another stream; never before.

    What reads out of a buffer that was filled again too early reads what was read into it then; what nobody waits for
    is never done.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.own = threading.local()
        self.main = LazyStream()
        self.sides: list[LazyStream] = []
        self.hosts: list[int] = []
        self.pinned: set[bool] = set()
        self.copies = 0
        self.lane = Lane(
            device=torch.device("cpu"),
            host=self.host,
            stream=self.stream,
            using=self.using,
            copy=self.copy,
            give=self.give,
            record=self.record,
            after=self.after,
            wait=self.wait,
        )

    def host(self, nbytes: int, pinned: bool) -> torch.Tensor:
        with self.lock:
            self.hosts.append(nbytes)
            self.pinned.add(pinned)
        spare = torch.full((nbytes + PAGE,), 0xAB, dtype=torch.uint8)
        start = -spare.data_ptr() % PAGE  # pinned memory starts on a page
        return spare[start : start + nbytes]

    def stream(self) -> LazyStream:
        made = LazyStream()
        self.sides.append(made)
        return made

    @property
    def current(self) -> LazyStream:
        return getattr(self.own, "stream", self.main)

    @contextmanager
    def using(self, stream: LazyStream) -> Iterator[None]:
        before, self.own.stream = self.current, stream
        try:
            yield
        finally:
            self.own.stream = before

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        assert to.dtype == source.dtype == torch.uint8
        assert to.ndim == source.ndim == 1
        assert len(to) == len(source) > 0
        with self.lock:
            self.copies += 1
        self.give(lambda: self._copied(to, source))

    def _copied(self, to: torch.Tensor, source: torch.Tensor) -> None:
        with torch.inference_mode():
            to.copy_(source)

    def give(self, action: Callable[[], None]) -> None:
        with self.lock:
            if getattr(self.own, "running", False):  # what an action of a stream gives belongs to that action
                action()
            else:
                self.current.waiting.append(action)

    def record(self) -> Mark:
        with self.lock:
            return self.current, len(self.current.waiting)

    def after(self, mark: Mark) -> None:
        self.give(lambda: self._reach(mark))

    def wait(self, mark: Mark) -> None:
        with self.lock:
            self._reach(mark)

    def _reach(self, mark: Mark) -> None:
        stream, position = mark
        before, self.own.running = getattr(self.own, "running", False), True
        try:
            while stream.done < position:
                stream.done += 1
                stream.waiting[stream.done - 1]()
        finally:
            self.own.running = before

    def synchronize(self) -> None:
        """What the caller's stream was given is done, and what that waits for."""
        self.wait((self.main, len(self.main.waiting)))

    def idle(self) -> bool:
        """Whether the side streams have nothing left to do."""
        return all(stream.done == len(stream.waiting) for stream in self.sides)
