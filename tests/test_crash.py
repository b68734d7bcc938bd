"""A save that dies, or is refused, at each of its calls in turn: readers see the old checkpoint or the new.

The transitions are those of `tests.transitions`; the faults those of `funcmodel.run.faults`. Every state that a fault
leaves is read by funcmodel, by transformers and by safetensors, and then saved over.
"""

import errno
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from funcmodel.core.journal import LOCK, is_part
from funcmodel.errors import NoSpaceError, SaveError
from funcmodel.run.faults import Call, Crash, Fault, changes, counted, disk, every, faulty, intercepted
from tests.transitions import CORE, LEFT, NIGHTLY, QUICK, TRANSITIONS, Transition, found_before, prepared, save, seen
from tests.verdicts import judged

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)

each_transition = pytest.mark.parametrize("transition", TRANSITIONS, ids=str)


@cache
def trace(transition: Transition) -> tuple[Call, ...]:
    """The calls of a save in which nothing goes wrong."""
    with prepared(transition) as where:
        filesystem, calls = counted(QUICK)
        save(transition, where, filesystem)
        assert seen(transition, where) == "NEW"
        return tuple(calls)


def points(transition: Transition) -> range:
    return range(1, sum(map(changes, trace(transition))) + 1)


def struck(
    transition: Transition, at: int, fault: Fault, *, persistent: bool = False, only: object = changes
) -> Iterator[tuple[Path, BaseException | None, list[Call]]]:
    """The folder after a save whose call went wrong, what it raised, and its calls."""
    with prepared(transition) as where:
        filesystem, calls = counted(faulty(QUICK, at, fault, persistent=persistent, only=only))  # type: ignore[arg-type]
        raised: BaseException | None = None
        try:
            save(transition, where, filesystem)
        except (SaveError, Crash) as error:
            raised = error
        yield where, raised, calls


# -- the tests ---------------------------------------------------------------------------------------------------------


def test_there_are_hundreds_of_points() -> None:
    assert sum(len(points(transition)) for transition in TRANSITIONS) >= 500


@each_transition
def test_a_save_without_faults_is_new_to_every_reader(transition: Transition) -> None:
    with prepared(transition) as where:
        save(transition, where)
        assert not [name for name in os.listdir(where) if name.startswith(LEFT)]
        assert judged(transition, where) == "NEW"


@each_transition
def test_a_death_at_any_call_leaves_the_old_or_the_new_checkpoint(transition: Transition) -> None:
    found = []
    for at in points(transition):
        for where, raised, _ in struck(transition, at, "die"):
            assert isinstance(raised, Crash)
            found.append(judged(transition, where))
    turn = found.index("NEW")
    assert set(found[:turn]) == {"OLD"}
    assert set(found[turn:]) == {"NEW"}  # once readers see the new checkpoint, no later death takes it away


# EDQUOT is treated as ENOSPC is, so only some transitions meet both.
ERRORS = [
    pytest.param(transition, code, id=f"{transition}-{errno.errorcode[code]}")
    for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT)
    for transition in (CORE if code == errno.EDQUOT and not NIGHTLY else TRANSITIONS)
]


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from_then_on"])
@pytest.mark.parametrize(("transition", "code"), ERRORS)
def test_an_error_at_any_call_leaves_the_old_or_the_new_checkpoint(
    transition: Transition, code: int, persistent: bool
) -> None:
    committed = set()
    for at in points(transition):
        for where, raised, calls in struck(transition, at, code, persistent=persistent):
            assert any(call.outcome == "OSError" for call in calls)
            left = disk(where).files if where.is_dir() else None  # the verdict is given by saving over it, too
            found = judged(transition, where)
            if raised is None:
                assert found == "NEW"
                continue
            assert isinstance(raised, NoSpaceError if code in FULL_DISK else SaveError)
            committed.add(raised.committed)
            assert found in {"no": {"OLD"}, "yes": {"NEW"}, "unknown": {"OLD", "NEW"}}[raised.committed]
            locking = any(call.name == "flock" and call.outcome for call in calls)  # then it may be another's
            if raised.committed == "no" and not persistent and not locking:
                before = found_before(transition)
                assert left == (before and before.files)  # whatever it was refused, it has cleaned up behind itself
    assert "no" in committed


@pytest.mark.parametrize("transition", TRANSITIONS if NIGHTLY else CORE, ids=str)
def test_an_error_at_a_call_that_only_reads_or_closes_does_no_harm_either(transition: Transition) -> None:
    reading = [call for call in trace(transition) if not changes(call)]
    assert reading
    for at in range(1, len(reading) + 1):
        for where, raised, _ in struck(transition, at, errno.EIO, only=lambda call: not changes(call)):
            found = judged(transition, where)
            committed = getattr(raised, "committed", "yes")
            assert found in {"no": {"OLD"}, "yes": {"NEW"}, "unknown": {"OLD", "NEW"}}[committed]


@each_transition
def test_short_writes_are_continued(transition: Transition) -> None:
    writes = sum(call.name == "pwritev" for call in trace(transition))
    for at in (*range(1, writes + 1), 0):
        for where, raised, calls in struck(transition, max(at, 1), "short", persistent=not at):
            assert raised is None
            assert any(call.outcome == "short" for call in calls)
            assert judged(transition, where) == "NEW"


@each_transition
def test_a_failed_flush_is_never_repeated(transition: Transition) -> None:
    """The kernel has dropped what it could not write: a second fsync would succeed and mean nothing."""
    flushes = sum(call.name == "fsync" for call in trace(transition))
    assert flushes
    for at in range(1, flushes + 1):
        for where, raised, calls in struck(transition, at, errno.EIO, only=lambda call: call.name == "fsync"):
            assert isinstance(raised, SaveError)
            (failed,) = (i for i, call in enumerate(calls) if call.name == "fsync" and call.outcome)
            again = [call for call in calls[failed + 1 :] if call.name == "fsync" and call.path == calls[failed].path]
            if is_part(os.path.basename(calls[failed].path)):  # for a folder there is nothing to throw away
                assert not again
                assert raised.committed == "no"
            assert judged(transition, where) in ("OLD", "NEW")


@pytest.mark.parametrize("transition", TRANSITIONS if NIGHTLY else CORE, ids=str)
def test_an_interrupt_at_any_call_leaves_the_old_or_the_new_checkpoint_and_nothing_else(transition: Transition) -> None:
    before = found_before(transition)
    for at in points(transition):
        count = iter(range(1, 1000))

        def around(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
            if changes(Call(name, "", arguments[1:])) and next(count) == at:  # noqa: B023
                raise KeyboardInterrupt
            return call(*arguments)

        with prepared(transition) as where:
            with pytest.raises(KeyboardInterrupt):
                save(transition, where, intercepted(QUICK, around))
            held = disk(where).files if where.is_dir() else {}
            left = {
                name: data for name, data in held.items() if os.path.basename(name) != LOCK
            }  # a lock that nobody holds is none
            if judged(transition, where) == "OLD":
                assert left == (before.files if before else {})
            else:
                assert not [name for name in left if os.path.basename(name).startswith(LEFT)]


@each_transition
def test_a_save_that_is_dead_from_its_first_call_touches_nothing(transition: Transition) -> None:
    for where, raised, calls in struck(transition, 1, "die", only=every):
        assert isinstance(raised, Crash)
        assert {call.outcome for call in calls} == {"Crash"}
        before = found_before(transition)
        assert (disk(where) if where.exists() else None) == before
