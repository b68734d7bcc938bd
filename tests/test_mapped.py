"""Files that are computed from while they are mapped: nobody can cut them short meanwhile, and nobody waits long."""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import save_file

import funcmodel as fm
from funcmodel.core import build
from funcmodel.errors import ChangedError
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.evaluate import materialize
from funcmodel.run.files import open_regular
from funcmodel.run.mapped import held, mapping

HERE = __name__
MIB = 1 << 20
ONE = TensorSpec([1], "float32")


@pytest.fixture
def file(tmp_path: Path, leases: None) -> Path:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.arange(200_000, dtype=torch.int32), "b": torch.ones(3)}, path)
    return path


def free_to_write(path: Path) -> bool:
    """Whether a writer would get the file at once."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except BlockingIOError:
        return False
    return True


@contextmanager
def writer(path: Path, act: str) -> Iterator[IO[str]]:
    """Another process that says "about to", does `act` to the file, and says "done"."""
    code = f"import os, sys; path = sys.argv[1]; print('about to', flush=True); {act}; print('done', flush=True)"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "about to\n"
            yield process.stdout
        finally:
            process.kill()


WRITES = {"open": "os.close(os.open(path, os.O_WRONLY))", "cut": "os.truncate(path, 9)"}


# -- the lease ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", WRITES.values(), ids=WRITES)
def test_another_process_waits_until_we_let_go(file: Path, act: str) -> None:
    raw = file.read_bytes()
    with open_regular(file) as opened:
        with held() as pages:
            assert pages.bytes_of(opened) == raw
            assert not free_to_write(file)  # this was a writer already: it was refused, and we were told
            assert pages.bytes_of(opened) is None
        with held() as pages:
            view = pages.bytes_of(opened)
            assert view is not None
            with writer(file, act) as said:
                while pages.bytes_of(opened) is not None:  # until the kernel says that somebody waits
                    assert bytes(view[-8:]) == raw[-8:]
                assert said.readline() == "done\n"
        assert pages.bytes_of(opened) is None or os.fstat(opened.fd).st_size == len(raw)


@pytest.mark.parametrize("act", WRITES.values(), ids=WRITES)
def test_a_waiting_process_goes_on_when_the_block_ends(file: Path, act: str) -> None:
    with open_regular(file) as opened, held() as pages:
        view = pages.bytes_of(opened)
        assert view is not None
        with writer(file, act) as said:
            assert not select.select([said], [], [], 0.2)[0]
            assert len(bytes(view)) == opened.nbytes
            pages.release()
            assert said.readline() == "done\n"


def test_nothing_is_held_after_the_block(file: Path) -> None:
    with open_regular(file) as opened:
        with held() as pages:
            assert pages.bytes_of(opened) is not None
        assert fcntl.fcntl(opened.fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK
        assert free_to_write(file)


def test_a_file_that_somebody_writes_to_is_not_mapped_but_read(file: Path) -> None:
    plan = fm.scan(file)
    wanted = {"half": build.cast(plan["w"], "int64")}
    with file.open("r+b") as other, open_regular(file) as opened:
        with held() as pages:
            assert pages.bytes_of(opened) is None
        assert materialize(wanted, route="transform")["half"].tolist() == list(range(200_000))
        assert not other.closed


def test_a_file_of_another_size_than_it_had_is_not_mapped(file: Path) -> None:
    with open_regular(file) as opened, held() as pages:
        os.truncate(file, 100)
        assert pages.bytes_of(opened) is None
    with open_regular(file) as opened:
        os.truncate(file, 10)
        with pytest.raises(ChangedError) as caught:
            mapping(opened)
    assert caught.value.path == str(file)
    assert (caught.value.expected, caught.value.found) == (100, 10)


def failing(tensor: torch.Tensor, *, path: str, fail: bool) -> torch.Tensor:
    if fail:
        raise ZeroDivisionError
    return tensor


@pytest.mark.parametrize("fail", [False, True])
def test_no_lease_is_left(file: Path, fail: bool) -> None:
    plan = fm.scan(file)
    last = build.call(f"{HERE}:failing", [build.cast(plan["b"], "float64")], TensorSpec([3], "float64"))
    last = build.call(last.fn, last.args, last.spec, path=str(file), fail=fail)
    wanted = {"w": build.cast(plan["w"], "int64"), "flat": build.reshape(build.cast(plan["w"], "int16"), [2, -1])}
    before = len(os.listdir("/proc/self/fd"))
    for route in ("transform", None, "map"):
        try:
            materialize({**wanted, "last": last}, route=route)
            assert not fail
        except ZeroDivisionError:
            assert fail
        assert free_to_write(file)
        fd = os.open(file, os.O_RDONLY)
        assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before


def test_borrowed_memory_holds_nobody_back(file: Path) -> None:
    found = materialize(fm.scan(file), memory="borrow")
    assert free_to_write(file)
    assert found["b"].tolist() == [1, 1, 1]


def test_no_signal_handler_is_called_and_none_changes(file: Path) -> None:
    plan = fm.scan(file)
    seen: list[int] = []
    numbers = (signal.SIGIO, signal.SIGURG, signal.SIGBUS)
    before = {n: signal.signal(n, lambda number, _: seen.append(number)) for n in numbers}
    during = {n: signal.getsignal(n) for n in numbers}
    try:
        with open_regular(file) as opened, held() as pages:
            assert pages.bytes_of(opened) is not None
            assert not free_to_write(file)
            assert pages.bytes_of(opened) is None
        materialize({"w": build.cast(plan["w"], "int64")}, route="transform")
        assert {n: signal.getsignal(n) for n in numbers} == during
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == []


# -- other processes, at any moment ------------------------------------------------------------------------------------

TRIES = 24

# A process of its own, which may die of SIGBUS without taking the tests with it. While it computes out of the file, a
# thread of it does to the file what nobody should: a writer that waits for us must not be waited for.
CHILD = """
import json, os, random, sys, threading
import torch
import funcmodel as fm
from funcmodel.core import build
from funcmodel.errors import FuncmodelError

