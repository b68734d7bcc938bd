"""The failures that users of checkpoint loaders suffer silently, each with the guarantee that rules it out here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import funcmodel as fm


class Block(nn.Module):
    """Two weights, a bare parameter, a frozen one, buffers of both kinds."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(width))
        self.frozen = nn.Parameter(torch.full((width,), 2.0), requires_grad=False)
        self.register_buffer("steps", torch.arange(width))
        self.register_buffer("angles", 1.0 / torch.arange(1, width + 1), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


class WithHead(nn.Module):
    """A model with a head whose attribute has the name of one in the base."""

    base_model_prefix = "base"

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ModuleDict({"norm": nn.LayerNorm(3), "proj": nn.Linear(3, 3)})
        self.norm = nn.LayerNorm(3)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module


def bits(module: nn.Module) -> dict[str, bytes]:
    leaves = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: leaf.detach().flatten().view(torch.uint8).numpy().tobytes() for name, leaf in leaves}


def test_1_nothing_runs_over_the_module_after_loading(tmp_path: Path) -> None:
    class Eager(Block):
        def _init_weights(self, module: nn.Module) -> None:
            for p in module.parameters(recurse=False):
                p.data.normal_()

    trained = randomized(Eager())
    fm.save(trained, tmp_path)
    assert bits(fm.load(fm.skeleton(Eager), tmp_path)) == bits(trained)


def test_2_non_persistent_buffers_have_the_constructor_s_value(tmp_path: Path) -> None:
    fm.save(Block(), tmp_path)
    net = fm.load(fm.skeleton(Block), tmp_path)
    assert torch.equal(net.angles, 1.0 / torch.arange(1, 5))


def test_2_or_the_load_is_refused_where_nobody_knows_it(tmp_path: Path) -> None:
    fm.save(Block(), tmp_path)
    with torch.device("meta"):
        net = Block()
    with pytest.raises(fm.PlanError) as caught:
        fm.load(net, tmp_path)
    assert "angles" in caught.value.keys


def test_3_two_values_for_one_tied_weight_are_a_conflict(tmp_path: Path) -> None:
    save_file({"embed.weight": torch.ones(6, 4), "head.weight": torch.zeros(6, 4)}, tmp_path / "model.safetensors")
    net = randomized(Tied())
    before = bits(net)
    with pytest.raises(fm.TieConflictError) as caught:
        fm.load(net, tmp_path)
    assert set(caught.value.keys) == {"embed.weight", "head.weight"}
    assert bits(net) == before


@pytest.mark.parametrize("keys", [("embed.weight",), ("head.weight",), ("embed.weight", "head.weight")])
def test_3_any_name_of_a_tied_weight_will_do(keys: tuple[str, ...], tmp_path: Path) -> None:
    value = torch.randn(6, 4)
    save_file({key: value.clone() for key in keys}, tmp_path / "model.safetensors")
    net = fm.load(fm.skeleton(Tied), tmp_path)
    assert net.head.weight is net.embed.weight
    assert torch.equal(net.head.weight, value)


def test_4_a_prefix_is_never_guessed_and_never_swaps(tmp_path: Path) -> None:
    net = randomized(WithHead())
    fm.save(net, tmp_path)
    assert bits(fm.load(fm.skeleton(WithHead), tmp_path)) == bits(net)

    source, spec = fm.scan(tmp_path), fm.module_spec(net)
    assert fm.aligned(spec)(source) == source

    base = nn.ModuleDict({"norm": nn.LayerNorm(3), "proj": nn.Linear(3, 3)})
    with pytest.raises(fm.KeyMismatchError) as caught:
        fm.load(base, tmp_path)
    assert caught.value.hints


def test_5_a_save_into_a_used_folder_is_what_is_loaded_next(tmp_path: Path) -> None:
    for seed, limit in enumerate(["5GB", "100B", "5GB", "60B", "100B", "5GB"]):
        net = randomized(Block(), seed)
        fm.save(net, tmp_path, max_shard_size=limit)
        assert bits(fm.load(fm.skeleton(Block), tmp_path)) == bits(net)
        index = tmp_path / "model.safetensors.index.json"
        listed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert {p.name for p in tmp_path.glob("*.safetensors")} == listed


