"""The crew: threads that work for one call, and of which none works when the call has ended."""

import _thread
from collections import deque

import pytest

from funcmodel.run.crew import Crew


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("beside", [False, True])
def test_who_is_interrupted_twice_waits_all_the_same(beside):
    crew, done = Crew(), []

    def work():
        _thread.interrupt_main()
        while not crew.stopped:
            pass
        for _ in range(3):  # while the caller waits for this thread
            _thread.interrupt_main()
            for _ in range(200_000):
                pass
        done.append(True)

    def own():
        while True:
            pass

    with pytest.raises(KeyboardInterrupt):
        crew.together([work, lambda: None], own=own if beside else None)
    assert done == [True]


def test_who_works_beside_the_caller_hands_over_and_ends_with_it():
    crew, given, free = Crew(), deque(), deque(range(2))
    work, used = iter(range(50)), []

    def read():
        while (place := crew.take(free)) is not None and (one := crew.next(work)) is not None:
            crew.give(given, (one, place))

    def use():
        for _ in range(50):
            one, place = crew.take(given)
            used.append(one)
            crew.give(free, place)

    crew.together([read] * 3, own=use)  # one more than there are places, so that one of them waits at the end
    assert sorted(used) == [*range(50)]


def test_an_error_of_another_thread_wakes_the_caller():
    crew, given = Crew(), deque()

    def fail():
        raise ZeroDivisionError

    def use():
        assert crew.take(given) is None

    with pytest.raises(ZeroDivisionError):
        crew.together([fail], own=use)


def test_an_error_of_the_caller_wakes_the_others():
    crew, never = Crew(), deque()

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crew.together([lambda: crew.take(never)] * 2, own=fail)
    assert crew.stopped
