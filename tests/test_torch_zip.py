"""Files of torch.save: planned without torch.load, and read as torch.load(weights_only=True) reads them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import funcmodel as fm
from funcmodel.errors import HeaderError, StalePlanError, UnknownFormatError

BASE = torch.arange(40.0).reshape(4, 10)


def oracle(path: Path, *keys: str) -> dict[str, torch.Tensor]:
    found = torch.load(path, weights_only=True, map_location="cpu")
    for key in keys:
        found = found[key]
    return dict(found)


def same(ours: Any, theirs: Any) -> bool:
    """Equal names in order, dtypes, shapes and bytes."""

    def raw(tensor: torch.Tensor) -> bytes:
        dense = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
        return bytes(dense.view(torch.uint8).numpy())

    return list(ours) == list(theirs) and all(
        (a.dtype, a.shape, raw(a)) == (b.dtype, b.shape, raw(b))
        for a, b in zip(ours.values(), theirs.values(), strict=True)
    )


def refused(path: Path, code: str, **scan: Any) -> HeaderError:
    with pytest.raises(HeaderError) as caught:
        fm.scan(path, **scan)
    assert (caught.value.code, caught.value.path) == (code, str(path))
    return caught.value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


# -- what torch.save writes --------------------------------------------------------------------------------------------


def every_dtype() -> dict[str, torch.Tensor]:
    from funcmodel.run.tensors import TORCH_DTYPES

    made = {}
    for dtype, kind in TORCH_DTYPES.items():
        data = torch.arange(1, 1 + 4 * kind.itemsize, dtype=torch.uint8)
        made[dtype.name] = data.remainder(2).bool() if kind is torch.bool else data.view(kind)
    return made


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_in_every_protocol(protocol: int, path: Path) -> None:
    tensors = every_dtype()
    torch.save(tensors, path, pickle_protocol=protocol)
    plan = fm.scan(path)
    assert same(fm.materialize(plan), tensors)
    assert {type(expr) for expr in plan.values()} == {fm.Read}
    if protocol == 2:
        assert same(fm.materialize(plan), oracle(path))


VIEWS: dict[str, torch.Tensor] = {
    "whole": BASE,
    "transposed": BASE.t(),
    "columns": BASE[:, 5:8],
    "last column": BASE[:, 9:],
    "box": BASE[1:3, 2:5],
    "row": BASE[1],
    "column": BASE[:, 3],
    "element": BASE[3, 9],
    "even columns": BASE[:, ::2],
    "third columns": BASE[1::2, 1::3],
    "even rows": BASE[::2],
    "steps that end inside a row": torch.arange(5.0)[::3],
    "steps that end inside rows": torch.arange(45.0).reshape(5, 9)[::2, ::2],
    "odd rows, cut and split": torch.arange(10.0).reshape(2, 5)[:, 1:].unflatten(1, (2, 2)),
    "steps in a box": torch.arange(105.0).reshape(3, 5, 7)[::2, ::2, ::2].permute(1, 2, 0),
    "end": BASE.reshape(-1)[7:],
    "turned": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
    "turned and cut": torch.arange(120).reshape(2, 3, 4, 5)[:, 1:, ::2, 1:3].permute(3, 1, 0, 2),
    "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "axes of one": torch.arange(12.0).reshape(1, 3, 1, 4)[:, :, :, 1:3].transpose(0, 3),
    "split axis": torch.arange(24.0).reshape(4, 6).t().reshape(2, 3, 4),
    "any stride on one": torch.as_strided(torch.arange(6.0), (1, 3), (77, 2), 1),
    "zero elements": torch.empty(3, 0).t(),
    "zero strides of one": torch.as_strided(torch.arange(6.0), (1, 1), (0, 0), 4),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view(name: str, path: Path) -> None:
    torch.save({"w": VIEWS[name]}, path)
    found = fm.materialize(fm.scan(path))
    assert same(found, oracle(path))
    assert found["w"].is_contiguous()


def test_all_views_at_once_also_as_safetensors(path: Path, tmp_path: Path) -> None:
    torch.save(VIEWS, path)
    plan = fm.scan(path)
    assert fm.from_json(fm.to_json(plan)) == plan
    assert fm.describe(plan)
    assert fm.nbytes(plan) == sum(v.nbytes for v in VIEWS.values())
    assert same(fm.materialize(plan), oracle(path))
    fm.save(plan, tmp_path / "out")
    saved = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert same({key: saved[key] for key in VIEWS}, oracle(path))


def test_parameters_buffers_and_attributes(path: Path) -> None:
    marked, module = nn.Parameter(torch.ones(2)), nn.BatchNorm1d(3)
    marked.tensor_model_parallel = True  # type: ignore[attr-defined]
    plain = torch.ones(3)
    plain.note = "x"  # type: ignore[attr-defined]
    state = module.state_dict()
    state.update(marked=marked, plain=plain, frozen=nn.Parameter(torch.ones(1), requires_grad=False))
    torch.save(state, path)
    assert same(fm.materialize(fm.scan(path)), oracle(path))


def test_names_on_the_same_bytes_are_one_expression(path: Path) -> None:
    torch.save({"a": BASE, "b": BASE, "at": BASE.t(), "bt": BASE.t(), "c": BASE[:, :3], "d": BASE[:, :3]}, path)
    plan = fm.scan(path)
    assert plan["a"] == plan["b"] == fm.expr.transpose(plan["at"])
    assert plan["at"] == plan["bt"]
    assert plan["c"] == plan["d"] != plan["a"]


def test_two_storages_with_equal_tensors_are_two_expressions(path: Path) -> None:
    torch.save({"a": torch.ones(3), "b": torch.ones(3), "e": torch.empty(0), "f": torch.empty(0)}, path)
    plan = fm.scan(path)
    assert plan["a"] != plan["b"]
    assert [expr.name for expr in plan.values() if isinstance(expr, fm.Read)] == ["a", "b", "e", "f"]


def test_a_part_reads_its_bytes_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.arange(1 << 18).reshape(1 << 9, 1 << 9).t()}, path)
    part = {"w": fm.expr.narrow(fm.scan(path)["w"], 1, 10, 12)}  # two rows of what is stored
    from funcmodel.run import files

    real, sizes = files.os.preadv, []

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return real(fd, buffers, offset)

    monkeypatch.setattr(files.os, "preadv", counted)
    found = fm.materialize(part)["w"]
    assert torch.equal(found, oracle(path)["w"][:, 10:12])
    assert (
        sum(sizes) < 100_000
    )  # two rows are 8 KiB, the rest is the directory and what surrounds it; the file has 2 MiB


def test_a_module_loads_and_saves(path: Path, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    torch.save(net.state_dict(), path)
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    fm.load(other, path)
    assert same(other.state_dict(), net.state_dict())
    fm.save(fm.scan(path), tmp_path / "out")
    saved = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert same({key: saved[key] for key in net.state_dict()}, net.state_dict())


def test_nothing_is_unpickled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": BASE, "t": BASE.t()}, path)

    def called(*_: Any, **__: Any) -> Any:
        raise AssertionError("unpickled")

    for where, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(where, name, called)
    assert torch.equal(fm.materialize(fm.scan(path))["t"], BASE.t())


def test_a_file_that_was_written_anew_is_stale(path: Path) -> None:
    torch.save({"w": torch.ones(3), "b": torch.ones(2)}, path)
    plan = fm.scan(path)
    torch.save({"b": torch.ones(2), "w": torch.ones(3)}, path)
    for change in (lambda: None, lambda: path.write_bytes(b"PK" + bytes(path.stat().st_size - 2))):
        change()
        with pytest.raises(StalePlanError):
            fm.materialize(plan)


def test_junk_behind_a_zip_is_tolerated_as_torch_does(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes() + b"junk")
    assert same(fm.materialize(fm.scan(path)), oracle(path))


def test_formats_of_torch_are_values() -> None:
    assert fm.torch_zip(".pt") == fm.TORCH_PT != fm.TORCH_PTH
    assert fm.TORCH_BIN.at is not None
    assert fm.TORCH_BIN.at(("a",)) == fm.torch_zip(".bin").at(("a",)) != fm.TORCH_BIN  # type: ignore[misc]
    assert hash(fm.TORCH_BIN) == hash(fm.torch_zip(".bin"))
    assert fm.legacy_torch(".pt") == fm.legacy_torch()
    assert not any(f.name == fm.legacy_torch().name for f in fm.FORMATS)


# -- dicts in dicts ----------------------------------------------------------------------------------------------------


def training(path: Path, **more: Any) -> dict[str, Any]:
    from argparse import Namespace

    state = {"w": torch.arange(3.0), "b": torch.ones(1)}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    whole = {"model": {"state_dict": state}, "ema": state, "epoch": 3, "args": Namespace(lr=0.1), **more}
    extras = {"optimizer": optimizer, "score": np.float64(0.5), "path": Path("x"), "names": {"a", "b"}}
    torch.save({**whole, **extras, "rng": np.random.default_rng(0).random(3), "none": None}, path)
    return state


def test_a_key_selects_a_dict(path: Path) -> None:
    state = training(path)
    assert same(fm.materialize(fm.scan(path, key=("model", "state_dict"))), state)
    assert same(fm.materialize(fm.scan(path, key="ema")), state)
    assert list(fm.scan_checkpoint(path, key="ema").files[0].tensors) == ["w", "b"]
    net = nn.ParameterDict({"w": torch.zeros(3), "b": torch.zeros(1)})
    fm.load(net, fm.scan(path, key="ema"))
    assert same(net.state_dict(), {k: state[k] for k in net.state_dict()})


def test_without_a_key_the_candidates_are_named(path: Path) -> None:
    training(path)
    error = refused(path, "BIN_NOT_A_STATE_DICT")
    assert error.candidates == (("ema",),)  # type: ignore[attr-defined]
    assert "epoch" in error.keys  # type: ignore[attr-defined]
    assert refused(path, "BIN_NO_SUCH_KEY", key="state").candidates  # type: ignore[attr-defined]
    assert refused(path, "BIN_NOT_A_DICT", key="epoch")
    assert refused(path, "BIN_NO_SUCH_KEY", key=("epoch", "x"))


@pytest.mark.parametrize("odd", [3, 1.5, "x", None, [torch.ones(1)], (1,), b"x", {"deep": torch.ones(1)}])
def test_what_is_no_tensor_is_named(odd: Any, path: Path) -> None:
    torch.save({"w": torch.ones(2), "odd": odd}, path)
    error = refused(path, "BIN_NOT_A_STATE_DICT")
    assert (error.key, error.keys) == ("odd", ("odd",))  # type: ignore[attr-defined]


def test_a_key_is_for_formats_that_nest(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, file)
    for asked in (file, tmp_path):
        with pytest.raises(UnknownFormatError) as caught:
            fm.scan(asked, key="model")
        assert caught.value.code == "KEY_OF_FLAT_FORMAT"


def test_a_class_of_the_script_may_be_read_past_by_name(path: Path) -> None:
    value: dict[str, Any] = {"model": {"w": torch.ones(2)}, "config": _Settings()}
    torch.save(value, path)
    name = f"{__name__}._Settings"
    assert refused(path, "BIN_GLOBAL_FORBIDDEN", key="model").args[0].count(name)
    plan = fm.scan(path, key="model", formats=(fm.torch_zip(".bin", inert=(name,)),))
    assert same(fm.materialize(plan), value["model"])


class _Settings:
    def __init__(self) -> None:
        self.lr = 0.1
