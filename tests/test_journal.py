"""Folders in which a save was not finished: what readers take, what the next save clears, and who may write at all."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

import funcmodel as fm
from funcmodel.core.journal import JOURNAL, LOCK, Journal, Survey, parse_journal, render_journal, side
from funcmodel.errors import (
    AmbiguousCheckpointError,
    BusyError,
    CheckpointError,
    PlanError,
    SaveError,
    StalePlanError,
)
from funcmodel.records.expressions import Live
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.existing import existing_checkpoint
from funcmodel.run.faults import Crash, changes, counted, faulty
from funcmodel.run.filesystem import REAL
from funcmodel.run.journal import fingerprints, standing
from funcmodel.run.locks import FolderLocks
from tests.transitions import QUICK

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD = {key: torch.full((8,), float(i)) for i, key in enumerate("abc")}
NEW = {key: tensor + 10 for key, tensor in OLD.items()}
MANY = 32  # bytes: a shard per tensor


def values(folder: Path) -> dict[str, float]:
    return {key: tensor[0].item() for key, tensor in fm.materialize(fm.scan(folder)).items()}


def value(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    return {key: tensor[0].item() for key, tensor in tensors.items()}


def died(folder: Path, before: int | None, after: int | None, call: str, name: str, nth: int = 1) -> None:
    """A folder whose writer died right before it did `call` to the file `name`, for the `nth` time."""
    fm.save(OLD, folder, max_shard_size=before, config={"v": "old"})
    probe = folder.with_name("probe")
    fm.save(OLD, probe, max_shard_size=before, config={"v": "old"})
    filesystem, trace = counted(REAL)
    fm.save(NEW, probe, max_shard_size=after, config={"v": "new"}, filesystem=filesystem)
    steps = [c for c in trace if changes(c)]
    hits = [i for i, c in enumerate(steps, 1) if c.name == call and name in (os.path.basename(p) for p in _paths(c))]
    dying = faulty(REAL, hits[nth - 1], "die")
    with pytest.raises(Crash):
        fm.save(NEW, folder, max_shard_size=after, config={"v": "new"}, filesystem=dying)


def _paths(call: object) -> list[str]:
    return [call.path, *(d for d in call.detail if isinstance(d, str))]  # type: ignore[attr-defined]


def test_a_single_file_and_an_index_are_told_apart_by_a_fitting_journal_alone(tmp_path: Path) -> None:
    died(tmp_path / "a", None, MANY, "unlink", SINGLE)
    assert {SINGLE, INDEX, JOURNAL} <= set(os.listdir(tmp_path / "a"))
    assert values(tmp_path / "a") == value(OLD)
    assert INDEX in fm.scan_checkpoint(tmp_path / "a").ignored
    (tmp_path / "a" / JOURNAL).unlink()
    with pytest.raises(AmbiguousCheckpointError):
        fm.scan(tmp_path / "a")


def test_after_the_rename_of_the_single_file_the_old_index_no_longer_counts(tmp_path: Path) -> None:
    died(tmp_path / "a", MANY, None, "unlink", INDEX)
    assert {SINGLE, INDEX, JOURNAL} <= set(os.listdir(tmp_path / "a"))
    assert values(tmp_path / "a") == value(NEW)


def test_a_text_that_has_not_its_name_yet_is_read_where_it_waits(tmp_path: Path) -> None:
    died(tmp_path / "a", None, None, "replace", "config.json")
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == {"v": "old"}
    assert values(tmp_path / "a") == value(NEW)
    assert fm.scan_checkpoint(tmp_path / "a").config == fm.Config({"v": "new"})


def test_a_load_leaves_what_it_finds(tmp_path: Path) -> None:
    died(tmp_path / "a", None, MANY, "unlink", SINGLE)
    before = {path.name: path.stat() for path in (tmp_path / "a").iterdir()}
    values(tmp_path / "a")
    fm.scan_checkpoint(tmp_path / "a")
    after = {path.name: path.stat() for path in (tmp_path / "a").iterdir()}
    assert before.keys() == after.keys()
    assert all(before[name].st_mtime_ns == after[name].st_mtime_ns for name in before)


@pytest.mark.parametrize(("before", "after"), [(None, MANY), (MANY, None), (MANY, MANY)])
@pytest.mark.parametrize("last", [None, MANY])
def test_the_next_save_clears_what_was_left(
    tmp_path: Path, before: int | None, after: int | None, last: int | None
) -> None:
    died(tmp_path / "a", before, after, "unlink", JOURNAL)
    (tmp_path / "a" / ".fm-0000-00000.part").write_bytes(b"another one")
    fm.save(OLD, tmp_path / "a", max_shard_size=last)
    assert values(tmp_path / "a") == value(OLD)
    assert len(os.listdir(tmp_path / "a")) == (2 if last is None else 5)


def test_a_save_that_was_taken_back_leaves_the_conventional_names_free(tmp_path: Path) -> None:
    died(tmp_path / "a", None, MANY, "unlink", SINGLE)
    fm.save(NEW, tmp_path / "a", max_shard_size=MANY)
    assert "model-00001-of-00003.safetensors" in os.listdir(tmp_path / "a")


def test_only_files_that_are_what_the_journal_says_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    died(folder, MANY, None, "unlink", INDEX)
    mine = folder / "model-00002-of-00003.safetensors"
    mine.write_bytes(b"somebody put this here since")
    fm.save(OLD, folder)
    assert mine.read_bytes() == b"somebody put this here since"
    assert values(folder) == value(OLD)


def test_a_journal_that_does_not_fit_decides_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    died(folder, None, MANY, "unlink", SINGLE)
    other = {key: tensor[:2].clone() for key, tensor in OLD.items()}
    fm.save(other, tmp_path / "b")
    os.replace(tmp_path / "b" / SINGLE, folder / SINGLE)  # a writer that knows no journals
    assert standing(str(folder)).holds is None
    with pytest.raises(AmbiguousCheckpointError):
        fm.scan(folder)
    fm.save(NEW, folder)
    assert values(folder) == value(NEW)
    assert JOURNAL not in os.listdir(folder)


@pytest.mark.parametrize(
    "kind", ["empty", "text", "list", "deep", "fifo", "folder", "link", "outside", "newer", "lies"]
)
def test_a_journal_is_not_trusted(tmp_path: Path, kind: str) -> None:
    folder, outside = tmp_path / "a", tmp_path / "outside.safetensors"
    fm.save(OLD, folder, config={"v": "old"})
    outside.write_bytes((folder / SINGLE).read_bytes())
    where = folder / JOURNAL
    mark = "0" * 32
    journal = {"funcmodel_save": 1, "commit": SINGLE, "by": "rename", "head": SINGLE, "new": {SINGLE: mark}}
    match kind:
        case "empty":
            where.write_bytes(b"")
        case "text":
            where.write_bytes(b"\x00\xff")
        case "list":
            where.write_text("[]")
        case "deep":
            where.write_text("[" * 100_000)
        case "fifo":
            os.mkfifo(where)
        case "folder":
            where.mkdir()
        case "link":
            where.symlink_to("/dev/zero")
        case "outside":
            where.write_text(json.dumps({**journal, "old": {"../outside.safetensors": mark}}))
        case "newer":
            where.write_text(json.dumps({**journal, "funcmodel_save": 3}))
        case "lies":
            found = standing(str(folder)).journal
            assert found is None
            where.write_text(json.dumps({**journal, "old": {"config.json": mark, SINGLE: mark}}))
    assert values(folder) == value(OLD)
    if kind != "folder":
        fm.save(NEW, folder)
        assert values(folder) == value(NEW)
        assert not where.exists()
    assert outside.exists()
    assert (folder / "config.json").exists()


@pytest.mark.parametrize("name", ["../m", "/m", "a/../m", "", "a\\m", "c:m"])
def test_a_journal_names_files_of_its_folder(name: str) -> None:
    good = Journal(commit="m", by="rename", head="m", new=FrozenMap({"m": "1"}))
    assert parse_journal(render_journal(good).encode()) == good
    for bad in (
        evolve(good, commit=name),
        evolve(good, old=FrozenMap({name: "1"})),
        evolve(good, new=FrozenMap({"m": "1", name: "1"})),
        evolve(good, parts=FrozenMap({"m": "config.json"})),
        evolve(good, head="n"),
    ):
        with pytest.raises(CheckpointError):
            parse_journal(render_journal(bad).encode())


def test_a_copy_without_hidden_files_is_no_longer_decided(tmp_path: Path) -> None:
    journal = Journal(commit="s", by="removal", head="i", old=FrozenMap({"s": "1"}), new=FrozenMap({"i": "2"}))
    assert side(journal, Survey(found=FrozenMap(s="1", i="2"))) == "old"
    assert side(journal, Survey(found=FrozenMap(s="1"), waiting=FrozenMap(i=0))) == "old"
    assert side(journal, Survey(found=FrozenMap(i="2"))) == "new"
    assert side(journal, Survey()) is None
    assert side(journal, Survey(found=FrozenMap(s="3", i="2"))) is None


# -- locks -----------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    fm.save(OLD, tmp_path)
    locks = FolderLocks(REAL)
    assert locks.take(str(tmp_path))
    assert not locks.take(str(tmp_path))
    (tmp_path / ".fm-live-00000.part").write_bytes(b"of the writer that lives")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(BusyError) as raised:
        fm.save(NEW, tmp_path)
    assert raised.value.committed == "no"
    assert str(os.getpid()) in raised.value.owner
    assert sorted(os.listdir(tmp_path)) == before
    locks.release()
    fm.save(NEW, tmp_path)
    assert values(tmp_path) == value(NEW)
    assert os.listdir(tmp_path) == [SINGLE]


def test_a_lock_whose_owner_died_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("not what we write")
    fm.save(NEW, tmp_path)
    assert os.listdir(tmp_path) == [SINGLE]


def test_a_lock_that_is_given_back_while_it_is_opened_is_tried_again(tmp_path: Path) -> None:
    taken = []

    def flock(fd: int) -> bool:
        if not taken:
            taken.append(fd)
            os.unlink(tmp_path / LOCK)
        return REAL.flock(fd)

    locks = FolderLocks(evolve(REAL, flock=flock))
    assert locks.take(str(tmp_path))
    with pytest.raises(BusyError):
        FolderLocks(REAL).take(str(tmp_path))
    locks.release()
    assert os.listdir(tmp_path) == []


def test_a_writer_that_follows_a_link_owns_that_folder_too(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "out").mkdir()
    fm.save(OLD, tmp_path / "store")
    (tmp_path / "out" / SINGLE).symlink_to(tmp_path / "store" / SINGLE)
    locks = FolderLocks(REAL)
    locks.take(str(tmp_path / "store"))
    with pytest.raises(BusyError):
        fm.save(NEW, tmp_path / "out")
    locks.release()
    fm.save(NEW, tmp_path / "out")
    assert values(tmp_path / "store") == value(NEW)
    assert os.listdir(tmp_path / "store") == os.listdir(tmp_path / "out") == [SINGLE]


def test_threads_that_save_into_one_folder_leave_one_whole_checkpoint(tmp_path: Path) -> None:
    outcomes: list[int | BusyError] = []
    barrier = threading.Barrier(6)

    def run(i: int) -> None:
        barrier.wait()
        try:
            fm.save({key: tensor + 100 * i for key, tensor in OLD.items()}, tmp_path, max_shard_size=MANY)
            outcomes.append(i)
        except BusyError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [i for i in outcomes if isinstance(i, int)]
    assert len(outcomes) == 6
    assert winners
    assert values(tmp_path) in [{key: v + 100 * i for key, v in value(OLD).items()} for i in winners]
    assert len(os.listdir(tmp_path)) == 4


def test_shards_that_nobody_lists_are_kept_and_avoided(tmp_path: Path) -> None:
    stray = tmp_path / "model-00001-of-00003.safetensors"
    stray.write_bytes(b"left by another library")
    fm.save(NEW, tmp_path, max_shard_size=MANY)
    assert stray.read_bytes() == b"left by another library"
    assert values(tmp_path) == value(NEW)


# -- what is not ours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["elsewhere", "."])
def test_what_lies_behind_a_linked_subfolder_is_never_removed(tmp_path: Path, target: str) -> None:
    folder, other = tmp_path / "a", tmp_path / "elsewhere"
    fm.save(OLD, other)
    folder.mkdir()
    (folder / "sub").symlink_to(other if target == "elsewhere" else folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(OLD, f"sub/{SINGLE}")}))
    fm.save(NEW, folder)
    assert values(folder) == value(NEW)
    assert values(other) == value(OLD)


def test_a_hostile_journal_removes_and_plants_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    fm.save(OLD, folder)
    (folder / ".git" / "hooks").mkdir(parents=True)
    victims = [folder / "LICENSE", folder / ".git" / "HEAD"]
    for path in victims:
        path.write_text("content that everybody knows")
    (folder / ".fm-1.part").write_text("#!/bin/sh")
    held = [SINGLE, "LICENSE", ".git/HEAD", ".fm-1.part"]
    marks = fingerprints(str(folder), frozenset(held))
    lies = {
        **{"funcmodel_save": 1, "commit": SINGLE, "by": "rename", "head": SINGLE, "new": {SINGLE: marks[SINGLE]}},
        **{"old": {"LICENSE": marks["LICENSE"]}, "parts": {}},
    }
    hidden = {**lies, "old": {".git/HEAD": marks[".git/HEAD"]}}
    planted = {
        **lies,
        "new": {SINGLE: marks[SINGLE], ".git/hooks/pre-commit": marks[".fm-1.part"]},
        "parts": {".git/hooks/pre-commit": ".fm-1.part"},
    }
    for journal in (lies, hidden, planted):
        (folder / JOURNAL).write_text(json.dumps(journal))
        fm.save(NEW, folder)
        assert values(folder) == value(NEW)
        assert all(path.exists() for path in victims)
        assert os.listdir(folder / ".git" / "hooks") == []


def test_beside_a_single_file_an_old_index_survives_a_save_that_fails(tmp_path: Path) -> None:
    def both(folder: Path) -> None:
        fm.save(OLD, folder, max_shard_size=MANY)
        fm.save({key: tensor + 5 for key, tensor in OLD.items()}, tmp_path / "single")
        (folder / SINGLE).write_bytes((tmp_path / "single" / SINGLE).read_bytes())  # as transformers leaves it

    for at in range(1, 200):
        folder = tmp_path / f"{at}"
        both(folder)
        filesystem, trace = counted(faulty(REAL, at, errno.EIO))
        try:
            fm.save(NEW, folder, max_shard_size=MANY, filesystem=filesystem)
        except SaveError as error:
            if error.committed == "no":
                found = fm.materialize(fm.scan(folder, which="index"))
                assert {key: tensor[0].item() for key, tensor in found.items()} == value(OLD)
                continue
        if all(call.outcome in ("", "FileNotFoundError") for call in trace):
            break
    assert values(folder) == value(NEW)
    assert len(os.listdir(folder)) == 4


def test_shards_of_another_writer_that_appear_meanwhile_are_not_replaced(tmp_path: Path) -> None:
    fm.save(OLD, tmp_path)
    stray = tmp_path / "model-00001-of-00003.safetensors"

    def appear(fd: int, buffers: object, offset: int) -> int:
        stray.write_bytes(b"of a writer that knows no locks")
        return REAL.pwritev(fd, buffers, offset)  # type: ignore[arg-type]

    plan = fm.plan_save(fm.scan(tmp_path), max_shard_size=MANY, existing=existing_checkpoint(tmp_path))
    with pytest.raises(StalePlanError):
        fm.apply(plan, tmp_path, filesystem=evolve(REAL, pwritev=appear))
    assert stray.read_bytes() == b"of a writer that knows no locks"
    assert values(tmp_path) == value(OLD)


@pytest.mark.parametrize("variant", ["fp16", "a.b", "index", "index.json", "5", "v1.0"])
def test_a_variant_with_dots_replaces_itself(tmp_path: Path, variant: str) -> None:
    fm.save(OLD, tmp_path)
    for limit in (MANY, None, MANY, MANY, None):
        fm.save(NEW, tmp_path, variant=variant, max_shard_size=limit)
        found = fm.materialize(fm.scan(tmp_path, variant=variant))
        assert {key: tensor[0].item() for key, tensor in found.items()} == value(NEW)
        assert values(tmp_path) == value(OLD)
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("variant", ["safetensors", "safetensors.index", "x.safetensors", "a-00001-of-00001"])
def test_a_variant_that_would_be_read_as_another_name_is_refused(tmp_path: Path, variant: str) -> None:
    with pytest.raises(PlanError):
        fm.save(NEW, tmp_path, variant=variant)
    assert os.listdir(tmp_path) == []


def test_an_interrupt_behind_the_commit_still_renames_a_text_that_is_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    fm.save(OLD, folder, config={"v": "old"})
    (tmp_path / "texts").mkdir()
    os.replace(folder / "config.json", tmp_path / "texts" / "c")
    (folder / "config.json").symlink_to(tmp_path / "texts" / "c")
    struck = []

    def replace(source: str, target: str) -> None:
        if target.endswith("/c") and not struck:
            struck.append(target)
            raise KeyboardInterrupt
        REAL.replace(source, target)

    with pytest.raises(KeyboardInterrupt):
        fm.save(NEW, folder, config={"v": "new"}, filesystem=evolve(REAL, replace=replace))
    assert values(folder) == value(NEW)
    assert json.loads((folder / "config.json").read_text()) == {"v": "new"}
    assert sorted(os.listdir(folder)) == ["config.json", SINGLE]


def test_a_lock_that_was_removed_by_hand_is_not_given_back_twice(tmp_path: Path) -> None:
    first, second = FolderLocks(REAL), FolderLocks(REAL)
    first.take(str(tmp_path))
    os.unlink(tmp_path / LOCK)
    second.take(str(tmp_path))
    first.release()
    with pytest.raises(BusyError):
        FolderLocks(REAL).take(str(tmp_path))
    second.release()
    assert os.listdir(tmp_path) == []


def test_an_index_that_is_too_large_to_read_lists_nothing(tmp_path: Path) -> None:
    (tmp_path / INDEX).touch()
    os.truncate(tmp_path / INDEX, 20 << 30)
    fm.save(NEW, tmp_path)
    assert values(tmp_path) == value(NEW)
    assert os.listdir(tmp_path) == [SINGLE]


# -- whose file it is ------------------------------------------------------------------------------------------------


def rewritten(path: Path) -> bytes:
    """Another tool writes other values in place: the header stays what it was."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([data[-1] ^ 1]))
    os.utime(path, ns=(10**18, path.stat().st_mtime_ns + 10**9))
    return path.read_bytes()


