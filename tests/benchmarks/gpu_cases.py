"""The cases of CUDA; without a device, or without `--cuda`, their rows say why there is nothing.

Every act ends with a synchronization. "Hot" files are in the page cache. The model of `cuda_hot` has at least 8 GB,
unless the run is smaller than 1 GB, as a rehearsal is.
"""

import gc
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks import limits, ours, peers
from tests.benchmarks.cases import holds, limit, mine, peer
from tests.benchmarks.fresh import in_new_process
from tests.benchmarks.limits import cores
from tests.benchmarks.measure import Case, Contender
from tests.benchmarks.model import World

Act = Callable[[Any], Any]
SLOT = 8 << 20
SLOTS = 16
STREAMS = 8
PINNED_BLOCK = 128 << 20
HOT = 8.0


def available() -> str | None:
    """Why there is nothing to measure; None where there is."""
    return None if torch.cuda.is_available() else f"not measured: torch {torch.__version__} sees no CUDA device"


def synchronized(act: Act) -> Act:
    def run(given: Any) -> Any:
        found = act(given)
        torch.cuda.synchronize()
        return found

    return run


@cache
def on_host(nbytes: int) -> torch.Tensor:
    """Pinned, and shared by all who need it."""
    return torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)


@cache
def on_device(nbytes: int) -> torch.Tensor:
    return torch.ones(nbytes, dtype=torch.uint8, device="cuda")


def pinned(nbytes: int) -> Act:
    """One large pinned buffer, one stream: the bus."""
    host, there = on_host(nbytes), on_device(nbytes)
    return synchronized(lambda _: there.copy_(host, non_blocking=True))


def pinned_ring(nbytes: int) -> Act:
    """As a loader does it: slots of 8 MiB, each with an event, over side streams."""
    slots = [torch.ones(SLOT, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)]
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    there = on_device(nbytes)

    def act(_: Any) -> None:
        events: list[torch.cuda.Event | None] = [None] * SLOTS
        for turn, start in enumerate(range(0, nbytes, SLOT)):
            slot, stream = turn % SLOTS, streams[turn % STREAMS]
            if (last := events[slot]) is not None:
                last.synchronize()
            target = there[start : start + SLOT]
            with torch.cuda.stream(stream):
                target.copy_(slots[slot][: len(target)], non_blocking=True)
                events[slot] = event = torch.cuda.Event()
                event.record(stream)

    return synchronized(act)


def pageable(nbytes: int) -> Act:
    host, there = torch.ones(nbytes, dtype=torch.uint8), on_device(nbytes)
    return synchronized(lambda _: there.copy_(host))


def back(nbytes: int) -> Act:
    """Device to one large pinned buffer."""
    host, there = on_host(nbytes), on_device(nbytes)
    return synchronized(lambda _: host.copy_(there, non_blocking=True))


def pin_cost() -> Act:
    """Pin 128 MiB that are in memory already, and let go of them again."""
    held = np.ones(PINNED_BLOCK, np.uint8)
    runtime = torch.cuda.cudart()

    def act(_: Any) -> None:
        for call in (
            lambda: runtime.cudaHostRegister(held.ctypes.data, PINNED_BLOCK, 0),
            lambda: runtime.cudaHostUnregister(held.ctypes.data),
        ):
            if int(call()):
                raise RuntimeError("the memory could not be pinned")

    return act


def load_file(path: Path) -> Act:
    return synchronized(lambda _: peers.st.load_file(path, device="cuda"))


def hot_world(world: World) -> World:
    if world.size < 1 or world.size >= HOT:
        return world
    root = world.root / "hot"
    root.mkdir(exist_ok=True)
    return World(root, HOT)


def released() -> None:
    """Device memory that nobody uses goes back, so that peers with an allocator of their own find room."""
    gc.collect()
    torch.cuda.empty_cache()


def hot(small: World) -> Case:
    world = hot_world(small)
    path, n = world.path, world.nbytes
    return Case(
        "cuda_hot",
        f"CUDA, hot, {n / 1e9:.1f} GB",
        n,
        [
            mine("load", lambda: synchronized(ours.load(path, device_map="cuda")), prepare=world.meta),
            limit("pinned H2D", lambda: pinned(n)),
            limit("pinned H2D, ring of 8 MiB", lambda: pinned_ring(n)),
            limit("pageable H2D", lambda: pageable(n)),
            limit("pinned D2H", lambda: back(n)),
            limit("pinning 128 MiB", pin_cost, nbytes=PINNED_BLOCK),
            limit("preadv, all threads", lambda: limits.preadv_into(path, dict(world.real.state_dict()), cores())),
            peer("load_file(cuda)", lambda: load_file(path)),
            peer(
                "transformers",
                lambda: synchronized(peers.from_pretrained(world.folder, device_map="cuda")),
            ),
            peer("fastsafetensors", lambda: synchronized(peers.fastsafetensors_load(path, "cuda:0"))),
            peer("runai-model-streamer", lambda: synchronized(peers.runai_load(path, "cuda"))),
        ],
        count=world.shape.tensors(),
        verify=holds(world.tensors),
        settle=released,
    )


def fresh(world: World) -> Case:
    """Each run is a new process that made its context and its imports; pinning is inside what is timed."""
    folder = world.folder

    def child(kind: Callable[..., Contender], name: str, how: str) -> Contender:
        return kind(name, lambda: in_new_process(how, folder, "cuda:0"), checked=False, memory=False)

    return Case(
        "cuda_fresh",
        f"CUDA, {world.nbytes / 1e9:.2f} GB in a new process, pin cost included",
        world.nbytes,
        [
            child(mine, "load", "funcmodel"),
            child(peer, "load_file(cuda)", "load_file"),
            child(peer, "transformers", "transformers"),
            child(peer, "fastsafetensors", "fastsafetensors"),
            child(peer, "runai-model-streamer", "runai_model_streamer"),
        ],
        count=world.shape.tensors(),
    )


CASES: Mapping[str, Callable[[World], Case]] = {"cuda_hot": hot, "cuda_fresh": fresh}
