"""`DType` against torch and safetensors, which know the facts."""

import pickle

import pytest
import safetensors.torch
import torch

from funcmodel.records.dtypes import DTYPES, FROM_SAFETENSORS, DType, dtype
from funcmodel.run.tensors import TORCH_DTYPES

HELD = [d for d in DTYPES if d in TORCH_DTYPES]
FLOATS = [d for d in HELD if d.kind == "float"]


@pytest.mark.parametrize("d", HELD, ids=repr)
def test_bits_are_torch_s(d: DType) -> None:
    assert d.bits * d.pack == TORCH_DTYPES[d].itemsize * 8


@pytest.mark.parametrize("d", [d for d in FLOATS if d.pack == 1 and d.bits > 16], ids=repr)
def test_limits_of_wide_floats_are_torch_s(d: DType) -> None:
    info = torch.finfo(TORCH_DTYPES[d])
    assert d.largest == info.max
    assert 2.0 ** (1 - d.precision) == info.eps
    assert d.tiniest == info.tiny * info.eps


@pytest.mark.parametrize("d", [d for d in FLOATS if d.pack == 1 and d.bits <= 16], ids=repr)
def test_limits_of_narrow_floats_are_those_of_all_their_values(d: DType) -> None:
    patterns = torch.arange(2**d.bits, dtype=torch.int32).to(torch.uint8 if d.bits == 8 else torch.uint16)
    values = patterns.view(TORCH_DTYPES[d]).to(torch.float64)
    positive = values[values.isfinite() & (values > 0)].unique()
    assert d.largest == positive.max()
    assert d.tiniest == positive.min()
    assert 2.0 ** (1 - d.precision) == positive[positive > 1].min() - 1
    assert d.signed == bool((values < 0).any())


@pytest.mark.parametrize("d", [d for d in HELD if d.kind == "int"], ids=repr)
def test_ranges_are_torch_s(d: DType) -> None:
    info = torch.iinfo(TORCH_DTYPES[d])
    assert d.largest == float(info.max)
    assert d.signed == (info.min < 0)


@pytest.mark.parametrize("d", DTYPES, ids=repr)
def test_every_spelling_finds_it(d: DType) -> None:
    for spelling in (d.name, d.safetensors, d.torch and f"torch.{d.torch}", TORCH_DTYPES.get(d)):
        if spelling is not None:
            assert dtype(spelling) is d
    assert pickle.loads(pickle.dumps(d)) is d


def test_safetensors_names_are_all_there() -> None:
    known = set(safetensors.torch._TYPES)
    assert known <= set(FROM_SAFETENSORS)
    for name, held in safetensors.torch._TYPES.items():
        assert TORCH_DTYPES[FROM_SAFETENSORS[name]] == held


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown"):
        dtype("float31")