def test_without_its_part_an_old_file_is_not_taken_for_the_new_one_of_the_same_header(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    died(folder, None, None, "replace", SINGLE)
    (part,) = (p for p in folder.glob(".fm-*") if p.stat().st_size > 100)
    part.unlink()  # by hand, or by a save through a link
    assert standing(str(folder)).holds == "old"
    assert fm.scan_checkpoint(folder).config == fm.Config({"v": "old"})
    fm.save(OLD, folder)
    assert json.loads((folder / "config.json").read_text()) == {"v": "old"}


@pytest.mark.parametrize("victim", [INDEX, "model-00002-of-00003.safetensors"])
def test_what_another_tool_has_written_since_is_not_removed(tmp_path: Path, victim: str) -> None:
    folder = tmp_path / "a"
    died(folder, MANY, None, "unlink", INDEX)
    data = rewritten(folder / victim)
    if victim == INDEX:  # then there are two checkpoints, for readers and for the save, which replaces both
        with pytest.raises(CheckpointError):
            fm.scan(folder)
    fm.save(OLD, folder)
    assert ((folder / victim).read_bytes() == data) if victim != INDEX else not (folder / victim).exists()
    assert values(folder) == value(OLD)


def test_a_new_shard_that_another_tool_has_written_since_is_not_taken_back(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    died(folder, None, MANY, "unlink", SINGLE)
    data = rewritten(folder / "model-00002-of-00003.safetensors")
    assert values(folder) == value(OLD)
    fm.save(NEW, folder)
    assert (folder / "model-00002-of-00003.safetensors").read_bytes() == data
    assert values(folder) == value(NEW)


@pytest.mark.parametrize(
    ("before", "after", "call", "name"), [(None, MANY, "unlink", SINGLE), (MANY, None, "unlink", INDEX)]
)
@pytest.mark.parametrize("kept", [False, True])
def test_a_copy_of_a_folder_is_what_the_folder_was(
    tmp_path: Path, before: int | None, after: int | None, call: str, name: str, kept: bool
) -> None:
    died(tmp_path / "a", before, after, call, name)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy2 if kept else shutil.copyfile)
    assert values(tmp_path / "b") == value(OLD if before is None else NEW)
    fm.save(NEW, tmp_path / "b")
    assert values(tmp_path / "b") == value(NEW)
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", SINGLE]


def test_a_journal_of_the_first_version_is_still_read(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    died(folder, MANY, None, "unlink", INDEX)
    journal = json.loads((folder / JOURNAL).read_bytes())
    del journal["old_times"], journal["new_times"]
    (folder / JOURNAL).write_text(json.dumps({**journal, "funcmodel_save": 1}))
    assert values(folder) == value(NEW)
    fm.save(OLD, folder)
    assert sorted(os.listdir(folder)) == ["config.json", SINGLE]


@pytest.mark.parametrize(
    "times", [{"m": True}, {"m": 1.0}, {"m": 2**63}, {"m": -(2**63) - 1}, {"n": 1}, [1], {"m": "1"}]
)
@pytest.mark.parametrize("field", ["old_times", "new_times"])
def test_the_times_in_a_journal_are_numbers_of_files_that_it_names(field: str, times: object) -> None:
    good = Journal(commit="m", by="rename", head="m", old=FrozenMap(m="1"), new=FrozenMap(m="1"))
    rendered = json.loads(render_journal(good))
    assert parse_journal(json.dumps({**rendered, field: {"m": -(2**63)}}).encode())
    with pytest.raises(CheckpointError):
        parse_journal(json.dumps({**rendered, field: times}).encode())


@given(
    *[st.sampled_from("12")] * 2,
    *[st.sampled_from([None, 1, 2])] * 3,
    st.sampled_from([None, "1", "2", "3"]),
    st.booleans(),
)
def test_a_time_decides_only_where_one_side_alone_has_it(
    old: str, new: str, old_time: int | None, new_time: int | None, time: int | None, found: str | None, waits: bool
) -> None:
    def table(value: object) -> FrozenMap[str, object]:
        return FrozenMap() if value is None else FrozenMap(m=value)

    plain = Journal(commit="m", by="rename", head="m", old=table(old), new=table(new))  # type: ignore[arg-type]
    timed = evolve(plain, old_times=table(old_time), new_times=table(new_time))
    bare = Survey(found=table(found), waiting=table(9 if waits else None))  # type: ignore[arg-type]
    seen = evolve(bare, times=table(time if found else None))
    is_old, is_new = (time is not None and (found, time) == mark for mark in ((old, old_time), (new, new_time)))
    if is_old != is_new:
        assert side(timed, seen) == ("old" if is_old else "new")
    else:
        assert side(timed, seen) == side(plain, bare)


def test_a_text_that_starts_with_zeros_is_told_from_another_by_all_of_it(tmp_path: Path) -> None:
    for name, text in (("a.json", b"\0" * 8 + b"one"), ("b.json", b"\0" * 8 + b"two")):
        (tmp_path / name).write_bytes(text)
    marks = fingerprints(str(tmp_path), frozenset({"a.json", "b.json"}))
    assert marks["a.json"] != marks["b.json"]


def test_a_text_that_starts_with_zeros_is_saved(tmp_path: Path) -> None:
    for word in ("one", "two"):
        fm.save(OLD, tmp_path, texts={"notes.json": "\0" * 8 + word})
        assert (tmp_path / "notes.json").read_text() == "\0" * 8 + word


# -- texts elsewhere -------------------------------------------------------------------------------------------------


def text_elsewhere(tmp_path: Path) -> tuple[Path, Path]:
    """A folder whose save died before its config, a link into another folder, had its name; and that other folder."""
    folder, texts = tmp_path / "a", tmp_path / "texts"
    fm.save(OLD, folder, config={"v": "old"})
    texts.mkdir()
    os.replace(folder / "config.json", texts / "c.json")
    (folder / "config.json").symlink_to(texts / "c.json")

    def replace(source: str, target: str) -> None:
        if target.endswith("/c.json"):
            raise OSError(errno.EIO, "refused")
        REAL.replace(source, target)

    with pytest.raises(SaveError) as raised:
        fm.save(NEW, folder, config={"v": "new"}, filesystem=evolve(REAL, replace=replace))
    assert raised.value.committed == "yes"
    return folder, texts


def test_the_next_save_finishes_a_text_that_a_link_leads_to(tmp_path: Path) -> None:
    folder, texts = text_elsewhere(tmp_path)
    (texts / ".fm-other-00000.part").write_bytes(b"of another writer that died")
    assert json.loads((texts / "c.json").read_text()) == {"v": "old"}
    assert fm.scan_checkpoint(folder, symlinks="follow").config == fm.Config({"v": "new"})
    fm.save(OLD, folder)
    assert json.loads((texts / "c.json").read_text()) == {"v": "new"}
    assert os.listdir(texts) == ["c.json"]
    assert sorted(os.listdir(folder)) == ["config.json", SINGLE]


def test_a_text_elsewhere_is_finished_under_the_lock_of_its_folder(tmp_path: Path) -> None:
    folder, texts = text_elsewhere(tmp_path)
    locks = FolderLocks(REAL)
    locks.take(str(texts))
    with pytest.raises(BusyError):
        fm.save(OLD, folder)
    assert json.loads((texts / "c.json").read_text()) == {"v": "old"}
    locks.release()
    fm.save(OLD, folder)
    assert json.loads((texts / "c.json").read_text()) == {"v": "new"}


def test_only_what_the_journal_staged_is_put_elsewhere(tmp_path: Path) -> None:
    folder, texts = text_elsewhere(tmp_path)
    (part,) = texts.glob(".fm-*")
    os.utime(part, ns=(1, 1))  # of the same bytes, and not the one
    fm.save(OLD, folder)
    assert json.loads((texts / "c.json").read_text()) == {"v": "old"}


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [219, 243, 244])
def test_a_name_that_can_be_saved_once_can_be_saved_again(tmp_path: Path, length: int) -> None:
    name = "n" * length
    for limit in (None, None, MANY, MANY, MANY, None):
        plan = fm.plan_save(
            {key: Live(key, TensorSpec(tuple(tensor.shape), "float32")) for key, tensor in NEW.items()},
            name=name,
            max_shard_size=limit,
            existing=existing_checkpoint(tmp_path, name=name),
        )
        before = sorted(os.listdir(tmp_path))
        try:
            fm.apply(plan, tmp_path, live=NEW)
        except PlanError:
            assert sorted(os.listdir(tmp_path)) == before
            assert length > (243 if limit is None else 219)
            continue
        assert length <= (243 if limit is None else 219)
        assert len(os.listdir(tmp_path)) == (1 if limit is None else 4)


@pytest.mark.parametrize(
    "other",
    [
        "adapter_model.safetensors",
        "adapter_model-00001-of-00002.safetensors",
        "model.fp16.safetensors",
        "model.fp16-0a1b2c3d-00001-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors",
    ],
)
@pytest.mark.parametrize("limit", [None, MANY])
def test_an_index_does_not_make_other_checkpoints_its_own(tmp_path: Path, other: str, limit: int | None) -> None:
    fm.save(OLD, tmp_path, max_shard_size=MANY)
    (tmp_path / other).write_bytes(b"not ours")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["x"] = other
    (tmp_path / INDEX).write_text(json.dumps(index))
    fm.save(NEW, tmp_path, max_shard_size=limit)
    assert values(tmp_path) == value(NEW)
    assert (tmp_path / other).read_bytes() == b"not ours"
    assert len(os.listdir(tmp_path)) == (2 if limit is None else 5)


def test_a_hostile_journal_removes_no_adapter(tmp_path: Path) -> None:
    fm.save(OLD, tmp_path)
    adapter = "adapter_model.safetensors"
    (tmp_path / adapter).write_bytes(b"not ours")
    marks = fingerprints(str(tmp_path), frozenset({adapter, SINGLE}))
    journal = Journal(
        commit=SINGLE,
        by="rename",
        head=SINGLE,
        old=FrozenMap({adapter: marks[adapter]}),
        new=FrozenMap({SINGLE: marks[SINGLE]}),
    )
    (tmp_path / JOURNAL).write_text(render_journal(journal))
    fm.save(NEW, tmp_path)
    assert (tmp_path / adapter).exists()


@pytest.mark.parametrize("limit", [None, MANY])
def test_a_single_file_that_is_a_shard_of_an_index_too_is_replaced_without_loss(
    tmp_path: Path, limit: int | None
) -> None:
    def both(folder: Path) -> None:
        fm.save({"a": OLD["a"]}, folder, filesystem=QUICK)
        safetensors.torch.save_file({"b": OLD["b"], "c": OLD["c"]}, folder / "rest.safetensors")
        weight_map = {"a": SINGLE, "b": "rest.safetensors", "c": "rest.safetensors"}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    seen = []
    for at in range(1, 200):
        folder = tmp_path / f"{at}"
        both(folder)
        assert values(folder) == value(OLD)
        try:
            fm.save(NEW, folder, max_shard_size=limit, filesystem=faulty(QUICK, at, "die"))
            break
        except Crash:
            seen.append("old" if values(folder) == value(OLD) else "new")
            assert values(folder) == value(OLD if seen[-1] == "old" else NEW)
        fm.save(OLD, folder, filesystem=QUICK)
        assert values(folder) == value(OLD)
        assert os.listdir(folder) == [SINGLE]
    assert values(folder) == value(NEW)
    assert seen == sorted(seen, reverse=True)
    assert {*seen} == {"old", "new"}


def test_a_save_goes_where_its_folder_was_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fm.save(OLD, tmp_path / "here" / "out", max_shard_size=MANY)

    class Moving(dict[str, torch.Tensor]):
        """Tensors of a caller, another thread of which changes the folder once they are looked at."""

        def items(self):  # type: ignore[no-untyped-def]
            os.chdir(tmp_path / "there")
            return super().items()

    fm.save(Moving(NEW), "out")
    assert os.listdir(tmp_path / "there") == []
    assert os.listdir(tmp_path / "here" / "out") == [SINGLE]
    assert values(tmp_path / "here" / "out") == value(NEW)
