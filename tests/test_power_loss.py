"""What a loss of power leaves of a save, during it and after it, on disks that keep names in order and on others."""

import errno
import os
from collections.abc import Iterator
from typing import get_args

import pytest
from attrs import evolve

from funcmodel.core.journal import JOURNAL, is_part
from funcmodel.errors import SaveError
from funcmodel.records.mapping import FrozenMap
from funcmodel.run.faults import Crash, Disk, changes, counted, faulty, restore
from funcmodel.run.filesystem import FileSystem
from funcmodel.run.powerloss import Model, Recording, power_losses, power_losses_during, simulated
from tests.transitions import CORE, NIGHTLY, QUICK, TRANSITIONS, Transition, folder, prepared, save, seen, unmarked
from tests.verdicts import judged


def recorded(transition: Transition, filesystem: FileSystem = QUICK) -> tuple[Recording, str]:
    """What a save did to the disk, and whether it says to have committed."""
    with prepared(transition) as where:
        watched, recording = simulated(filesystem, where.parent)
        try:
            save(transition, where, watched)
        except SaveError as error:
            return recording, error.committed
        return recording, "yes"


def essence(state: Disk) -> Disk:
    """States that differ only in staged files of which no journal speaks are one to every reader."""
    state = unmarked(state)
    if NIGHTLY or any(os.path.basename(path) == JOURNAL for path in state.files):
        return state
    files = {path: data for path, data in state.files.items() if not is_part(os.path.basename(path))}
    return evolve(state, files=FrozenMap(files))


def verdicts(transition: Transition, states: Iterator[Disk]) -> set[str]:
    """What readers see in each state, the one with the most in it of those that are alike."""
    found = set()
    for state in {essence(state): state for state in states}.values():
        with folder() as root:
            restore(state, root)
            found.add(judged(transition, root / "ckpt"))
    return found


@pytest.mark.parametrize("model", get_args(Model))
@pytest.mark.parametrize("transition", TRANSITIONS, ids=str)
def test_a_loss_of_power_leaves_the_old_or_the_new_checkpoint_and_after_the_save_the_new(
    transition: Transition, model: Model
) -> None:
    recording, _ = recorded(transition)
    assert verdicts(transition, power_losses_during(recording, model)) == {"OLD", "NEW"}
    assert verdicts(transition, power_losses(recording, model)) == {"NEW"}


@pytest.mark.parametrize("transition", TRANSITIONS if NIGHTLY else CORE, ids=str)
def test_what_a_save_said_whose_flush_failed_holds_after_a_loss_of_power(transition: Transition) -> None:
    filesystem, calls = counted(QUICK)
    recorded(transition, filesystem)
    said = set()
    for at in range(1, sum(call.name == "fsync" for call in calls) + 1):
        recording, committed = recorded(
            transition, faulty(QUICK, at, errno.EIO, only=lambda call: call.name == "fsync")
        )
        said.add(committed)
        expected = {"no": {"OLD"}, "yes": {"NEW"}, "unknown": {"OLD", "NEW"}}[committed]
        assert verdicts(transition, power_losses(recording, "B")) <= expected
    assert {"no", "unknown"} <= said


def clearing(recording: Recording) -> Recording:
    """The part of a save in which it puts in order what another one left: up to the first file that it stages."""
    for i, event in enumerate(recording.events):
        if any(is_part(name) and node is not None for name, node in event.names.items()):
            return evolve(recording, events=recording.events[:i])
    return recording


@pytest.mark.parametrize("model", get_args(Model))
@pytest.mark.parametrize("transition", TRANSITIONS if NIGHTLY else CORE, ids=str)
def test_a_loss_of_power_while_a_dead_save_is_cleared_away_harms_neither_side(
    transition: Transition, model: Model
) -> None:
    filesystem, calls = counted(QUICK)
    recorded(transition, filesystem)
    found = set()
    for at in range(1, sum(map(changes, calls)) + 1):
        with prepared(transition) as where:
            with pytest.raises(Crash):
                save(transition, where, faulty(QUICK, at, "die"))
            side = seen(transition, where)
            watched, recording = simulated(QUICK, where.parent)
            save(transition, where, watched)
        states = power_losses_during(clearing(recording), model)
        assert verdicts(transition, states) == {side}
        found.add(side)
    assert found == {"OLD", "NEW"}


@pytest.mark.parametrize("transition", TRANSITIONS if NIGHTLY else CORE[:2], ids=str)
def test_what_a_dead_save_did_not_flush_is_flushed_before_it_is_cleared_away(transition: Transition) -> None:
    filesystem, calls = counted(QUICK)
    recorded(transition, filesystem)
    for at in range(1, sum(map(changes, calls)) + 1):
        with prepared(transition) as where:
            watched, recording = simulated(QUICK, where.parent)
            with pytest.raises(Crash):
                save(transition, where, faulty(watched, at, "die"))
            died = len(recording.events)
            save(transition, where, watched)
        cleared = clearing(evolve(recording, events=recording.events[died:]))
        states = power_losses_during(evolve(recording, events=[*recording.events[:died], *cleared.events]), "B")
        assert verdicts(transition, states) <= {"OLD", "NEW"}
