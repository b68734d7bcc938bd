"""The harness itself: it finds what is wrong with savers that are known to be wrong, and nothing in a good one."""

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from funcmodel.records.mapping import FrozenMap
from funcmodel.run.faults import Crash, Disk, changes, counted, disk, every, faulty, restore
from funcmodel.run.filesystem import CREATE, FOLDER, REAL, FileSystem
from funcmodel.run.powerloss import power_losses, power_losses_during, simulated

OLD, NEW = b"old old old", b"new new"
OVERWRITE = os.O_RDWR | os.O_CREAT | os.O_TRUNC


def put(fs: FileSystem, path: Path, data: bytes, *, flags: int = CREATE, flush: bool = True) -> None:
    fd = fs.open(str(path), flags, 0o666)
    try:
        fs.pwritev(fd, [memoryview(data)], 0)
        if flush:
            fs.fsync(fd)
    finally:
        fs.close(fd)


def flush(fs: FileSystem, folder: Path) -> None:
    fd = fs.open(str(folder), FOLDER, 0)
    fs.fsync(fd)
    fs.close(fd)


def overwriting(fs: FileSystem, folder: Path) -> None:
    """As torch.save does."""
    put(fs, folder / "a", NEW, flags=OVERWRITE)


def renaming_unflushed(fs: FileSystem, folder: Path) -> None:
    """As safetensors does."""
    put(fs, folder / "t", NEW, flush=False)
    fs.replace(str(folder / "t"), str(folder / "a"))


def renaming(fs: FileSystem, folder: Path) -> None:
    put(fs, folder / "t", NEW)
    fs.replace(str(folder / "t"), str(folder / "a"))


def careful(fs: FileSystem, folder: Path) -> None:
    renaming(fs, folder)
    flush(fs, folder)


def two_files(fs: FileSystem, folder: Path) -> None:
    """As save_pretrained does: one file after the other."""
    for name in ("a", "b"):
        put(fs, folder / f"t{name}", NEW)
        fs.replace(str(folder / f"t{name}"), str(folder / name))
    flush(fs, folder)


Saver = Callable[[FileSystem, Path], None]


def code_of(call: Callable[[], object]) -> int | None:
    """The `errno` of the error that a call raises; None if it raises none."""
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def start(folder: Path) -> Path:
    restore(Disk(FrozenMap({"a": OLD, "b": OLD})), folder)
    return folder


def after_deaths(saver: Saver, at: Path) -> set[tuple[bytes, bytes]]:
    fs, trace = counted(REAL)
    saver(fs, start(at / "0"))
    found = set()
    for n in range(1, sum(map(changes, trace)) + 1):
        where = start(at / str(n))
        with pytest.raises(Crash):
            saver(faulty(REAL, n, "die"), where)
        found.add(((where / "a").read_bytes(), (where / "b").read_bytes()))
    return found


def after_power_losses(saver: Saver, at: Path, model: str) -> tuple[set[bytes], set[bytes]]:
    """What `a` can hold: at any time, and after the saver returned."""
    fs, recording = simulated(REAL, start(at / "x"))
    saver(fs, at / "x")
    during, after = (
        {state.files.get("a", b"gone") for state in losses(recording, model)}  # type: ignore[operator]
        for losses in (power_losses_during, power_losses)
    )
    return during, after


# -- dying -------------------------------------------------------------------------------------------------------------


def test_deaths_tell_a_saver_that_overwrites_from_one_that_renames(tmp_path: Path) -> None:
    assert (b"", OLD) in after_deaths(overwriting, tmp_path / "1")
    assert after_deaths(careful, tmp_path / "2") == {(OLD, OLD), (NEW, OLD)}
    assert (NEW, OLD) in after_deaths(two_files, tmp_path / "3")


def test_a_dead_process_does_nothing_more_and_holds_nothing(tmp_path: Path) -> None:
    held = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    fs = faulty(REAL, 3, "die")
    fd = fs.open(str(tmp_path / "lock"), CREATE, 0o666)
    assert fs.flock(fd)
    with pytest.raises(Crash):
        fs.unlink(str(tmp_path / "lock"))
    for call in (lambda: fs.listdir(str(tmp_path)), lambda: fs.close(fd), lambda: fs.mkdir(str(tmp_path / "d"))):
        with pytest.raises(Crash):
            call()
    assert os.listdir(tmp_path) == ["lock"]
    other = os.open(tmp_path / "lock", os.O_RDWR)
    assert REAL.flock(other)  # which a process that lives would still hold
    os.close(other)
    assert held is None or len(os.listdir("/proc/self/fd")) == held


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_error_strikes_once_or_from_then_on(tmp_path: Path) -> None:
    for persistent, expected in ((False, [None, errno.EIO, None]), (True, [None, errno.EIO, errno.EIO])):
        fs, trace = counted(faulty(REAL, 2, errno.EIO, persistent=persistent))
        paths = [str(tmp_path / f"{name}{persistent}") for name in "xyz"]
        assert [code_of(partial(fs.mkdir, path)) for path in paths] == expected
        assert [call.outcome for call in trace] == ["OSError" if code else "" for code in expected]


def test_only_the_calls_that_are_meant_count(tmp_path: Path) -> None:
    fs = faulty(REAL, 1, errno.EIO, only=lambda call: call.name == "fsync" and call.path.endswith("b"))
    put(fs, tmp_path / "a", NEW)
    assert code_of(lambda: put(fs, tmp_path / "b", NEW)) == errno.EIO
    assert disk(tmp_path).files == {"a": NEW, "b": NEW}
    assert code_of(lambda: faulty(REAL, 1, errno.EIO, only=every).listdir(str(tmp_path))) == errno.EIO
    assert faulty(REAL, 1, errno.EIO).listdir(str(tmp_path))
    with pytest.raises(ValueError):  # noqa: PT011
        faulty(REAL, 0, errno.EIO)


