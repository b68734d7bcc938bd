"""Ways to do what many tensors need, each alone: why funcmodel does it as it does, and what is left to gain.

Microseconds per tensor, the minimum of several runs in turns. A tensor must have a storage of its own, exact in size:
ways that make views of one large tensor are quicker, but `torch.save` of one of them writes all of it, and an in-place
change of one counts as a change of every other.
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from funcmodel.run.memory import memory, tensor_at
from funcmodel.run.tensors import byte_view
from tests.benchmarks import Row, timed

COUNT, SHAPE, NBYTES = 20_000, (32, 32), 2048
SLAB = 2048  # tensors
IOVECS = 1024
HALF = torch.bfloat16


def of_numpy(where: memoryview) -> list[torch.Tensor]:
    return [tensor_at(where, start, HALF, SHAPE) for start in range(0, len(where), NBYTES)]


def of_frombuffer(where: memoryview) -> list[torch.Tensor]:
    numel = NBYTES // HALF.itemsize
    return [
        torch.frombuffer(where, dtype=HALF, count=numel, offset=start).view(SHAPE)
        for start in range(0, len(where), NBYTES)
    ]


def of_set(where: memoryview) -> list[torch.Tensor]:
    storage: Any = torch.frombuffer(where, dtype=torch.uint8).untyped_storage()
    strides = (SHAPE[1], 1)
    return [
        torch.empty(0, dtype=HALF).set_(storage, start // HALF.itemsize, SHAPE, strides)
        for start in range(0, len(where), NBYTES)
    ]


def of_split(where: memoryview) -> list[torch.Tensor]:
    whole = torch.frombuffer(where, dtype=torch.uint8).view(HALF)
    return [part.view(SHAPE) for part in torch.split(whole, NBYTES // HALF.itemsize)]


MAKERS: dict[str, Callable[[memoryview], list[torch.Tensor]]] = {
    "numpy array, then from_numpy (funcmodel)": of_numpy,
    "torch.frombuffer, then view": of_frombuffer,
    "set_ on one storage (shared by all)": of_set,
    "torch.split of one tensor (shared by all)": of_split,
}


def made() -> list[Row]:
    where = memory(COUNT * NBYTES)
    found = timed({name: (lambda: where, act) for name, act in MAKERS.items()})
    return [Row(f"a tensor on given bytes: {name}", found[name].wall / COUNT * 1e6, None, "us") for name in MAKERS]


def read_slabs(fd: int, make: Callable[[memoryview], Any]) -> list[Any]:
    """A call for each slab."""
    slabs = [memory(SLAB * NBYTES) for _ in range(-(-COUNT // SLAB))]
    for number, slab in enumerate(slabs):
        os.preadv(fd, [slab], number * SLAB * NBYTES)
    return [make(slab) for slab in slabs]


def read_each(fd: int) -> list[torch.Tensor]:
    """Memory for each tensor alone, 1,024 of them in a call."""
    tensors = [torch.empty(SHAPE, dtype=HALF) for _ in range(COUNT)]
    views = [byte_view(tensor) for tensor in tensors]
    for start in range(0, COUNT, IOVECS):
        os.preadv(fd, views[start : start + IOVECS], start * NBYTES)
    return tensors


def written(fd: int, batches: Iterable[list[memoryview]]) -> None:
    at = 0
    for batch in batches:
        at += os.pwritev(fd, batch, at)


def by_cat(tensors: list[torch.Tensor], room: torch.Tensor) -> Iterable[list[memoryview]]:
    for start in range(0, COUNT, SLAB):
        some = tensors[start : start + SLAB]
        torch.cat(some, out=room[: len(some) * SHAPE[0]])
        yield [byte_view(room[: len(some) * SHAPE[0]])]


def by_fresh_cat(tensors: list[torch.Tensor]) -> Iterable[list[memoryview]]:
    for start in range(0, COUNT, SLAB):
        yield [byte_view(torch.cat([tensor.reshape(-1) for tensor in tensors[start : start + SLAB]]))]


def by_views(tensors: list[torch.Tensor]) -> Iterable[list[memoryview]]:
    for start in range(0, COUNT, IOVECS):
        yield [byte_view(tensor) for tensor in tensors[start : start + IOVECS]]


def moved(folder: Path) -> list[Row]:
    path = folder / "small.safetensors"
    tensors = [torch.full(SHAPE, float(number % 100), dtype=HALF) for number in range(COUNT)]
    named = {f"{number}": tensor for number, tensor in enumerate(tensors)}
    save_file(named, path)
    room = torch.empty(SLAB * SHAPE[0], SHAPE[1], dtype=HALF)
    source, target = os.open(path, os.O_RDONLY), os.open(folder / "raw", os.O_RDWR | os.O_CREAT)
    nothing = lambda: None  # noqa: E731
    ways: dict[str, Callable[[Any], object]] = {
        "load 2 KiB: slabs, tensors of their own storage (funcmodel)": lambda _: read_slabs(source, of_numpy),
        "load 2 KiB: slabs, torch.split (storage shared)": lambda _: read_slabs(source, of_split),
        "load 2 KiB: memory for each alone": lambda _: read_each(source),
        "load 2 KiB: safetensors load_file": lambda _: load_file(path),
        "save 2 KiB: cat into one buffer (funcmodel)": lambda _: written(target, by_cat(tensors, room)),
        "save 2 KiB: flatten, cat into fresh memory": lambda _: written(target, by_fresh_cat(tensors)),
        "save 2 KiB: 1,024 views in a call": lambda _: written(target, by_views(tensors)),
        "save 2 KiB: safetensors save_file": lambda _: save_file(named, folder / "again.safetensors"),
    }
    try:
        found = timed({name: (nothing, act) for name, act in ways.items()})
    finally:
        os.close(source)
        os.close(target)
    return [Row(name, found[name].wall / COUNT * 1e6, None, "us") for name in ways]


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        return [*made(), *moved(Path(folder))]
