"""What digests cost: to record them at a save, to verify them, to check them before a load.

Everything is compared with SHA-256 over the same bytes in memory, by one thread, in the same run; nothing can be faster
on one core. Files are in the page cache, and saves are not flushed to the disk.
"""

import hashlib
import tempfile
from pathlib import Path

import torch

import funcmodel as fm
from tests.benchmarks import Row, timed

LARGE, SMALL = 12, 4_000  # tensors of 16 MiB, and of 4 KiB


def state() -> dict[str, torch.Tensor]:
    large = {f"layers.{i}.weight": torch.randn(2048, 2048) for i in range(LARGE)}
    return large | {f"norms.{i}.weight": torch.randn(1024) for i in range(SMALL)}


def by_hand(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {key: hashlib.sha256(tensor.numpy()).hexdigest() for key, tensor in tensors.items()}


def rows(repeats: int = 5) -> list[Row]:
    tensors = state()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recorded")
        fm.save(tensors, path, digests="sha256")

        def save(into: str, **options: str) -> object:
            return fm.save(tensors, Path(folder, into), durability="none", **options)

        found = timed(
            {
                "sha256": (lambda: tensors, by_hand),
                "save": (lambda: "plain", save),
                "save, sha256": (lambda: "digests", lambda into: save(into, digests="sha256")),
                "verify": (lambda: path, fm.verify),
                "load": (lambda: fm.scan(path), fm.materialize),
                "load, check": (lambda: fm.scan(path), lambda plan: fm.materialize(plan, digest="check")),
            },
            repeats,
        )
        metadata = fm.scan_checkpoint(path).files[0].metadata
        assert by_hand(tensors) == {key: metadata[f"sha256:{key}"] for key in tensors}
    plain = found["sha256"]
    size = sum(tensor.nbytes for tensor in tensors.values())
    return [
        Row("sha256 by hand, one thread", size / plain.wall / 1e9, None, "GB/s"),
        Row("verify / sha256, wall", found["verify"].wall / plain.wall, 1.5, "x"),
        Row("verify / sha256, CPU", found["verify"].cpu / plain.cpu, 2.0, "x"),
        Row("save with digests / (sha256 + save), wall", found["save, sha256"].wall / (plain.wall + found["save"].wall),
            1.3, "x"),
        Row("save with digests / sha256, wall", found["save, sha256"].wall / plain.wall, None, "x"),
        Row("save without / sha256, wall", found["save"].wall / plain.wall, None, "x"),
        Row("load with a check / (sha256 + load), wall", found["load, check"].wall / (plain.wall + found["load"].wall),
            1.4, "x"),
    ]  # fmt: skip
