"""Agreement with those who know: torch's own loader, safetensors' own writer and reader of models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrizations

import funcmodel as fm


def tied() -> nn.Module:
    net = nn.Sequential(nn.Embedding(7, 4), nn.LSTM(4, 4, num_layers=2), nn.Linear(4, 7, bias=False))
    net[2].weight = net[0].weight
    return net


def normed() -> nn.Module:
    conv = parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    return nn.Sequential(conv, nn.BatchNorm2d(3), parametrizations.spectral_norm(nn.Conv2d(3, 2, 1)), nn.Flatten())


def listed() -> nn.Module:
    net = nn.Module()
    net.weights = nn.ParameterList([torch.ones(2), torch.zeros(3)])
    net.named = nn.ParameterDict({"a": torch.ones(2, 2), "b": torch.zeros(())})
    net.register_buffer("whole", torch.arange(6).reshape(2, 3))
    net.register_buffer("hidden", torch.ones(2, dtype=torch.bool), persistent=False)
    return net


def attention() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def many_dtypes() -> nn.Module:
    net = nn.Module()
    kinds = (
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.complex64,
        torch.int8,
        torch.uint16,
    )
    for number, kind in enumerate(kinds):
        net.register_buffer(f"b{number}", torch.arange(5).to(kind))
    return net


FACTORIES = (tied, normed, listed, attention, many_dtypes)


def shaken(factory: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = factory()
        with torch.no_grad():
            for leaf in net.state_dict().values():
                if leaf.is_floating_point() and leaf.dtype.itemsize > 1:
                    leaf.add_(torch.randn(leaf.shape).to(leaf.dtype))
    return net


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].flatten().view(torch.uint8), b[k].flatten().view(torch.uint8))
        for k in a
    )


@pytest.mark.parametrize("factory", FACTORIES)
def test_load_does_what_load_state_dict_does(factory: Callable[[], nn.Module], tmp_path: Path) -> None:
    source = shaken(factory)
    safetensors.torch.save_file({k: v.clone() for k, v in source.state_dict().items()}, tmp_path / "model.safetensors")
    theirs = factory()
    theirs.load_state_dict(source.state_dict())
    for net in (fm.load(factory(), tmp_path), fm.load(fm.skeleton(factory), tmp_path)):
        assert same(net.state_dict(), theirs.state_dict())
    in_place = factory()
    pointers = [p.data_ptr() for p in in_place.parameters()]
    assert same(fm.load(in_place, tmp_path, commit="in_place").state_dict(), theirs.state_dict())
    assert [p.data_ptr() for p in in_place.parameters()] == pointers


@pytest.mark.parametrize("factory", FACTORIES)
def test_safetensors_load_model_reads_what_we_save(factory: Callable[[], nn.Module], tmp_path: Path) -> None:
    source, theirs = shaken(factory), factory()
    fm.save(source, tmp_path)
    missing, unexpected = safetensors.torch.load_model(theirs, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    assert same(theirs.state_dict(), source.state_dict())


@pytest.mark.parametrize("factory", FACTORIES)
def test_we_read_what_safetensors_save_model_writes(factory: Callable[[], nn.Module], tmp_path: Path) -> None:
    source = shaken(factory)
    safetensors.torch.save_model(source, str(tmp_path / "model.safetensors"))
    assert same(fm.load(fm.skeleton(factory), tmp_path).state_dict(), source.state_dict())


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_report_is_load_state_dict_s(factory: Callable[[], nn.Module], tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in shaken(factory).state_dict().items()}
    state["surplus"] = state.pop(next(iter(state)))
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    net = factory()
    theirs = net.load_state_dict(state, strict=False)
    report = fm.plan_load(fm.module_spec(net), fm.scan(tmp_path)).report
    held = {k for group in fm.module_spec(net).tied for k in group.keys if set(group.keys) & state.keys()}
    assert set(report.missing_keys) == set(theirs.missing_keys) - held
    assert list(report.unexpected_keys) == theirs.unexpected_keys
