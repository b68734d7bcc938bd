"""A few threads that work for one call and end with it."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import Condition, Thread
from typing import TypeVar

from attrs import define, field

T = TypeVar("T")


@define(eq=False)
class Crew:
    """Threads that take what there is to do from one iterator, until it is empty or one of them has failed.

    No executor: it does not wait for a thread during whose start the caller is interrupted, and that one would go on
    reading into memory, or writing to a descriptor, that is somebody else's by then.
    """

    stopped: bool = field(default=False, init=False)
    _lock: Condition = field(factory=Condition, init=False)
    _busy: int = field(default=0, init=False)
    _errors: list[BaseException] = field(factory=list, init=False)

    def next(self, work: Iterator[T]) -> T | None:
        """The next of what all share, or None when there is nothing left to do."""
        with self._lock:
            return None if self.stopped else next(work, None)

    def stop(self) -> None:
        """Let nobody take anything more."""
        with self._lock:
            self.stopped = True
            self._lock.notify_all()

    def give(self, shelf: deque[T], one: T) -> None:
        """Put something where `take` finds it."""
        with self._lock:
            shelf.append(one)
            self._lock.notify_all()

    def take(self, shelf: deque[T]) -> T | None:
        """What somebody gave, as soon as there is something; None when all is over."""
        with self._lock:
            self._lock.wait_for(lambda: shelf or self.stopped)
            return None if self.stopped else shelf.popleft()

    def together(self, each: Sequence[Callable[[], object]], own: Callable[[], object] | None = None) -> None:
        """Call every function, in a thread of its own where there are several, and wait until all have ended.

        Args:
            each: the functions.
            own: what the calling thread does meanwhile; when it has ended, nobody takes anything more.

        Raises:
            BaseException: the first error of any of them, or the caller's interrupt. No thread works then.
        """
        if len(each) == 1 and own is None:
            each[0]()
            return
        crew = [Thread(target=self._take_part, args=(one,)) for one in each]
        try:
            for thread in crew:
                thread.start()
            if own is not None:
                own()
                self.stop()
            for thread in crew:
                thread.join()
        finally:
            self._end()
            for thread in crew:
                if thread.is_alive():
                    thread.join()
        if self._errors:
            first = self._errors[0]
            self._errors.clear()
            try:
                raise first
            finally:
                del first  # or the error would hold this frame, and this frame the error, and both what it worked on

    def _take_part(self, one: Callable[[], object]) -> None:
        """In a thread. One that begins when all is over does nothing."""
        with self._lock:
            if self.stopped:
                return
            self._busy += 1
        try:
            one()
        except BaseException as error:  # the caller gets it, whatever it is
            self.stopped = True
            self._errors.append(error)
        finally:
            with self._lock:
                self._busy -= 1
                self._lock.notify_all()

    def _end(self) -> None:
        interrupt: BaseException | None = None
        while True:
            try:
                self.stop()
                with self._lock:
                    self._lock.wait_for(lambda: not self._busy)
                break
            except BaseException as error:  # an interrupt, perhaps the second; nobody may leave while threads work
                interrupt = error
        if interrupt is not None:
            try:
                raise interrupt
            finally:
                del interrupt
