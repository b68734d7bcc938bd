"""`load`, `save`, `apply`: what each accepts, and what it leaves alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import funcmodel as fm


def linear(value: float) -> nn.Linear:
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.fill_(value)
        net.bias.fill_(value)
    return net


def test_a_source_is_a_path_several_paths_a_plan_or_a_state_dict(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    save_file({"bias": torch.ones(2)}, tmp_path / "b.safetensors")
    both = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    state = linear(1.0).state_dict()
    for source in (both, list(map(str, both)), fm.scan(both), state, dict(fm.scan(both))):
        net = fm.load(linear(0.0), source)  # type: ignore[arg-type]
        assert torch.equal(net.weight, torch.ones(2, 2))
        assert torch.equal(net.bias, torch.ones(2))


def test_tensors_and_expressions_may_stand_in_one_state_dict(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    mixed = {**fm.scan(tmp_path / "a.safetensors"), "bias": torch.full((2,), 3.0)}
    net = fm.load(fm.skeleton(nn.Linear, 2, 2), mixed)
    assert torch.equal(net.bias, torch.full((2,), 3.0))


def test_loading_a_state_dict_copies_it() -> None:
    state = linear(1.0).state_dict()
    net = fm.load(fm.skeleton(nn.Linear, 2, 2), state)
    state["weight"].zero_()
    assert torch.equal(net.weight, torch.ones(2, 2))


def test_a_module_may_be_loaded_from_itself() -> None:
    net = linear(1.0)
    fm.load(net, {"weight": net.weight.detach().T, "bias": net.bias.detach() * 2})
    assert torch.equal(net.bias, torch.full((2,), 2.0))


def test_exactly_one_file(tmp_path: Path) -> None:
    saved = fm.save(linear(1.0), tmp_path / "deep" / "mine.v2.safetensors", max_shard_size="1B")
    assert [Path(f.path).name for f in saved.files] == ["mine.v2.safetensors"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["mine.v2.safetensors"]
    assert load_file(tmp_path / "deep" / "mine.v2.safetensors").keys() == {"weight", "bias"}


def test_a_file_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fm.save(linear(1.0), "w.safetensors")
    assert torch.equal(fm.load(linear(0.0), "w.safetensors").weight, torch.ones(2, 2))


def test_a_rewrite_onto_the_files_that_are_read(tmp_path: Path) -> None:
    net = nn.Sequential(*(linear(float(i)) for i in range(4)))
    fm.save(net, tmp_path, max_shard_size="24B")
    fm.save(fm.cast("float64")(fm.scan(tmp_path)), tmp_path, max_shard_size="60B")
    again = fm.materialize(fm.scan(tmp_path))
    assert all(torch.equal(again[k], v.double()) for k, v in net.state_dict().items())


def test_a_plan_outlives_neither_its_files_nor_its_module(tmp_path: Path) -> None:
    fm.save(linear(1.0), tmp_path)
    plan = fm.plan_load(fm.module_spec(linear(0.0)), fm.scan(tmp_path))
    net = nn.Linear(3, 2)
    with pytest.raises(fm.StalePlanError):
        fm.apply(plan, net)
    save_file(
        {"weight": torch.zeros(2, 2), "bias": torch.zeros(2), "more": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    net, before = linear(5.0), linear(5.0).state_dict()
    with pytest.raises(fm.StalePlanError):
        fm.apply(plan, net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Stateful(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: object) -> None:
        raise AssertionError("not called: no checkpoint holds it")


def test_extra_state_that_is_no_tensor_is_refused_or_left_out_by_name(tmp_path: Path) -> None:
    net = Stateful(2, 2)
    with pytest.raises(fm.PlanError) as caught:
        fm.save(net, tmp_path)
    assert caught.value.keys == ("_extra_state",)
    assert list(tmp_path.iterdir()) == []
    fm.save(net, tmp_path, extra_state="drop")
    assert torch.equal(fm.load(Stateful(2, 2), tmp_path).weight, net.weight)


def test_a_config_is_written_beside_the_weights(tmp_path: Path) -> None:
    config = {"model_type": "mine", "b": 1, "a": [None, 1.5, "é"]}
    fm.save(linear(1.0), tmp_path, config=config)
    assert fm.scan_checkpoint(tmp_path).config == fm.Config(config)


def test_what_is_no_plan_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        fm.apply(fm.StateDictPlan({}), tmp_path)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": {"weight": torch.ones(2)}, "step": 3},
        {"weight": [1.0, 2.0]},
        {"weight": None},
        {3: torch.ones(2)},
        {None: torch.ones(2)},
    ],
    ids=repr,
)
def test_what_holds_no_tensors_under_text_is_no_state_dict(tmp_path: Path, wrong: Any) -> None:
    net = nn.Linear(2, 2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(fm.PlanError):
        fm.load(net, wrong)
    with pytest.raises(fm.PlanError):
        fm.save(wrong, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("option", ["durability", "symlinks", "digests", "digest", "aliases", "extra_state"])
def test_a_misspelled_option_of_a_save_is_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        fm.save(nn.Linear(2, 2), tmp_path / "out", **{option: "ful"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["commit", "preflight", "digest"])
def test_a_misspelled_option_of_a_load_is_refused(tmp_path: Path, option: str) -> None:
    fm.save(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError):  # noqa: PT011
        fm.load(nn.Linear(2, 2), tmp_path, **{option: "inplace"})
    for name in ("symlinks", "which"):
        with pytest.raises(ValueError):  # noqa: PT011
            fm.scan(tmp_path, **{name: "contain"})


def test_a_lazy_conjugate_of_a_tensor_is_another_tensor(tmp_path):
    c = torch.randn(3, 2, dtype=torch.complex64)
    saved = {"a": c, "b": c.conj(), "im": c.imag, "negative": c.conj().imag}
    fm.save(saved, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[key], tensor.resolve_conj().resolve_neg()) for key, tensor in saved.items())

    net = torch.nn.Module()
    net.register_buffer("a", c)
    net.register_buffer("b", c.conj())
    with pytest.raises(fm.PlanError) as error:
        fm.save(net, tmp_path / "net")
    assert set(error.value.keys) == {"a", "b"}
