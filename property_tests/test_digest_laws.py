"""Digest laws: what is recorded is what is stored, and no bit of a file can change unseen."""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcmodel as fm
from funcmodel.records.expressions import Live
from funcmodel.records.plans import StateDictPlan
from funcmodel.run.tensors import tensor_spec
from property_tests.test_saving_laws import LIMITS, NAMES, tensors

STATES = st.dictionaries(NAMES, tensors(), min_size=1, max_size=5)


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def saved(state: Mapping[str, Tensor], folder: str, limit: int | None) -> fm.CheckpointSpec:
    plan = StateDictPlan({key: Live(key, tensor_spec(tensor)) for key, tensor in state.items()})
    return fm.apply(fm.plan_save(plan, max_shard_size=limit, digests="sha256"), folder, live=state, durability="none")


@given(STATES, LIMITS)
def test_digests_are_those_of_the_bytes_another_reader_finds(state: dict[str, Tensor], limit: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = saved(state, folder, limit)
        assert checkpoint == fm.scan_checkpoint(folder)
        for file in checkpoint.files:
            for key, tensor in safetensors.torch.load_file(file.path).items():
                assert file.metadata[f"sha256:{key}"] == hashlib.sha256(raw(tensor)).hexdigest()
        assert fm.recorded(checkpoint) == ()
        assert set(fm.verify(folder).verified) == set(state)
        found = fm.materialize(fm.scan(folder), digest="check")
        assert {key: raw(t) for key, t in found.items()} == {key: raw(t) for key, t in state.items()}


@given(STATES, LIMITS, st.data())
def test_a_flipped_bit_of_data_names_its_file_and_its_tensor(
    state: dict[str, Tensor], limit: int | None, data: st.DataObject
) -> None:
    full = {key: tensor for key, tensor in state.items() if tensor.nbytes} or {"w": torch.ones(3)}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = saved({**state, **full}, folder, limit)
        plan = fm.scan(folder)
        chosen = data.draw(st.sets(st.sampled_from(sorted(full)), min_size=1, max_size=3))
        expected = set()
        for key in chosen:
            file, stored = next((f, f.tensors[key]) for f in checkpoint.files if key in f.tensors)
            _flip(file.path, data.draw(st.integers(stored.start, stored.stop - 1)), data.draw(st.integers(0, 7)))
            expected.add((file.path, key, "DIGEST"))
        for act in (
            lambda: fm.verify(folder),
            lambda: fm.materialize(plan, digest="check"),
            lambda: next(fm.stream(fm.scan(folder), digest="check")),
        ):
            with pytest.raises(fm.DigestError) as caught:
                act()
            assert {(one.file, one.tensor, one.code) for one in caught.value.findings} == expected
        rest = {key: expr for key, expr in plan.items() if key not in chosen}
        assert fm.materialize(rest, digest="check").keys() == rest.keys()


@given(STATES, LIMITS, st.data())
def test_no_bit_of_a_header_can_change_unseen(state: dict[str, Tensor], limit: int | None, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = saved(state, folder, limit)
        plan = fm.scan(folder)
        file = data.draw(st.sampled_from(checkpoint.files))
        header = min((t.start for t in file.tensors.values()), default=file.nbytes)
        written = len(Path(file.path).read_bytes()[:header].rstrip(b" "))
        for _ in range(2):
            at = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, written - 1)))
            bit = data.draw(st.integers(0, 7))
            _flip(file.path, at, bit)
            with pytest.raises(fm.CheckpointError):
                fm.verify(folder)
            with pytest.raises(fm.CheckpointError):
                fm.materialize(fm.scan(folder), digest="check")
            reads = StateDictPlan({key: expr for key, expr in plan.items() if key in file.tensors})
            if reads:
                with pytest.raises(fm.StalePlanError):
                    fm.materialize(reads, digest="check")
            _flip(file.path, at, bit)
        assert set(fm.verify(folder).verified) == set(state)


def _flip(path: str, at: int, bit: int) -> None:
    content = bytearray(Path(path).read_bytes())
    content[at] ^= 1 << bit
    Path(path).write_bytes(content)
