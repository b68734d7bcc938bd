"""Files of torch.save: what torch.load reads is what the plan reads, and no bytes whatever do anything else."""

import io
import pickle
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcmodel as fm
from funcmodel.core.opcodes import unpickled
from funcmodel.core.strided import Arrangement, Joined, arranged, extent
from funcmodel.errors import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2)


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "m.bin"


def fail(code: str, found: str) -> CheckpointError:
    return CheckpointError(found, code=code)


def raw(tensor: torch.Tensor) -> tuple[Any, ...]:
    dense = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return tensor.dtype, tensor.shape, bytes(dense.view(torch.uint8).numpy())


@st.composite
def bases(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    kind = draw(st.sampled_from(DTYPES))
    count = torch.Size(shape).numel()
    numbers = torch.arange(count).remainder(2 if kind is torch.bool else 251)
    return numbers.to(kind).reshape(shape)


@st.composite
def views(draw: st.DrawFn, base: torch.Tensor) -> torch.Tensor:
    view = base
    for _ in range(draw(st.integers(0, 4))):
        if not view.ndim:
            break
        axis = draw(st.integers(0, view.ndim - 1))
        match draw(st.sampled_from(("narrow", "step", "select", "permute", "unsqueeze", "split"))):
            case "narrow":
                start = draw(st.integers(0, view.shape[axis]))
                view = view.narrow(axis, start, draw(st.integers(0, view.shape[axis] - start)))
            case "step":
                index = [slice(None)] * view.ndim
                index[axis] = slice(draw(st.integers(0, 3)), None, draw(st.integers(1, 3)))
                view = view[tuple(index)]
            case "select" if view.shape[axis]:
                view = view.select(axis, draw(st.integers(0, view.shape[axis] - 1)))
            case "permute":
                view = view.permute(draw(st.permutations(range(view.ndim))))
            case "unsqueeze":
                view = view.unsqueeze(axis)
            case "split" if view.shape[axis] % 2 == 0 and view.shape[axis]:
                view = view.unflatten(axis, (2, -1))
            case _:
                pass
    return view


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for base in draw(st.lists(bases(), max_size=3)):
        for _ in range(draw(st.integers(1, 3))):
            found[f"k{len(found)}"] = draw(views(base))
    return found


@given(state_dicts(), st.sampled_from((2, 3, 4, 5)))
def test_a_plan_reads_what_torch_saved(path: Path, state: dict[str, torch.Tensor], protocol: int) -> None:
    """materialize(scan(save(s))) ~ load(save(s)) = s"""
    torch.save(state, path, pickle_protocol=protocol)
    found = fm.materialize(fm.scan(path))
    expected = torch.load(path, weights_only=True) if protocol == 2 else state
    assert list(found) == list(expected)
    assert [raw(v) for v in found.values()] == [raw(v) for v in expected.values()]


@given(state_dicts())
def test_equal_views_are_equal_expressions(path: Path, state: dict[str, torch.Tensor]) -> None:
    """e(a) = e(b) for two names a and b of one view"""
    twice = {**state, **{f"again {k}": v for k, v in state.items() if v.numel()}}
    torch.save(twice, path)
    plan = fm.scan(path)
    assert all(plan[f"again {k}"] == plan[k] for k, v in state.items() if v.numel())


@given(state_dicts(), st.lists(st.text("ab", min_size=1, max_size=2), min_size=1, max_size=3))
def test_a_key_is_a_path(path: Path, state: dict[str, torch.Tensor], keys: list[str]) -> None:
    """scan(save({k: s}), key=k) ~ scan(save(s))"""
    nested: Any = state
    for key in reversed(keys):
        nested = {"other": 3, key: nested}
    torch.save(nested, path)
    found = fm.materialize(fm.scan(path, key=tuple(keys)))
    assert [raw(v) for v in found.values()] == [raw(v) for v in state.values()]


@given(st.data(), st.integers(0, 7), st.integers(0, 7))
def test_blocks_hold_exactly_the_elements(data: st.DataObject, before: int, behind: int) -> None:
    """Every element that blocks name is the strided one, and blocks lie within the storage, however tight it is."""
    view = data.draw(bases().flatmap(views))
    if not view.numel():
        return
    shape, strides = tuple(view.shape), view.stride()
    offset, numel = before, before + extent(shape, strides) + behind
    found = arranged(shape, strides, offset, numel)
    assert found is not None
    storage = torch.arange(numel)

    def tensor(part: Arrangement) -> torch.Tensor:
        if isinstance(part, Joined):
            return torch.cat([tensor(part.head), tensor(part.tail)], part.axis)
        size = torch.Size(part.shape).numel()
        assert 0 <= part.start <= part.start + size <= numel
        dense = storage[part.start : part.start + size].reshape(part.shape)
        cut = dense[tuple(a if isinstance(a, int) else slice(*a) for a in part.at)]
        return cut[tuple(slice(None, None, step) for step in part.steps)].permute(part.dims)

    assert torch.equal(tensor(found), torch.as_strided(storage, shape, strides, offset))


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_strides_that_share_elements_have_no_blocks(shape: list[int], data: st.DataObject) -> None:
    """arranged(s) is None, or names each element once"""
    strides = tuple(data.draw(st.lists(st.integers(0, 30), min_size=len(shape), max_size=len(shape))))
    numel = extent(tuple(shape), strides)
    places = torch.as_strided(torch.arange(numel), shape, strides).reshape(-1).tolist()
    if len(set(places)) < len(places):
        assert arranged(tuple(shape), strides, 0, numel) is None


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=25,
)