def test_a_close_that_fails_has_closed(tmp_path: Path) -> None:
    fs = faulty(REAL, 1, errno.EIO, only=lambda call: call.name == "close")
    fd = fs.open(str(tmp_path / "a"), CREATE, 0o666)
    assert code_of(lambda: fs.close(fd)) == errno.EIO
    assert code_of(lambda: os.fstat(fd)) == errno.EBADF


def test_a_short_write_writes_the_first_half(tmp_path: Path) -> None:
    fs, trace = counted(faulty(REAL, 2, "short"))
    fd = fs.open(str(tmp_path / "a"), CREATE, 0o666)
    buffers = [memoryview(b"abc"), memoryview(b"defg")]
    assert [fs.pwritev(fd, buffers, at) for at in (0, 7, 14)] == [7, 4, 7]
    fs.close(fd)
    assert (tmp_path / "a").read_bytes() == b"abcdefgabcd\0\0\0abcdefg"
    assert [call.outcome for call in trace if call.name == "pwritev"] == ["", "short", ""]
    assert [call.detail for call in trace if call.name == "pwritev"] == [(0, 7), (7, 7), (14, 7)]


# -- losing power ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["A", "B"])
def test_losses_of_power_tell_savers_apart(tmp_path: Path, model: str) -> None:
    half = NEW[: len(NEW) // 2]
    assert after_power_losses(overwriting, tmp_path / "1", model) == ({OLD, b"", half, NEW}, {NEW})
    assert after_power_losses(renaming_unflushed, tmp_path / "2", model) == ({OLD, b"", half, NEW},) * 2
    assert after_power_losses(renaming, tmp_path / "3", model) == ({OLD, NEW},) * 2
    assert after_power_losses(careful, tmp_path / "4", model) == ({OLD, NEW}, {NEW})


def test_only_a_disk_that_keeps_no_order_swaps_two_names(tmp_path: Path) -> None:
    found = {}
    for model in ("A", "B"):
        fs, recording = simulated(REAL, start(tmp_path / model))
        two_files(fs, tmp_path / model)
        states = power_losses_during(recording, model)  # type: ignore[arg-type]
        found[model] = {(state.files.get("a"), state.files.get("b")) for state in states}
    assert found["A"] == {(OLD, OLD), (NEW, OLD), (NEW, NEW)}
    assert found["B"] == found["A"] | {(OLD, NEW)}


def test_a_flush_that_failed_is_not_made_good_by_a_second(tmp_path: Path) -> None:
    fs, recording = simulated(faulty(REAL, 1, errno.EIO, only=lambda call: call.name == "fsync"), tmp_path)
    fd = fs.open(str(tmp_path / "a"), CREATE, 0o666)
    fs.pwritev(fd, [memoryview(NEW)], 0)
    assert code_of(lambda: fs.fsync(fd)) == errno.EIO
    fs.fsync(fd)
    fs.close(fd)
    flush(fs, tmp_path)
    assert b"" in {state.files["a"] for state in power_losses(recording, "A")}


def test_a_folder_and_what_is_in_it_are_lost_together(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("new/a")
    fs, recording = simulated(REAL, tmp_path)
    fs.mkdir(str(tmp_path / "new"))
    put(fs, tmp_path / "new" / "a", NEW)
    flush(fs, tmp_path / "new")
    states = list(power_losses(recording, "B"))
    assert states == [
        Disk(links=FrozenMap(link="new/a")),
        Disk(FrozenMap({"new/a": NEW}), FrozenMap(link="new/a"), frozenset({"new"})),
    ]
    for i, state in enumerate(states):
        restore(state, tmp_path / f"again{i}")
        assert disk(tmp_path / f"again{i}") == state
    fs.unlink(str(tmp_path / "new" / "a"))
    fs.rmdir(str(tmp_path / "new"))
    flush(fs, tmp_path)
    assert list(power_losses(recording, "B")) == [states[0]]


def test_a_state_can_be_asked_for_at_any_time(tmp_path: Path) -> None:
    fs, recording = simulated(REAL, start(tmp_path / "x"))
    careful(fs, tmp_path / "x")
    at_each = [
        {state.files["a"] for state in power_losses(recording, "B", upto=n)} for n in range(len(recording.events) + 1)
    ]
    assert at_each == [{OLD}] * 4 + [{OLD, NEW}, {NEW}]


def test_a_file_has_the_time_that_belongs_to_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(OLD)
    os.utime(tmp_path / "a", ns=(5, 5))
    filesystem, recording = simulated(REAL, tmp_path)
    fd = filesystem.open(str(tmp_path / "a"), os.O_RDWR, 0)
    filesystem.pwritev(fd, [memoryview(NEW)], 0)
    filesystem.close(fd)
    times = {state.files["a"]: state.times["a"] for state in power_losses(recording)}
    assert times[OLD] == 5
    assert times[(tmp_path / "a").read_bytes()] == (tmp_path / "a").stat().st_mtime_ns
    restore(Disk(FrozenMap(a=OLD), times=FrozenMap(a=times[OLD])), tmp_path / "again")
    assert (tmp_path / "again" / "a").stat().st_mtime_ns == disk(tmp_path / "again").times["a"] == 5