path, tries = sys.argv[1], int(sys.argv[2])
n = (64 << 20) // 4
rows = torch.arange(n, dtype=torch.int32) % 251
header = b'{"w":{"dtype":"I32","shape":[%d],"data_offsets":[0,%d]}}' % (n, 4 * n)
start = len(header).to_bytes(8, "little") + header
size = len(start) + 4 * n
before = rows.to(torch.int16)
chance = random.Random(7)
ends = {}

def write(first):
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, start, 0)
    os.pwrite(fd, rows.numpy()[first // 4 :], len(start) + first)
    os.close(fd)

def disturb(wait, cut, at):
    started.wait()
    threading.Event().wait(wait)
    if cut:
        os.truncate(path, len(start) + at)
    else:
        fd = os.open(path, os.O_WRONLY)
        os.pwrite(fd, bytes(4096), len(start) + at)
        os.close(fd)

write(0)
for i in range(tries):
    cut, at, wait = i % 2, chance.randrange(0, n - 1024) * 4, chance.random() * 0.04
    after = before.clone()
    after[at // 4 : at // 4 + 1024] = 0
    plan = {"w": build.cast(fm.scan(path)["w"], "int16")}
    started = threading.Event()
    other = threading.Thread(target=disturb, args=(wait, cut, at))
    other.start()
    started.set()
    try:
        found = fm.materialize(plan)["w"]
        whole = torch.equal(found, before) or torch.equal(found, after) and not cut
        end = "right" if whole else "mixed"
    except FuncmodelError as error:
        end = type(error).__name__
    ends[end] = ends.get(end, 0) + 1
    other.join()
    write(at)
print(json.dumps(ends))
"""


def test_a_file_that_changes_at_any_moment_ends_in_the_right_tensor_or_a_typed_error(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(file), str(TRIES)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    ends = json.loads(done.stdout)
    assert sum(ends.values()) == TRIES
    assert ends.keys() <= {"right", "ChangedError", "StalePlanError"}


def test_who_borrows_the_same_bytes_twice_shares_no_memory(file: Path) -> None:
    w = fm.scan(file)["w"]
    plan = {"a": w, "b": w, "part": build.narrow(w, 0, 5, 90), "behind": build.narrow(w, 0, 90, 100)}
    found = materialize(plan, memory="borrow")
    want = {key: tensor.clone() for key, tensor in materialize(plan).items()}
    for key in found:
        found[key].add_(1)
        want[key].add_(1)
        assert all(torch.equal(found[other], want[other]) for other in found)


SHORT_OF_ADDRESSES = """
import resource, sys
import torch
import funcmodel as fm

plan = {key: fm.expr.cast(read, "bfloat16") for key, read in fm.scan(sys.argv[1]).items()}
few = {key: fm.expr.cast(read, "bfloat16") for key, read in fm.scan(sys.argv[2]).items()}
fm.materialize(few)
fm.materialize(fm.scan(sys.argv[2]), memory="borrow")
size = next(int(row.split()[1]) << 10 for row in open("/proc/self/status") if row.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20), resource.RLIM_INFINITY))
assert all(bool((tensor == 1).all()) for tensor in fm.materialize(plan).values())
try:
    fm.materialize(fm.scan(sys.argv[1]), memory="borrow")
except fm.NoMemoryError:
    print("refused")
"""


def test_without_addresses_for_a_mapping_buffers_serve(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file({f"{i}": torch.ones(4 << 20) for i in range(16)}, path)  # 256 MiB, and 128 MiB as bfloat16
    save_file({f"{i}": torch.ones(4 << 10) for i in range(16)}, file)
    command = [sys.executable, "-c", SHORT_OF_ADDRESSES, str(path), str(file)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "refused\n"
