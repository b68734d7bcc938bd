"""Two writers of one folder: told apart with the kernel's locks and without them, whoever died before, however."""

import errno
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file

import funcmodel as fm
from funcmodel.core.journal import JOURNAL, LOCK, is_part
from funcmodel.errors import BusyError, SaveError, UnsafePathError
from funcmodel.run.faults import Call, changes, counted, disk, faulty, intercepted
from funcmodel.run.filesystem import NO_LOCKS, REAL, FileSystem
from funcmodel.run.locks import HELD, FolderLocks
from funcmodel.run.owners import Owner, current, named
from tests.test_concurrency import at_once
from tests.transitions import QUICK, Transition, folder, prepared, save, seen

SINGLE = "model.safetensors"
OLD, NEW = ({"a": torch.full((3,), value), "b": torch.full((5,), value)} for value in (1.0, 2.0))


def unlockable(code: int = errno.ENOLCK) -> FileSystem:
    """A file system without locks."""

    def flock(fd: int) -> bool:
        raise OSError(code, os.strerror(code))

    return evolve(QUICK, flock=flock)


KINDS = pytest.mark.parametrize("filesystem", [QUICK, unlockable()], ids=["flock", "no_flock"])


def values(where: Path) -> set[float]:
    return {float(value) for tensor in load_file(where / SINGLE).values() for value in tensor}


@contextmanager
def forked(work: Callable[[Callable[[bytes], bytes]], None]) -> Iterator[tuple[int, int, int]]:
    """A process that does some work, its number, and descriptors to read what it says and to answer it.

    `work` gets a function that says something and waits for the answer. The process is killed at the end, and all that
    it forked, for they are a group.
    """
    said, says = os.pipe()
    answered, answers = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setpgid(0, 0)
            os.close(said)
            os.close(answers)
            work(lambda word: (os.write(says, word), os.read(answered, 1))[1])
        finally:
            os._exit(0)
    os.close(says)
    os.close(answered)
    try:
        yield pid, said, answers
    finally:
        os.close(said)
        os.close(answers)
        try:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def taken(locks: FolderLocks, where: Path) -> bool:
    try:
        return locks.take(str(where))
    except BusyError:
        return False


def killed(pid: int, *, reaped: bool = True) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | (0 if reaped else os.WNOWAIT))


# -- who is told what --------------------------------------------------------------------------------------------------


@KINDS
def test_a_second_writer_is_told_who_the_first_is_and_changes_nothing(tmp_path: Path, filesystem: FileSystem) -> None:
    fm.save(OLD, tmp_path)
    first = FolderLocks(filesystem)
    assert first.take(str(tmp_path))
    assert not first.take(str(tmp_path))
    before = disk(tmp_path)
    for _ in range(2):
        with pytest.raises(BusyError) as raised:
            fm.save(NEW, tmp_path, filesystem=filesystem)
        found = raised.value
        assert (found.pid, found.alive, found.holders, found.committed) == (os.getpid(), True, (), "no")
        assert found.path == str(tmp_path)
        assert os.path.exists(found.lock)
        assert disk(tmp_path) == before
    first.release()
    fm.save(NEW, tmp_path, filesystem=filesystem)
    assert os.listdir(tmp_path) == [SINGLE]
    assert values(tmp_path) == {2.0}


@pytest.mark.parametrize("code", sorted(NO_LOCKS))
def test_threads_that_save_where_there_are_no_locks_take_turns(tmp_path: Path, code: int) -> None:
    inside: list[int] = []
    met: list[bool] = []

    def fsync(fd: int) -> None:  # any call of a save that has the lock
        inside.append(fd)
        met.append(len(inside) > 1)
        inside.pop()

    def saves(value: float) -> str:
        said = ""
        for _ in range(5):
            try:
                fm.save({"a": torch.full((9,), value)}, tmp_path, filesystem=evolve(unlockable(code), fsync=fsync))
                said += "saved "
            except BusyError as error:
                said += f"{error.pid} "
        return said

    said = at_once([lambda i=i: saves(i) for i in range(3)])  # type: ignore[misc]
    assert "saved" in {word for words in said for word in words.split()} <= {"saved", str(os.getpid())}
    assert not any(met)
    assert len(values(tmp_path)) == 1
    assert os.listdir(tmp_path) == [SINGLE]


