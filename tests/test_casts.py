"""`core.casts` against torch: every value of every narrow dtype, and the edges of the wide ones, there and back."""

import warnings
from functools import cache

import pytest
import torch

from funcmodel.core.casts import exact_cast, holds, loss
from funcmodel.records.dtypes import DTYPES, DType, dtype

IN_TORCH = tuple(d for d in DTYPES if d.torch and d.bits >= 8)
REAL = tuple(d for d in IN_TORCH if d.kind != "complex")
FLOATS = tuple(d for d in REAL if d.kind == "float")
EDGES = (0, 1, 2, 7, 8, 10, 11, 15, 16, 23, 24, 25, 31, 32, 52, 53, 54, 62, 63)


def torch_of(d: DType) -> torch.dtype:
    found = getattr(torch, str(d.torch))
    assert isinstance(found, torch.dtype)
    return found


@cache
def values_of(d: DType) -> torch.Tensor:
    """Every value of a dtype of up to 16 bits; of a wider one the values at which something can change."""
    if d.kind == "bool":
        return torch.tensor([False, True])
    if d.bits <= 16:
        bits = torch.arange(2**d.bits, dtype=torch.int64)
        return bits.to(torch.uint8 if d.bits == 8 else torch.uint16).view(torch_of(d))
    if d.kind == "int":
        limit = 2**d.precision
        edges = {s * (2**i + j) for i in EDGES for j in (-1, 0, 1) for s in (1, -1)} | {limit - 1, -limit}
        kept = sorted(v for v in edges if (-limit if d.signed else 0) <= v < limit)
        return torch.tensor([v - 2**64 if v >= 2**63 else v for v in kept]).to(torch_of(d))
    # A cast that is exact on every narrower type's values may still drop the last bit of this one.
    narrow = [values_of(n).double() for n in REAL if n.bits <= 16 and n.kind == "float"]
    edges = [d.largest, -d.largest, d.tiniest, 1 + 2.0 ** (1 - d.precision), 1 / 3, 2.0**-130, 2.0**100]
    own = torch.tensor(edges, dtype=torch.float64)
    return torch.cat([*narrow, own]).to(torch_of(d))


def survives(source: DType, target: DType) -> bool:
    """Whether torch's conversion keeps every sampled value, up to the payload of a NaN."""
    before = values_of(source)
    after = before.to(torch_of(target))
    if source.kind != "float":
        return bool(before.tolist() == after.tolist())
    a, b = before.double(), after.double()
    return bool(((a.view(torch.int64) == b.view(torch.int64)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("source", REAL, ids=repr)
def test_exact_is_what_torch_keeps(source: DType) -> None:
    """bool to int or float changes the kind although every value survives, so kinds are left out."""
    for target in REAL:
        if loss(source, target) != "kind":
            assert (loss(source, target) == "exact") is survives(source, target), target


@pytest.mark.parametrize("source", FLOATS, ids=repr)
def test_rounding_stays_near(source: DType) -> None:
    """Where the loss is no more than rounding, finite stays finite below the last binade, and signs and NaNs stay."""
    for target in FLOATS:
        if loss(source, target) in ("exact", "rounding"):
            before = values_of(source).double()
            after = values_of(source).to(torch_of(target)).double()
            assert (before.isnan() == after.isnan()).all()
            assert (before.sign() * after.sign() >= 0)[~before.isnan()].all()
            near = (before - after).abs() <= before.abs() * 2.0**-target.precision + target.tiniest
            assert (near | after.isinf() & (before.abs() >= target.largest) | before.isnan()).all(), target


@pytest.mark.parametrize("source", FLOATS, ids=repr)
def test_range_leaves_the_range(source: DType) -> None:
    """Where the loss is of range, torch turns a number into something that is no rounding of it."""
    for target in FLOATS:
        if loss(source, target) == "range":
            before = values_of(source).double()
            after = values_of(source).to(torch_of(target)).double()
            near = (before - after).abs() <= before.abs() * 2.0**-target.precision + target.tiniest
            assert (~near & (before != after) & ~before.isnan()).any(), target


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("bfloat16", "float32", "exact"),
        ("float16", "float32", "exact"),
        ("float8_e4m3fn", "float16", "exact"),
        ("float8_e5m2", "float16", "exact"),
        ("float8_e8m0fnu", "bfloat16", "exact"),
        ("float32", "bfloat16", "rounding"),
        ("float16", "bfloat16", "rounding"),
        ("float64", "float32", "range"),
        ("float32", "float16", "range"),
        ("bfloat16", "float16", "range"),
        ("float8_e5m2", "float8_e4m3fn", "range"),
        ("float8_e5m2", "float8_e5m2fnuz", "range"),
        ("int64", "int32", "range"),
        ("uint8", "int8", "range"),
        ("int8", "uint8", "range"),
        ("int8", "int64", "exact"),
        ("uint32", "int64", "exact"),
        ("int32", "float32", "rounding"),
        ("int32", "float64", "exact"),
        ("int16", "float32", "exact"),
        ("int8", "bfloat16", "exact"),
        ("uint16", "float16", "range"),
        ("float32", "int64", "kind"),
        ("float32", "bool", "kind"),
        ("bool", "int64", "kind"),
        ("bool", "float32", "kind"),
        ("complex64", "float32", "kind"),
        ("float32", "complex64", "kind"),
        ("complex64", "complex128", "exact"),
        ("complex128", "complex64", "range"),
        ("F4", "float8_e4m3fn", "exact"),
        ("F4", "F6_E2M3", "exact"),
        ("F6_E2M3", "F6_E3M2", "rounding"),
        ("float8_e4m3fn", "F4", "range"),
    ],
)
def test_loss(source: str, target: str, expected: str) -> None:
    assert loss(dtype(source), dtype(target)) == expected
    assert exact_cast(dtype(source), dtype(target)) is (expected == "exact")


@pytest.mark.parametrize("d", DTYPES, ids=repr)
def test_every_dtype_is_exactly_itself(d: DType) -> None:
    assert loss(d, d) == "exact"


VALUES: tuple[complex, ...] = (
    *(0, 1, -1, 3, 6.5, 0.1, 448, 449, 255, 256, -128, -129, 65504, 65535, 2**24 + 1, 2**53, 2**53 + 1, 2.0**-149),
    *(0.0, -0.0, float("inf"), float("-inf"), float("nan"), True, 2**63 - 1, 2**63, -(2**63), 1j, 1 + 0j, 0.1j),
)


def held(d: DType, value: complex) -> bool:
    """Whether a tensor of `d` made from `value` gives the value back, and refuses or changes any other."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.tensor(value, dtype=torch_of(d)).item()
    except (RuntimeError, OverflowError, ValueError, TypeError):
        return False
    if value == 0 and isinstance(value, float) and d.kind != "complex":
        return str(found) == str(value) or (d.kind != "float" and str(value) == "0.0")
    return found == value or (found != found and value != value)


@pytest.mark.parametrize("d", IN_TORCH, ids=repr)
def test_holds_is_what_torch_holds(d: DType) -> None:
    for value in VALUES:
        if isinstance(value, complex) and d.kind != "complex":
            assert not holds(d, value)
        elif not (d.name == "uint64" and isinstance(value, float)):  # torch makes no uint64 from a float
            assert holds(d, value) is held(d, value), value