def test_5_other_variants_and_foreign_files_stay(tmp_path: Path) -> None:
    other = randomized(Block(), 1)
    fm.save(other, tmp_path, variant="ema", max_shard_size="100B")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"mine")
    fm.save(randomized(Block(), 2), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"mine"
    assert bits(fm.load(fm.skeleton(Block), fm.scan(tmp_path, variant="ema"))) == bits(other)


def test_6_a_save_that_fails_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    old = randomized(Block(), 1)
    fm.save(old, tmp_path, max_shard_size="100B")
    names = sorted(p.name for p in tmp_path.iterdir())
    source = fm.scan(tmp_path)
    broken = fm.at("second.bias", lambda key, e: fm.expr.call("funcmodel:no_such_function", (e,), fm.spec_of(e)))(
        source
    )
    with pytest.raises(fm.FuncmodelError):
        fm.save(broken, tmp_path, max_shard_size="100B")
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert bits(fm.load(fm.skeleton(Block), tmp_path)) == bits(old)


def test_7_saving_inverts_loading_whatever_the_rules(tmp_path: Path) -> None:
    theirs = {f"encoder.layers.{i}.w": torch.randn(3, 2) for i in range(3)}
    save_file(theirs, tmp_path / "model.safetensors")
    rules = (fm.Rename("encoder.layers.{i}.w", "layers.{i}.w"), fm.Stacked("layers.{i}.w", "layers.w", over="i"))
    mine = fm.pipe(fm.scan(tmp_path), fm.convert(*rules))
    back = fm.restored(mine)(mine)
    assert back == fm.scan(tmp_path)
    fm.save(back, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[k], theirs[k]) for k in theirs)


def test_9_strict_by_default_with_waivers_that_must_match(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2), "extra": torch.ones(1)}, tmp_path / "model.safetensors")
    net = randomized(nn.Linear(2, 2))
    before = bits(net)
    with pytest.raises(fm.KeyMismatchError) as caught:
        fm.load(net, tmp_path)
    assert caught.value.report.missing_keys == ("bias",)
    assert caught.value.report.unexpected_keys == ("extra",)
    waived = fm.LoadPolicy(missing="init", allow=("unexpected:extra", "unexpected:nothing"))
    with pytest.raises(fm.KeyMismatchError) as caught:
        fm.load(net, tmp_path, policy=waived)
    assert caught.value.unused == ("unexpected:nothing",)
    assert bits(net) == before


def test_10_a_missing_bare_parameter_is_never_noise(tmp_path: Path) -> None:
    state = {k: v for k, v in Block().state_dict().items() if k != "gain"}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(fm.PlanError) as caught:
        fm.load(fm.skeleton(Block), tmp_path, policy=fm.LoadPolicy(missing="init"))
    assert caught.value.keys == ("gain",)
    net = fm.load(fm.skeleton(Block), tmp_path, policy=fm.LoadPolicy(missing="init"), init={"gain": ones})
    assert torch.equal(net.gain, torch.ones(4))


def ones(key: str, spec: fm.TensorSpec, generator: torch.Generator) -> torch.Tensor:
    return torch.ones(spec.shape)


def test_11_scales_travel_with_their_weights(tmp_path: Path) -> None:
    stored = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "weight_scale_inv": torch.ones(1)}
    save_file(stored, tmp_path / "model.safetensors")
    source = fm.scan(tmp_path)
    with pytest.raises(fm.KeyMismatchError):
        fm.load(nn.Linear(2, 2), source, policy=fm.LoadPolicy(unexpected="ignore"))
    with pytest.raises(fm.PlanError):
        fm.drop("weight_scale_inv")(source)
    with pytest.raises(fm.PlanError):
        fm.cast("float16")(source)
    with pytest.raises(fm.PlanError):
        fm.convert(fm.Rename("weight", "kernel"))(source)


def test_12_each_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    stored = {"weight": torch.full((2, 2), 1.0001), "bias": torch.ones(2, dtype=torch.bfloat16)}
    save_file(stored, tmp_path / "model.safetensors")
    net = fm.load(fm.skeleton(nn.Linear, 2, 2), tmp_path)
    assert (net.weight.dtype, net.bias.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(net.weight, stored["weight"])
    plan = fm.plan_load(fm.module_spec(nn.Linear(2, 2).half()), fm.scan(tmp_path), dtype="module")
    assert {c.key: c.loss for c in plan.report.dtype_changes} == {"weight": "range", "bias": "range"}
    with pytest.raises(fm.PlanError):
        fm.load(nn.Linear(2, 2), tmp_path, policy=fm.LoadPolicy(dtype="error"))


def test_12_a_change_of_kind_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2, dtype=torch.int64), "bias": torch.ones(2)}, tmp_path / "model.safetensors")
    for dtype in ("file", "module", "error"):
        with pytest.raises(fm.PlanError):
            fm.load(nn.Linear(2, 2), tmp_path, policy=fm.LoadPolicy(dtype=dtype))