@KINDS
@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_writer_in_another_process_keeps_the_folder_until_it_is_killed(
    tmp_path: Path, filesystem: FileSystem, reaped: bool
) -> None:
    def work(say: Callable[[bytes], bytes]) -> None:
        FolderLocks(filesystem).take(str(tmp_path))
        say(b"taken")

    with forked(work) as (pid, said, _):
        assert os.read(said, 9) == b"taken"
        with pytest.raises(BusyError) as raised:
            fm.save(NEW, tmp_path, filesystem=filesystem)
        assert (raised.value.pid, raised.value.alive) == (pid, True)
        killed(pid, reaped=reaped)
        fm.save(NEW, tmp_path, filesystem=filesystem)
        assert os.listdir(tmp_path) == [SINGLE]


def test_a_lock_that_a_forked_process_inherited_from_a_dead_one_is_named(tmp_path: Path) -> None:
    def work(say: Callable[[bytes], bytes]) -> None:
        locks = FolderLocks(REAL)
        locks.take(str(tmp_path))
        child = os.fork()
        if child:
            say(str(child).encode())
        signal.pause()

    with forked(work) as (pid, said, _):
        child = int(os.read(said, 20))
        killed(pid)
        with pytest.raises(BusyError) as raised:
            fm.save(NEW, tmp_path)
        assert (raised.value.pid, raised.value.alive, raised.value.holders) == (pid, False, (child,))
        os.kill(child, signal.SIGKILL)
        while os.path.exists(f"/proc/{child}/fd") and os.listdir(f"/proc/{child}/fd"):
            os.sched_yield()
        fm.save(NEW, tmp_path)
    assert os.listdir(tmp_path) == [SINGLE]


# -- owners ------------------------------------------------------------------------------------------------------------


def plant(where: Path, owner: Owner, name: str = HELD) -> Path:
    """The lock that a process has left."""
    (where / name).mkdir(parents=True)
    (where / name / owner.name("0" * 16)).touch()
    return where / name


