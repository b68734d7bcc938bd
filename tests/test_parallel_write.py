"""Shards of a large save are written side by side: the same bytes, the same errors, and no thread that outlives it."""

import errno
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import funcmodel as fm
from funcmodel.core import build
from funcmodel.run.faults import faulty
from funcmodel.run.filesystem import REAL

MIB = 1 << 20


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    large = {f"w{i}": torch.randn(9 * MIB // 4, generator=generator) for i in range(8)}
    small = {f"b{i}": torch.randn(7, 3, generator=generator) for i in range(50)}
    return {**large, **small, "turned": torch.randn(600, 900, generator=generator).t()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_are_those_that_one_thread_writes(tensors, tmp_path):
    fm.save(tensors, tmp_path / "beside", shards=4)
    for file in sorted((tmp_path / "beside").glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            assert torch.equal(tensor, tensors[key])
    # What is computed is computed by one thread, so this is written file after file.
    same = fm.combine("mean", fm.scan(tmp_path / "beside"), fm.scan(tmp_path / "beside"))
    fm.save(same, tmp_path / "alone", shards=4)
    assert contents(tmp_path / "alone").keys() == contents(tmp_path / "beside").keys()
    assert contents(tmp_path / "alone") == contents(tmp_path / "beside")


def test_files_are_rewritten_side_by_side_onto_themselves(tensors, tmp_path):
    fm.save(tensors, tmp_path, max_shard_size=None)
    fm.save(fm.scan(tmp_path), tmp_path, shards=4, digests="sha256")
    assert len(fm.verify(tmp_path).verified) == len(tensors)
    found = fm.materialize(fm.scan(tmp_path))
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_rows_of_stored_tensors_are_written_side_by_side_too(tensors, tmp_path):
    fm.save(tensors, tmp_path, max_shard_size=None)
    rows = {key: build.narrow(expr, 0, 1, 5) for key, expr in fm.scan(tmp_path).items()}
    mixed = {key: build.cast(expr, "float64") if key == "b7" else expr for key, expr in rows.items()}
    for name, wanted in {"rows": rows, "mixed": mixed}.items():
        plan = fm.plan_save(fm.StateDictPlan(wanted), shards=3)
        assert (fm.cost(plan).buffers < 64 * MIB) is (name == "rows")
        fm.write(plan, tmp_path / name)
        found = {}
        for file in (tmp_path / name).glob("*.safetensors"):
            found.update(load_file(file))
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            expected = tensor[1:5].double() if name == "mixed" and key == "b7" else tensor[1:5]
            assert found[key].dtype == expected.dtype
            assert torch.equal(found[key], expected)


@pytest.mark.parametrize("call", ["pwritev", "fsync"])
def test_an_error_in_one_thread_ends_all_and_leaves_the_old_checkpoint(tensors, tmp_path, call):
    fm.save({"old": torch.ones(3)}, tmp_path)
    before, running = contents(tmp_path), set(threading.enumerate())
    for at in (1, 2, 4):
        failing = faulty(REAL, at, errno.EIO, persistent=True, only=lambda made: made.name == call)
        with pytest.raises(fm.SaveError) as error:
            fm.save(tensors, tmp_path, shards=4, filesystem=failing)
        assert error.value.committed == "no"
        assert contents(tmp_path) == before
        assert set(threading.enumerate()) <= running


def test_one_file_cannot_be_several(tensors, tmp_path):
    with pytest.raises(ValueError):  # noqa: PT011
        fm.save(tensors, tmp_path / "one.safetensors", shards=4)
