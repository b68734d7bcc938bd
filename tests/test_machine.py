"""The probe: it finds what the system says, by other ways than its own, and leaves everything as it was."""

import os
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import funcmodel as fm
from funcmodel.core import build
from funcmodel.plan.routing import COLD, HOT, LARGE, routing
from funcmodel.records.expressions import FileRef
from funcmodel.records.routes import Machine, Storage
from funcmodel.run.groups import group_folders, group_memory, memory_limits, quota
from funcmodel.run.machine import (
    available,
    free_memory,
    machine,
    mount_table,
    threads,
)

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc and /sys")


def reference(path: Path) -> FileRef:
    return FileRef(str(path), "safetensors", path.stat().st_size, "")


def evict(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(path: Path) -> float:
    """Part of a file that is in the page cache, as util-linux' fincore counts it."""
    done = subprocess.run(["fincore", "-b", "-n", "-o", "RES", path], capture_output=True, text=True, check=True)
    return int(done.stdout) / path.stat().st_size


def can_count() -> bool:
    try:
        return subprocess.run(["fincore", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.arange(LARGE // 4, dtype=torch.int32)}, path)
    return path


@pytest.fixture
def evictable(file: Path) -> Path:
    """A file whose pages the system lets go of when it is told to."""
    if not can_count():
        pytest.skip("needs fincore")
    evict(file)
    if resident(file) > 0:
        pytest.skip("this file system keeps what it has")
    return file


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    if not os.path.isdir("/dev/shm") or not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


# -- processors and memory ---------------------------------------------------------------------------------------------


@on_linux
def test_no_more_threads_than_processors_that_may_be_used() -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= threads() <= min(8, len(allowed))
    assert 1 <= machine().threads <= min(8, len(allowed))
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert threads() == machine().threads == 1
    finally:
        os.sched_setaffinity(0, allowed)


@on_linux
def test_available_memory_is_no_more_than_the_machine_and_its_groups_have() -> None:
    found = available()
    assert found is not None
    assert 0 <= found <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert all(found <= limit for limit in memory_limits())


# -- what the kernel says, here and on other machines ------------------------------------------------------------------

words = st.sampled_from(
    ["max", "0", "1", "100000", "-1", "0::", "/", "MemAvailable:", "kB", "active_file", " - ", "\\040"]
)
texts = st.lists(words | st.text(string.printable, max_size=4)).map(" ".join) | st.text(string.printable)


@pytest.mark.parametrize(
    ("text", "processors"),
    [("max 100000\n", None), ("100000 100000\n", 1), ("250000 100000", 3), ("1000 100000", 1), ("800000 50000", 16)],
)
def test_a_group_s_quota_is_rounded_up_to_whole_processors(text: str, processors: int | None) -> None:
    assert quota(text) == processors


CGROUPS = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
CGROUPS += "36 31 0:33 /docker/x /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"


def test_the_limits_of_every_group_above_hold() -> None:
    base = "/sys/fs/cgroup"
    above = [f"{base}/a.slice/b.scope", f"{base}/a.slice", base]
    assert group_folders("0::/a.slice/b.scope\n", "") == {"": above}
    assert group_folders("0::/\n", UNIFIED) == {"": [f"{base}/unified"]}
    assert group_folders("0::/../../b\n", UNIFIED) == {"": [f"{base}/unified"]}  # of a namespace beside this one
    found = group_folders(
        "12:memory:/docker/x\n3:cpu,cpuacct:/docker/x/y\n1:name=systemd:/y\n0::/\n", CGROUPS + UNIFIED
    )
    assert found.pop("memory") == [f"{base}/memory/docker/x", f"{base}/memory/docker", f"{base}/memory"]
    assert found.pop("cpu") == [f"{base}/cpu,cpuacct/y", f"{base}/cpu,cpuacct"]
    assert found == {"": [f"{base}/unified"], "cpuacct": [f"{base}/cpu,cpuacct/y", f"{base}/cpu,cpuacct"]}
    assert group_folders("12:memory:/docker/x\n", "") == {}


@on_linux
def test_the_folders_of_this_process_are_there() -> None:
    found = group_folders(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())
    for folders in found.values():
        assert any(Path(folder).is_dir() for folder in folders) or not Path("/sys/fs/cgroup").is_dir()


def test_a_group_without_a_limit_says_nothing_and_one_over_it_has_nothing() -> None:
    assert group_memory("max\n", "5\n", "") is None
    assert group_memory("1000\n", "1200\n", "anon 1200\n") == 0
    assert group_memory("1000\n", "1200\n", "anon 900\ninactive_file 200\nactive_file 100\nfile 300\n") == 100
    one = "cache 9\ninactive_file 0\nactive_file 1\ntotal_inactive_file 70\ntotal_active_file 7\n"  # version 1
    assert group_memory("1000\n", "900\n", one) == 177


def test_mounts_may_have_odd_names_and_lie_on_one_another() -> None:
    fields = "36 35 98:0 / {} rw,noatime shared:1 master:2 - {} /dev/x rw\n"
    table = mount_table(
        fields.format("/", "ext4")
        + fields.format("/my\\040disk", "nfs4")
        + fields.format("/tmp", "ext4")
        + fields.format("/tmp", "tmpfs")
        + fields.format("/t\\134040", "xfs")
        + "37 35 98:0 / /plain rw - btrfs /dev/y rw\n"
    )
    assert table == {"/": "ext4", "/my disk": "nfs4", "/tmp": "tmpfs", "/t\\040": "xfs", "/plain": "btrfs"}


@settings(max_examples=50, deadline=None)
@given(texts, texts, texts)
def test_whatever_the_kernel_says_nothing_is_raised(one: str, two: str, three: str) -> None:
    """The functions are total; what they find is no less than nothing."""
    assert quota(one) is None or quota(one) >= 1
    assert free_memory(one) is None or free_memory(one) >= 0
    assert group_memory(one, two, three) is None or group_memory(one, two, three) >= 0
    assert all(folders for folders in group_folders(one, two).values())
    assert all(kind for kind in mount_table(one).values())


# -- files -------------------------------------------------------------------------------------------------------------


@on_linux
def test_the_file_system_is_the_one_that_stat_names(file: Path) -> None:
    named = subprocess.run(["df", "--output=fstype", file], capture_output=True, text=True, check=True).stdout
    found = machine([reference(file)], smallest=0).storage[str(file)]
    assert found.kind == named.split()[-1]


def test_a_cold_file_is_cold_and_a_hot_one_hot(evictable: Path) -> None:
    ref = reference(evictable)
    found = machine([ref]).storage[ref.path]
    assert found.cached < COLD
    assert evictable.read_bytes()
    found = machine([ref]).storage[ref.path]
    assert found.cached >= HOT
    assert found.cached <= 1


def test_half_a_file_is_neither(evictable: Path) -> None:
    with evictable.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing ahead of what is read
        opened.read(LARGE // 2)
    ref = reference(evictable)
    assert COLD <= machine([ref]).storage[ref.path].cached < HOT


def test_looking_at_a_cold_file_leaves_it_cold(evictable: Path) -> None:
    ref = reference(evictable)
    raw, read = evictable.stat(), bytes_read()
    for _ in range(5):
        assert machine([ref]).storage[ref.path].cached < COLD
    assert bytes_read() - read < 64 << 10  # of /proc and /sys
    assert resident(evictable) < 0.1
    now = evictable.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (raw.st_size, raw.st_mtime_ns, raw.st_ino)


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_plan_of_a_cold_file_is_read_past_the_cache_and_leaves_it_cold(evictable: Path) -> None:
    plan = fm.scan(evictable)
    ref = plan["w"].file
    found = machine([ref])
    if not found.storage[ref.path].direct:
        pytest.skip("this file system reads through its cache only")
    assert routing(plan, found).direct == (ref.path,)
    evict(evictable)  # what the first look fetched
    w = fm.materialize(plan)["w"]
    assert torch.equal(w, torch.arange(LARGE // 4, dtype=torch.int32))
    assert resident(evictable) < 0.1
    assert evictable.read_bytes()
    assert routing(plan, machine([ref])).direct == ()
    half = {"half": build.cast(plan["w"], "int16")}
    chosen = routing(half, machine([ref]))
    assert chosen.mapped == ((ref.path,) if found.storage[ref.path].mappable else ())


def test_what_lies_in_memory_is_never_read_past_the_cache(shared_memory: Path) -> None:
    path = shared_memory / "m.safetensors"
    save_file({"w": torch.arange(LARGE // 4, dtype=torch.int32)}, path)
    plan = fm.scan(path)
    found = machine([plan["w"].file])
    storage = found.storage[str(path)]
    assert (storage.kind, storage.cached, storage.direct, storage.mappable) == ("tmpfs", 1.0, False, True)
    assert routing(plan, evolve(found, available=0)).direct == ()
    assert torch.equal(fm.materialize(plan)["w"], torch.arange(LARGE // 4, dtype=torch.int32))
    assert torch.equal(fm.materialize(plan, memory="borrow")["w"], torch.arange(LARGE // 4, dtype=torch.int32))


def test_small_files_are_not_looked_at_unless_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(3)}, path)
    assert machine([reference(path)]).storage == {}
    assert machine([reference(path)], smallest=0).storage.keys() == {str(path)}
    assert machine([]) == Machine(threads=machine().threads)


def test_what_cannot_be_opened_is_left_to_who_opens_it(tmp_path: Path) -> None:
    gone = FileRef(str(tmp_path / "gone"), "safetensors", LARGE, "")
    folder = FileRef(str(tmp_path), "safetensors", LARGE, "")
    strange = FileRef(str(tmp_path / "gone"), "no such format", LARGE, "")
    before = len(os.listdir("/proc/self/fd"))
    for ref in (gone, folder, strange):
        assert machine([ref]).storage[ref.path] == Storage()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_lies_on_what_its_target_lies_on(tmp_path: Path, shared_memory: Path) -> None:
    save_file({"w": torch.ones(3)}, shared_memory / "m.safetensors")
    linked = tmp_path / "m.safetensors"
    linked.symlink_to(shared_memory / "m.safetensors")
    assert machine([reference(linked)], smallest=0).storage[str(linked)].kind == "tmpfs"