def dead() -> Owner:
    """A process of this machine that has ended."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return evolve(current(), pid=pid)


def test_an_owner_is_known_by_name() -> None:
    me = current()
    assert named(me.name("0123456789abcdef")) == me
    assert me.alive() is True
    assert me.host == socket.gethostname()
    assert dead().alive() is False
    assert evolve(me, started="1").alive() is False  # another process had the number
    assert evolve(me, pid=1, started="").alive() is True
    assert evolve(me, pid=10**9).alive() is False
    assert evolve(me, machine="00000000").alive() is None
    assert evolve(dead(), machine="00000000").alive() is None
    for name in ("", "1", "model.safetensors", me.name("0"), me.name("0" * 16) + "/x"):
        assert named(name) is None


def test_the_lock_of_another_machine_is_left_until_it_is_removed(tmp_path: Path) -> None:
    lock = plant(tmp_path, evolve(dead(), machine="00000000", host="elsewhere"))
    with pytest.raises(BusyError) as raised:
        fm.save(NEW, tmp_path, filesystem=unlockable())
    assert (raised.value.alive, raised.value.host, raised.value.lock) == (None, "elsewhere", str(lock))
    shutil.rmtree(lock)
    fm.save(NEW, tmp_path, filesystem=unlockable())
    assert os.listdir(tmp_path) == [SINGLE]


def test_a_lock_with_strange_content_is_left_until_it_is_removed(tmp_path: Path) -> None:
    lock = plant(tmp_path, dead())
    (lock / "notes.txt").write_text("mine")
    with pytest.raises(BusyError) as raised:
        fm.save(NEW, tmp_path, filesystem=unlockable())
    assert (raised.value.owner, raised.value.lock) == (None, str(lock))
    assert (lock / "notes.txt").read_text() == "mine"


def test_what_the_dead_have_left_aside_is_removed_and_what_others_prepare_is_not(tmp_path: Path) -> None:
    gone, other = dead(), evolve(current(), machine="00000000")
    plant(tmp_path, gone, f"{HELD}.{gone.name('0' * 16)}")
    kept = plant(tmp_path, other, f"{HELD}.{other.name('0' * 16)}")
    fm.save(NEW, tmp_path, filesystem=unlockable())
    assert set(os.listdir(tmp_path)) == {SINGLE, kept.name}


# -- taking over -------------------------------------------------------------------------------------------------------


def test_of_eight_processes_that_find_a_dead_owner_one_gets_the_lock(tmp_path: Path) -> None:
    owner = dead()
    gate, opened = os.pipe()
    ready, told = os.pipe()
    for attempt in range(5):
        where = tmp_path / str(attempt)
        plant(where, owner)
        done, hold = os.pipe()
        children = []
        for _ in range(8):
            child = os.fork()
            if not child:
                code = 3
                try:
                    os.close(hold)
                    os.write(told, b".")
                    os.read(gate, 1)
                    FolderLocks(unlockable()).take(str(where))
                    code = 1
                except BusyError:
                    code = 2
                finally:
                    os.write(told, str(code).encode())
                    os.read(done, 1)  # nobody ends before all have tried
                    os._exit(0)
            children.append(child)
        assert "".join(os.read(ready, 1).decode() for _ in range(8)) == "." * 8
        os.write(opened, b"." * 8)
        codes = sorted(os.read(ready, 1) for _ in range(8))
        os.close(hold)
        os.close(done)
        for child in children:
            os.waitpid(child, 0)
        assert codes == [b"1", *[b"2"] * 7]
    for fd in (gate, opened, ready, told):
        os.close(fd)


@pytest.mark.parametrize("left", ["nothing", "dead", "empty"])
@pytest.mark.parametrize("release", [False, True], ids=["kept", "given_back"])
def test_whenever_another_takes_the_lock_there_is_one_owner(tmp_path: Path, left: str, release: bool) -> None:
    """Before each call of one that takes the lock, another takes it, and perhaps gives it back."""
    owner, firsts = dead(), set()
    for at in range(1, 100):
        where = tmp_path / str(at)
        where.mkdir()
        if left == "dead":
            plant(where, owner)
        elif left == "empty":
            (where / HELD).mkdir()
        first, second = FolderLocks(unlockable()), FolderLocks(unlockable())
        count = iter(range(1, 1000))
        took: dict[str, bool] = {}

        def around(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
            if next(count) == at:  # noqa: B023
                took["second"] = taken(second, where)  # noqa: B023
                if release:
                    second.release()  # noqa: B023
            return call(*arguments)

        first.filesystem = intercepted(unlockable(), around)
        took["first"] = taken(first, where)
        if "second" not in took:
            break  # it makes no more calls
        held = took["first"] or not release
        assert took["first"] + took["second"] == 1 or (release and took["first"])
        third = FolderLocks(unlockable())
        assert taken(third, where) is not held
        firsts.add(took["first"])
        for locks in (first, second, third):
            locks.release()
        assert os.listdir(where) == []
    assert True in firsts  # where the other comes too late, or has gone again


# -- deaths and errors -------------------------------------------------------------------------------------------------

# Single files and shards, onto nothing and onto others.
TRIED = [Transition("absent", "single"), Transition("single", "three")]


@pytest.mark.parametrize("transition", TRIED, ids=str)
def test_after_a_kill_at_any_call_the_next_save_has_the_folder(transition: Transition) -> None:
    with prepared(transition) as where:
        filesystem, calls = counted(unlockable())
        save(transition, where, filesystem)
        points = sum(map(changes, calls))
    found = []
    for at in range(1, points + 1):
        with prepared(transition) as where:
            count = iter(range(1, points + 1))

            def around(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
                if changes(Call(name, "", arguments[1:])) and next(count) == at:  # noqa: B023
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments)

            pid = os.fork()
            if not pid:
                try:
                    save(transition, where, intercepted(unlockable(), around))
                finally:
                    os._exit(0)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            found.append(seen(transition, where))
            fm.save(OLD, where, filesystem=unlockable())
            assert not [name for name in os.listdir(where) if name.startswith(".")]
            assert values(where) == {1.0}
    turn = found.index("NEW")
    assert (set(found[:turn]), set(found[turn:])) == ({"OLD"}, {"NEW"})


@pytest.mark.parametrize("transition", TRIED, ids=str)
def test_after_an_error_at_any_call_the_next_save_has_the_folder(transition: Transition) -> None:
    with prepared(transition) as where:
        filesystem, calls = counted(unlockable())
        save(transition, where, filesystem)
        points = sum(map(changes, calls))
    for at in range(1, points + 1):
        with prepared(transition) as where:
            committed = "yes"
            try:
                save(transition, where, faulty(unlockable(), at, errno.EIO))
            except SaveError as error:
                committed = error.committed
            found = seen(transition, where)
            assert found in {"no": {"OLD"}, "yes": {"NEW"}, "unknown": {"OLD", "NEW"}}[committed]
            fm.save(OLD, where, filesystem=unlockable())
            assert not [name for name in os.listdir(where) if name.startswith(".")]


# -- other users' files ------------------------------------------------------------------------------------------------


def unwritable(flock: Callable[[int], bool] = REAL.flock) -> FileSystem:
    """A file system where the lock is another user's, who lets others read it."""

    def open_(path: str, flags: int, mode: int) -> int:
        if path.endswith(LOCK) and flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return os.open(path, flags, mode)

    return evolve(QUICK, open=open_, flock=flock)


