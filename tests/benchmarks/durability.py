"""What it costs that a save is a transaction: against writing and flushing the same bytes to as many files."""

import os
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

import funcmodel as fm
from tests.benchmarks import Row, timed

Tensors = dict[str, torch.Tensor]
CASES = {
    "1 MB in 16 tensors, one file": (16, 1 << 14, None),
    "200 MB in 8 tensors, one file": (8, 25 << 18, None),
    "200 MB in 8 tensors, 8 shards": (8, 25 << 18, 25 << 20),
}


def raw(tensors: Tensors, folder: Path, shards: int, *, flush: bool) -> None:
    """The bytes alone: no header, no index, no name that is ever replaced."""
    keys = list(tensors)
    step = len(keys) // shards
    for i in range(shards):
        fd = os.open(folder / f"{i}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for key in keys[i * step : (i + 1) * step]:
                view = memoryview(tensors[key].numpy()).cast("B")
                while view:
                    view = view[os.write(fd, view) :]
            if flush:
                os.fsync(fd)
        finally:
            os.close(fd)


def rows(repeats: int = 7) -> list[Row]:
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as root:
        fresh = count()

        def folder(held: Tensors | None = None, limit: int | None = None) -> Callable[[], Path]:
            def make() -> Path:
                path = Path(root, f"{next(fresh)}")
                path.mkdir()
                if held is not None:
                    fm.save(held, path, max_shard_size=limit)
                os.sync()
                return path

            return make

        for name, (number, size, limit) in CASES.items():
            tensors = {f"{i:02d}": torch.full((size,), float(i)) for i in range(number)}
            shards = 1 if limit is None else number
            times = timed(
                {
                    "raw": (folder(), lambda at, t=tensors, n=shards: raw(t, at, n, flush=True)),
                    "fresh": (folder(), lambda at, t=tensors, m=limit: fm.save(t, at, max_shard_size=m)),
                    "again": (folder(tensors, limit), lambda at, t=tensors, m=limit: fm.save(t, at, max_shard_size=m)),
                    "raw, not flushed": (folder(), lambda at, t=tensors, n=shards: raw(t, at, n, flush=False)),
                    "not flushed": (
                        folder(),
                        lambda at, t=tensors, m=limit: fm.save(t, at, max_shard_size=m, durability="none"),
                    ),
                },
                repeats,
            )
            flushed, plain = times["raw"].wall, times["raw, not flushed"].wall
            found += [
                Row(f"{name}: saved into a new folder / raw write + fsync", times["fresh"].wall / flushed, None, "x"),
                Row(f"{name}: saved over a checkpoint / raw write + fsync", times["again"].wall / flushed, None, "x"),
                Row(f"{name}: durability='none' / raw write", times["not flushed"].wall / plain, None, "x"),
                Row(f"{name}: raw write + fsync / raw write", flushed / plain, None, "x"),
            ]
    return found
