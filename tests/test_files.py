"""Opening and reading files: regular ones, inside their folder, whole, unchanged."""

import os
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from funcmodel.errors import ChangedError, CheckpointError, UnsafePathError
from funcmodel.run import files
from funcmodel.run.files import SourceFile, open_regular


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "weights.bin"
    path.parent.mkdir()
    path.write_bytes(bytes(range(100)))
    return path


def filled(file: SourceFile, offset: int, *sizes: int) -> list[bytes]:
    buffers = [bytearray(size) for size in sizes]
    file.readv_into([memoryview(b) for b in buffers], offset)
    return [bytes(b) for b in buffers]


def test_reads_carry_their_own_offset(path: Path) -> None:
    with open_regular(path) as file:
        buffer = bytearray(3)
        file.read_into(memoryview(buffer), 7)
        assert bytes(buffer) == b"\7\x08\x09"
        assert file.read(98, 100) == b"bc"
        assert file.read(5, 5) == b""
        assert filled(file, 10, 2, 0, 3) == [b"\x0a\x0b", b"", b"\x0c\x0d\x0e"]
        assert file.nbytes == 100
        assert file.path == str(path)


def test_more_buffers_than_one_call_takes(path: Path) -> None:
    path.write_bytes(bytes(i % 251 for i in range(5000)))
    with open_regular(path) as file:
        assert b"".join(filled(file, 0, *[1, 2] * 1500)) == path.read_bytes()[:4500]


@pytest.mark.parametrize("most", [1, 2, 7])
def test_short_reads_go_on_where_they_ended(path: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        left, given = most, []
        for buffer in buffers:
            given.append(buffer[:left])
            left -= len(given[-1])
            if not left:
                break
        return real(fd, given, offset)

    monkeypatch.setattr(os, "preadv", short)
    with open_regular(path) as file:
        assert b"".join(filled(file, 3, 5, 1, 9, 2)) == bytes(range(3, 20))
        assert file.read(0, 100) == bytes(range(100))


def test_a_file_that_shrinks_while_it_is_read(path: Path) -> None:
    with open_regular(path) as file:
        os.truncate(path, 50)
        with pytest.raises(ChangedError) as caught:
            file.read(0, 100)
        assert caught.value.path == str(path)
        with pytest.raises(ChangedError):
            filled(file, 40, 5, 20)
        with pytest.raises(ChangedError):
            file.verify_unchanged()


def test_a_file_that_is_overwritten_in_place(path: Path) -> None:
    with open_regular(path) as file:
        file.verify_unchanged()
        os.utime(path, ns=(1, 1))
        with pytest.raises(ChangedError):
            file.verify_unchanged()


def test_a_file_that_is_replaced_by_rename_is_still_the_one_that_was_opened(path: Path) -> None:
    other = path.with_name("new")
    other.write_bytes(b"x" * 100)
    with open_regular(path) as file:
        other.replace(path)
        assert file.read(0, 100) == bytes(range(100))
        file.verify_unchanged()


def test_an_input_error_of_the_device_is_typed(path: Path) -> None:
    file = open_regular(path)
    os.close(file.fd)  # what is read from now on fails, as on a disk that is gone
    with pytest.raises(CheckpointError) as caught:
        file.read(0, 1)
    assert caught.value.code == "READ"


def test_close_twice(path: Path) -> None:
    file = open_regular(path)
    file.close()
    file.close()
    assert file.closed
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(file.fd)


def test_nothing_stays_open_after_an_error(path: Path) -> None:
    (path.parent / "link").symlink_to("/dev/zero")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(5):
        with pytest.raises(UnsafePathError):
            open_regular(path.parent)
        with pytest.raises(UnsafePathError):
            open_regular(path.parent / "link")
        with pytest.raises(UnsafePathError):
            open_regular(path, root=path.parent.parent / "elsewhere")
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


def interrupted(act: Callable[[], None], step: int) -> bool:
    """Whether an interrupt came before `act` ended: before step number `step` that Python takes in `run/files.py`."""
    taken = count()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != files.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(taken) == step:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_nothing_stays_open_wherever_an_interrupt_comes(path: Path) -> None:
    def read() -> None:
        with open_regular(path, root=path.parent) as file:
            file.read(0, 1)

    read()
    before = len(os.listdir("/proc/self/fd"))
    for step in count():
        ended = not interrupted(read, step)
        assert len(os.listdir("/proc/self/fd")) == before
        if ended:
            break
    assert step > 50


@pytest.fixture(params=["by descriptor", "by name"])
def resolution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc, containment is checked another way; both must decide alike."""
    if request.param == "by name":
        real = os.path.exists
        monkeypatch.setattr(files.os.path, "exists", lambda p: not str(p).startswith("/proc/") and real(p))


@pytest.mark.usefixtures("resolution")
def test_links_inside_the_root_are_followed(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path.name)
    with open_regular(link, root=path.parent) as file:
        assert file.nbytes == 100
    folder = path.parent.with_name("elsewhere")
    folder.symlink_to(path.parent)
    with open_regular(folder / path.name, root=folder) as file:
        assert file.nbytes == 100


@pytest.mark.usefixtures("resolution")
def test_links_out_of_the_root_are_refused(path: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "link").symlink_to(path)
    (root / "dir").symlink_to(path.parent)
    beside = tmp_path / "root-beside"
    beside.mkdir()
    (beside / "w").write_bytes(b"")
    for escape in (
        root / "link",
        root / "dir" / path.name,
        root / ".." / "folder" / path.name,
        root / "../root-beside/w",
    ):
        with pytest.raises(UnsafePathError) as caught:
            open_regular(escape, root=root)
        assert (caught.value.code, caught.value.path) == ("SYMLINK_ESCAPES", str(escape))
        open_regular(escape).close()  # without a root the caller vouches for it


@pytest.mark.usefixtures("resolution")
def test_blobs_beside_snapshots_belong_to_a_snapshot(tmp_path: Path) -> None:
    blob = tmp_path / "repo" / "blobs" / "abc"
    deeper = tmp_path / "repo" / "blobs" / "x" / "abc"
    snapshot = tmp_path / "repo" / "snapshots" / "1234"
    for folder in (deeper.parent, snapshot):
        folder.mkdir(parents=True)
    for target in (blob, deeper):
        target.write_bytes(b"abc")
    (snapshot / "w").symlink_to("../../blobs/abc")
    (snapshot / "x").symlink_to("../../blobs/x/abc")
    with open_regular(snapshot / "w", root=snapshot) as file:
        assert file.read(0, 3) == b"abc"
    for root, name in ((snapshot, "x"), (tmp_path / "repo" / "snapshots", "1234/w")):
        with pytest.raises(UnsafePathError):
            open_regular(snapshot / name if root == snapshot else root / name, root=root)


def test_a_folder_named_through_a_link_and_back_contains_no_more_than_itself(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "b").mkdir()
    (tmp_path / "a" / "b" / "secret").write_bytes(b"secret")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "x" / "y")
    (tmp_path / "x" / "b" / "m").symlink_to(tmp_path / "a" / "b" / "secret")
    root = f"{tmp_path}/a/link/../b"  # is x/b, though its letters say a/b
    with pytest.raises(UnsafePathError):
        open_regular(f"{root}/m", root=root)
