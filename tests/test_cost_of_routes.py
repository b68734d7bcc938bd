"""`cost` is a promise: what a load reads, holds, borrows and takes at its peak, against what the kernel counts."""

import json
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