def test_20_ties_survive_and_the_caller_s_dict_is_not_edited() -> None:
    state = Tied().state_dict()
    copy = {k: v.clone() for k, v in state.items()}
    net = fm.load(fm.skeleton(Tied), state)
    assert net.head.weight is net.embed.weight
    assert state.keys() == copy.keys()
    assert all(torch.equal(state[k], copy[k]) for k in copy)
    assert net.embed.weight.data_ptr() != state["embed.weight"].data_ptr()


def test_21_no_meta_tensor_escapes(tmp_path: Path) -> None:
    save_file({"first.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    net = fm.skeleton(Block)
    with pytest.raises(fm.PlanError):
        fm.load(net, tmp_path, policy=fm.LoadPolicy(missing="init"))
    assert all(p.is_meta for p in net.parameters())


def test_26_shared_and_non_contiguous_tensors_can_be_saved(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    state = {"whole": whole, "same": whole, "rows": whole[1:3], "turned": whole.T, "column": whole[:, 2]}
    fm.save(state, tmp_path / "copy")
    written = load_file(tmp_path / "copy" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[k], state[k]) for k in state)

    fm.save(state, tmp_path / "alias", aliases="alias")
    assert load_file(tmp_path / "alias" / "model.safetensors").keys() == state.keys() - {"same"}
    names = fm.recorded(fm.scan_checkpoint(tmp_path / "alias"))
    again = fm.materialize(fm.spread(names)(fm.scan(tmp_path / "alias")))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], state[k]) for k in state)
    with pytest.raises(fm.PlanError):
        fm.save(state, tmp_path / "raise", aliases="raise")


@pytest.mark.parametrize(
    ("lie", "code"),
    [
        ({"a": "2.safetensors", "b": "1.safetensors"}, "KEY_NOT_AS_INDEXED"),
        ({"a": "1.safetensors", "b": "2.safetensors", "ghost": "1.safetensors"}, "INDEXED_KEY_MISSING"),
        ({"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}, "OPEN"),
        ({"a": "1.safetensors"}, "KEY_NOT_AS_INDEXED"),
        ({"a": "../1.safetensors", "b": "2.safetensors"}, "SHARD_ESCAPES"),
    ],
)
def test_28_an_index_that_lies_is_refused(lie: dict[str, str], code: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file(
        {"b": torch.ones(1)} | ({"extra": torch.ones(1)} if lie == {"a": "1.safetensors"} else {}),
        tmp_path / "2.safetensors",
    )
    if lie == {"a": "1.safetensors"}:
        save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": lie}))
    with pytest.raises(fm.CheckpointError) as caught:
        fm.scan(tmp_path)
    assert caught.value.code == code


def test_37_no_name_is_special(tmp_path: Path) -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(2))
            self.beta = nn.Parameter(torch.zeros(2))
            self.weight = nn.Parameter(torch.full((2,), 5.0))
            self.register_buffer("position_ids", torch.arange(3))

    net = randomized(Old())
    fm.save(net, tmp_path)
    assert set(fm.scan(tmp_path)) == {"gamma", "beta", "weight", "position_ids"}
    assert bits(fm.load(fm.skeleton(Old), tmp_path)) == bits(net)
    with pytest.raises(fm.RuleError):
        fm.convert(fm.Rename("gamma", "weight"))(fm.scan(tmp_path))


def test_39_a_load_has_no_side_effects(tmp_path: Path) -> None:
    state = {k: v for k, v in Block().state_dict().items() if not k.startswith("second")}
    save_file(state, tmp_path / "model.safetensors")
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_default_device()
    net = fm.load(fm.skeleton(Block), tmp_path, policy=fm.LoadPolicy(missing="init"))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.get_default_dtype(), torch.get_default_device())
    assert {n: p.requires_grad for n, p in net.named_parameters()} == {
        n: p.requires_grad for n, p in Block().named_parameters()
    }