def test_a_dead_lock_that_may_only_be_read_stops_nobody_and_a_living_one_does(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("of another user")
    first = FolderLocks(unwritable())
    assert first.take(str(tmp_path))
    assert (tmp_path / LOCK).read_text() == "of another user"
    with pytest.raises(BusyError):
        fm.save(NEW, tmp_path)
    first.release()
    living = FolderLocks(REAL)
    living.take(str(tmp_path))
    with pytest.raises(BusyError) as raised:
        fm.save(NEW, tmp_path, filesystem=unwritable())
    assert raised.value.pid == os.getpid()
    living.release()
    (tmp_path / LOCK).write_text("of another user")
    fm.save(NEW, tmp_path, filesystem=unwritable())
    assert os.listdir(tmp_path) == [SINGLE]


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaveError) as raised:
        fm.save(NEW, tmp_path, filesystem=unwritable())
    assert raised.value.committed == "no"
    assert os.listdir(tmp_path) == []


def test_where_only_what_may_be_written_can_be_locked_the_save_is_refused(tmp_path: Path) -> None:
    def flock(fd: int) -> bool:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    (tmp_path / LOCK).touch()
    with pytest.raises(SaveError) as raised:
        fm.save(NEW, tmp_path, filesystem=unwritable(flock))
    assert not isinstance(raised.value, BusyError)
    assert isinstance(raised.value.__cause__, PermissionError)
    assert os.listdir(tmp_path) == [LOCK]


# -- what others have planted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "link", "link_to_nothing", "link_to_a_folder", "file"])
@pytest.mark.parametrize("name", [LOCK, HELD, JOURNAL])
def test_what_lies_in_the_place_of_a_lock_is_named_and_nothing_changes(name: str, kind: str) -> None:
    with folder() as root:
        where, outside = root / "ckpt", root / "outside"
        fm.save(OLD, where)
        outside.mkdir()
        (outside / "file").write_text("mine")
        match kind:
            case "folder":
                (where / name).mkdir()
            case "pipe":
                os.mkfifo(where / name)
            case "socket":
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(str(where / name))
            case "link":
                (where / name).symlink_to(outside / "file")
            case "link_to_nothing":
                (where / name).symlink_to(outside / "other")
            case "link_to_a_folder":
                (where / name).symlink_to(outside)
            case "file":
                (where / name).write_text("mine")
        before = sorted(os.listdir(where))
        if (name, kind) in {(LOCK, "file"), (HELD, "folder")} or (name == JOURNAL and kind != "folder"):
            fm.save(NEW, where, filesystem=unlockable())  # as a dead writer leaves it, or as no writer does; it goes
            assert os.listdir(where) == [SINGLE]
        else:
            with pytest.raises(UnsafePathError) as raised:
                fm.save(NEW, where, filesystem=unlockable() if name == HELD else QUICK)
            assert (raised.value.code, raised.value.path) == ("NOT_REGULAR_FILE", str(where / name))
            assert sorted(set(os.listdir(where)) - ({LOCK} if name == HELD else set())) == before
            assert values(where) == {1.0}
        assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("file", "mine")]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_lies_in_the_place_of_a_staged_file_is_not_written_to(tmp_path: Path, kind: str) -> None:
    (tmp_path / "outside").write_text("mine")
    where = tmp_path / "ckpt"
    fm.save(OLD, where)

    def open_(path: str, flags: int, mode: int) -> int:
        if is_part(os.path.basename(path)) and flags & os.O_CREAT:
            if kind == "folder":
                os.mkdir(path)
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                os.symlink(tmp_path / "outside", path)
        return os.open(path, flags, mode)

    with pytest.raises(SaveError) as raised:
        fm.save(NEW, where, filesystem=evolve(QUICK, open=open_))
    assert raised.value.committed == "no"
    assert (tmp_path / "outside").read_text() == "mine"
    assert values(where) == {1.0}
    (planted,) = (name for name in os.listdir(where) if name != SINGLE)
    assert is_part(planted)
