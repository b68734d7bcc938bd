"""The same bits on a GPU as on the CPU."""

from pathlib import Path

import pytest
import torch
from torch import nn

import funcmodel as fm

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def build() -> nn.Module:
    net = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 50, bias=False))
    net[3].weight = net[0].weight
    return net


def leaves(net: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers(remove_duplicate=False))}


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_a_load_onto_the_device_is_the_load_onto_the_cpu(dtype: str | None, tmp_path: Path) -> None:
    fm.save(build(), tmp_path, max_shard_size="1KB")
    source = fm.scan(tmp_path) if dtype is None else fm.cast(dtype)(fm.scan(tmp_path))
    here = fm.load(fm.skeleton(build), source)
    there = fm.load(fm.skeleton(build), source, device_map="cuda:0")
    assert there[3].weight is there[0].weight
    for name, leaf in leaves(there).items():
        assert leaf.device == torch.device("cuda:0")
        assert torch.equal(leaf.cpu(), leaves(here)[name])


@pytest.mark.parametrize("commit", ["swap", "in_place"])
def test_a_module_on_the_device_stays_there(commit: str, tmp_path: Path) -> None:
    saved, net = build(), build().cuda()
    fm.save(saved, tmp_path)
    before = {name: id(leaf) for name, leaf in leaves(net).items()}
    fm.load(net, tmp_path, commit=commit)  # type: ignore[arg-type]
    assert {name: id(leaf) for name, leaf in leaves(net).items()} == before
    assert all(torch.equal(leaf.cpu(), leaves(saved)[name]) for name, leaf in leaves(net).items())


def test_a_save_from_the_device_is_the_save_from_the_cpu(tmp_path: Path) -> None:
    net = build()
    fm.save(net, tmp_path / "cpu")
    fm.save(net.cuda(), tmp_path / "cuda")
    assert (tmp_path / "cpu/model.safetensors").read_bytes() == (tmp_path / "cuda/model.safetensors").read_bytes()


def test_a_slice_through_a_cast_is_the_same_on_both(tmp_path: Path) -> None:
    fm.save(build(), tmp_path)
    part = fm.pipe(fm.scan(tmp_path), fm.tp_slice({"1.{*r}": 0}, rank=1, world_size=2), fm.cast("bfloat16"))
    here, there = fm.materialize(part), fm.materialize(part, device="cuda:0")
    assert all(torch.equal(there[key].cpu(), here[key]) for key in here)
