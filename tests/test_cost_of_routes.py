"""`cost` is a promise: what a load reads, holds, borrows and takes at its peak, against what the kernel counts."""

import ctypes
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import funcmodel as fm

MIB = 1 << 20
SLACK = 6 * MIB  # of the allocator and of threads
MEASURED = """
import json, sys, threading
import torch
import funcmodel as fm
import funcmodel.run.buffers, funcmodel.run.direct, funcmodel.run.machine, funcmodel.run.mapped, funcmodel.run.ring

folder, what, memory, route = sys.argv[1:]
plan = fm.scan(folder)
plan = fm.cast("bfloat16")(plan) if what == "cast" else plan
route = None if route == "None" else route
where = fm.machine({read.file for read in fm.scan(folder).values()}, smallest=0)
routes = fm.routing(plan, where, memory=memory, route=route)
said = fm.cost(plan, routes=routes)

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(row.split()[1]) << 10 for row in file if row.startswith("RssAnon:"))

def read():
    with open("/proc/self/io") as file:
        return int(next(row for row in file if row.startswith("rchar")).split()[1])

fm.materialize({}, memory=memory)
torch.zeros(1 << 16).to(torch.bfloat16)  # torch's own threads, before memory is counted
highest, over = 0, threading.Event()

def watch():
    global highest
    while not over.wait(0.0005):
        highest = max(highest, anonymous())

before, start = anonymous(), read()
watcher = threading.Thread(target=watch)
watcher.start()
found = fm.materialize(plan, memory=memory, route=route)
over.set()
watcher.join()
print(json.dumps({
    "held": anonymous() - before, "peak": max(highest, anonymous()) - before, "read": read() - start,
    "said": {"held": sum(said.held.values()), "peak": sum(said.peak.values()), "read": sum(said.read.values()),
             "buffers": said.buffers, "borrowed": said.borrowed},
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cost")
    save_file({f"w{i}": torch.randn(1024, 4096) for i in range(4)}, path / "model.safetensors")
    return path


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("what", "memory", "route"),
    [
        ("plain", "own", None),
        ("plain", "borrow", None),
        ("plain", "own", "stage"),
        ("cast", "own", None),
        ("cast", "own", "stage"),
    ],
)
def test_a_load_takes_what_its_cost_says(folder, what, memory, route):
    command = [sys.executable, "-c", MEASURED, str(folder), what, memory, str(route)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    said = found["said"]
    assert abs(found["held"] - said["held"]) <= SLACK + (said["buffers"] if what == "cast" or route else 0)
    assert found["peak"] <= said["peak"] + said["buffers"] + SLACK
    if memory == "borrow":
        assert said["held"] == 0
        assert said["borrowed"] == 64 * MIB
        assert found["read"] <= MIB  # headers and what the probe looks at
    elif what == "plain":
        assert said["read"] <= found["read"] <= said["read"] + MIB


def test_what_is_borrowed_is_held_by_nobody(folder):
    plan = fm.scan(folder)
    where = fm.machine({read.file for read in plan.values()}, smallest=0)
    own, lent = (fm.cost(plan, routes=fm.routing(plan, where, memory=memory)) for memory in ("own", "borrow"))
    assert (sum(own.held.values()), own.borrowed) == (64 * MIB, 0)
    assert (sum(lent.held.values()), lent.borrowed) == (0, 64 * MIB)
    assert own.read == lent.read


def test_buffers_are_those_of_the_routes(folder):
    plan = fm.cast("bfloat16")(fm.scan(folder))
    routes = fm.routing(plan, fm.Machine(threads=3))
    assert fm.cost(plan, routes=routes).buffers == routes.buffers * routes.buffer > 0
    staged = fm.routing(plan, fm.Machine(threads=3), on="cuda:0")
    found = fm.cost(plan, on="cuda:0", routes=staged)
    assert found.pinned + found.buffers == staged.buffers * staged.buffer > 0


def resident(path):
    """Bytes of a file that the kernel says are in its page cache."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        pages = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    where = (ctypes.c_char * size).from_buffer(pages)
    held = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    asked = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(ctypes.addressof(where)), size, held)
    del where
    pages.close()
    assert asked == 0, os.strerror(ctypes.get_errno())
    return sum(each & 1 for each in held) * mmap.PAGESIZE


def evict(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel what it caches")
@pytest.mark.parametrize("direct", [False, True])
def test_the_page_cache_holds_what_the_cost_says(folder, direct):
    path = folder / "model.safetensors"
    evict(path)
    if resident(path):
        pytest.skip("this file system keeps its files in memory")
    file = next(iter(fm.scan(folder).values())).file
    found = fm.machine({file}, smallest=0).storage[file.path]
    if direct and not found.direct:
        pytest.skip("files cannot be read past the page cache here")
    storage = fm.Storage(kind=found.kind, mappable=found.mappable, cached=0.0, direct=direct)
    with torch.device("meta"):
        module = torch.nn.ParameterDict({f"w{i}": torch.nn.Parameter(torch.empty(1024, 4096)) for i in range(4)})
    plan = fm.checked(fm.plan_load(fm.module_spec(module), fm.scan(folder)))
    plan = fm.routed(plan, fm.Machine(threads=2, storage={file.path: storage}))
    assert bool(plan.routing.direct) == direct
    said = fm.cost(plan).cached
    fm.apply(plan, module)
    found = resident(path)
    assert said == (0 if direct else 64 * MIB)
    assert abs(found - said) <= MIB  # the header, what is read ahead, and the sample that tells hot from cold


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel what it caches")
def test_what_is_written_is_in_the_page_cache(folder, tmp_path):
    plan = fm.plan_save(fm.scan(folder))
    fm.apply(plan, tmp_path)
    read, written = folder / "model.safetensors", tmp_path / "model.safetensors"
    assert abs(resident(read) + resident(written) - fm.cost(plan).cached) <= MIB
