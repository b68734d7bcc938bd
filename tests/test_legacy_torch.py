"""Files that torch wrote before version 1.6: refused, unless the caller names the format that reads them."""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import funcmodel as fm
from funcmodel.core.limits import LIMITS
from funcmodel.errors import CheckpointError, HeaderError, StalePlanError, UnknownFormatError
from funcmodel.run.files import open_regular

LEGACY = (fm.legacy_torch(".pt"), *fm.FORMATS)
BASE = torch.arange(24.0).reshape(4, 6)
STATE = {
    "a": BASE,
    "t": BASE.t(),
    "cut": BASE[1:, 2:4],
    "tied": BASE,
    "half": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, 2),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


def legacy(path: Path, value: Any) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return legacy(tmp_path / "m.pt", STATE)


def test_it_is_read_only_when_it_is_named(path: Path) -> None:
    with pytest.raises(HeaderError) as caught:
        fm.scan(path)
    assert caught.value.code == "BIN_NOT_ZIP"
    plan = fm.scan(path, formats=LEGACY)
    with pytest.raises(UnknownFormatError):
        fm.materialize(plan)
    found = fm.materialize(plan, formats=LEGACY)
    assert list(found) == list(STATE)
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in STATE.items())
    assert plan["a"] == plan["tied"] == fm.expr.transpose(plan["t"])


def test_it_loads_slices_and_becomes_safetensors(path: Path, tmp_path: Path) -> None:
    plan = fm.scan(path, formats=LEGACY)
    part = fm.materialize({"w": fm.expr.narrow(plan["t"], 0, 2, 5)}, formats=LEGACY)["w"]
    assert torch.equal(part, BASE.t()[2:5])
    fm.save(plan, tmp_path / "out", formats=LEGACY)
    saved = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in STATE.items())
    net = torch.nn.Linear(6, 4)
    weights = legacy(tmp_path / "net.pt", {"net": net.state_dict(), "step": 3})
    other = fm.load(torch.nn.Linear(6, 4), fm.scan(weights, key="net", formats=LEGACY), formats=LEGACY)
    assert torch.equal(other.weight, net.weight)


def test_many_tensors_from_threads(tmp_path: Path) -> None:
    state = {str(i): torch.full((1 << 17,), float(i)) for i in range(40)}
    path = legacy(tmp_path / "m.pt", state)
    found = fm.materialize(fm.scan(path, formats=LEGACY), formats=LEGACY)
    assert all(torch.equal(found[k], v) for k, v in state.items())


def test_small_tensors_that_are_read_at_once(tmp_path: Path) -> None:
    state = {str(i): torch.arange(16.0) + i for i in range(9)}
    path = legacy(tmp_path / "m.pt", state)
    found = fm.materialize(fm.scan(path, formats=LEGACY), formats=LEGACY)
    assert all(torch.equal(found[k], v) for k, v in state.items())


def test_any_changed_byte_makes_a_plan_stale(path: Path) -> None:
    plan = fm.scan(path, formats=LEGACY)
    data = bytearray(path.read_bytes())
    for at in (0, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(StalePlanError):
            fm.materialize(plan, formats=LEGACY)


def refused(path: Path, code: str, **scan: Any) -> HeaderError:
    with pytest.raises(HeaderError) as caught:
        fm.scan(path, formats=LEGACY, **scan)
    assert (caught.value.code, caught.value.path) == (code, str(path))
    return caught.value


def test_what_torch_load_refuses_is_typed(tmp_path: Path, path: Path) -> None:
    whole = path.read_bytes()
    for data in (b"", b"x", pickle.dumps({"w": print}), whole[:100], whole[:-1], safetensors.torch.save({"w": BASE})):
        path.write_bytes(data)
        refused(path, "BIN_LEGACY")
    torch.save(STATE, path)
    refused(path, "BIN_LEGACY_ZIP")
    legacy(path, {"w": print})
    refused(path, "BIN_LEGACY")


def test_what_it_holds_is_checked_as_in_a_zip(path: Path) -> None:
    legacy(path, {"model": {"w": BASE}, "step": 3, "list": [BASE]})
    assert refused(path, "BIN_NOT_A_STATE_DICT").candidates == (("model",),)  # type: ignore[attr-defined]
    refused(path, "BIN_NO_SUCH_KEY", key="x")
    refused(legacy(path, [BASE]), "BIN_NOT_A_DICT")
    refused(legacy(path, {1: BASE}), "BIN_KEY_TYPE")
    refused(legacy(path, {"w": torch.ones(1).expand(9)}), "BIN_EXPANDED")
    refused(legacy(path, {"w": torch.ones(2, 2).to_sparse()}), "BIN_NOT_A_STATE_DICT")
    refused(legacy(path, {"w": torch.ones(2, dtype=torch.complex64).conj()}), "BIN_TENSOR_META")


def test_an_old_torch_is_not_trusted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    refused(path, "BIN_LEGACY_TORCH")


def test_mutations_give_a_plan_or_a_typed_error(path: Path) -> None:
    whole = path.read_bytes()
    scan, codes = LEGACY[0].scan, []
    for at in range(0, min(len(whole), 900), 3):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with open_regular(path) as file:
            try:
                scan(file, LIMITS)
            except CheckpointError as error:
                codes.append(error.code)
    assert (
        {"BIN_LEGACY"}
        <= set(codes)
        <= {"BIN_LEGACY", "BIN_KEY_TYPE", "NAME_CONTROL", "BIN_NOT_A_STATE_DICT"}
        | {
            *(
                "BIN_NOT_A_DICT",
                "BIN_GEOMETRY",
                "BIN_OUT_OF_BOUNDS",
                "BIN_EXPANDED",
                "BIN_STRIDES",
                "NAME_EMPTY",
                "BAD_UTF8",
            )
        }
    )


def test_a_storage_that_the_file_does_not_list_is_not_filled_with_whatever_memory_holds(tmp_path: Path) -> None:
    data = legacy(tmp_path / "m.pt", {"w": torch.zeros(50)}).read_bytes()
    stream = io.BytesIO(data)
    for _ in range(4):
        for _opcode in pickletools.genops(stream):
            continue
    evil = tmp_path / "evil.pt"
    evil.write_bytes(data[: stream.tell()] + pickle.dumps([], 2) + bytes(400))
    with pytest.raises(HeaderError) as caught:
        fm.scan(evil, formats=LEGACY)
    assert caught.value.code == "BIN_LEGACY"