@given(PLAIN, st.sampled_from((2, 3, 4, 5)))
def test_plain_values_are_what_pickle_says(value: Any, protocol: int) -> None:
    """unpickled(dumps(v)) = v"""
    assert unpickled(pickle.dumps(value, protocol), None, fail) == value  # type: ignore[arg-type]


@given(st.binary(max_size=200), st.sampled_from((2, 4)))
def test_any_bytes_are_a_value_or_a_typed_error(data: bytes, protocol: int) -> None:
    """unpickled(b) is a value or a CheckpointError"""

    class Words:
        def find(self, name: str) -> Any:
            raise fail("FIND", name)

        def call(self, function: Any, args: Any) -> Any:
            raise fail("CALL", "")

        def stored(self, pid: Any) -> Any:
            raise fail("STORED", "")

    try:
        unpickled(bytes((0x80, protocol)) + data, Words(), fail)
    except CheckpointError as error:
        assert error.code in {"BIN_PICKLE", "FIND", "CALL", "STORED", "DUPLICATE_KEY", "BIN_GLOBAL_FORBIDDEN"}  # noqa: PT017


@cache
def whole(protocol: int) -> bytes:
    base, data = torch.arange(40.0).reshape(4, 10), io.BytesIO()
    parts = {"a": base, "t": base.t(), "cut": base[:, 5:8], "tied": base, "p": torch.nn.Parameter(torch.ones(2))}
    torch.save({**parts, "h": torch.ones(3, dtype=torch.float8_e4m3fn)}, data, pickle_protocol=protocol)
    return data.getvalue()


MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(("bit", "byte", "number", "cut", "put")), st.binary()),
    min_size=8,
    max_size=24,
)


@given(MUTATIONS, st.sampled_from((2, 4)))
def test_any_mutation_is_a_plan_or_a_typed_error(path: Path, mutations: list[Any], protocol: int) -> None:
    """scan(mutated(f)) is a plan that can be read, or a CheckpointError; and torch.load never reads it otherwise."""
    for place, what, fill in mutations:
        data = bytearray(whole(protocol))
        at, fill = int(place * len(data)), fill or b"\xff"
        match what:
            case "bit":
                data[at] ^= 1 << fill[0] % 8
            case "byte":
                data[at] = fill[0]
            case "number":
                data[at : at + 4] = (fill * 4)[:4]
            case "cut":
                del data[at : at + len(fill)]
            case _:
                data[at:at] = fill
        path.write_bytes(data)
        try:
            found = fm.materialize(fm.scan(path))
        except CheckpointError as error:
            assert error.code  # noqa: PT017
            continue
        if protocol == 2:
            _agree(path, found)


def _agree(path: Path, found: dict[str, torch.Tensor]) -> None:
    try:
        expected = torch.load(path, weights_only=True)
    except Exception:  # torch refuses what is not asked for here, such as a damaged record that no tensor uses
        return
    assert [(k, raw(v)) for k, v in found.items()] == [(k, raw(v)) for k, v in expected.items()]
