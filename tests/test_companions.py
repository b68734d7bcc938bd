"""Quantized weights travel with their scales."""

import pytest

from funcmodel.core import build
from funcmodel.errors import RuleError
from funcmodel.plan.companions import check_whole, companions, is_companion, weight_of
from funcmodel.plan.convert import convert
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.rules import Merge, Rename, Rule, Transpose
from funcmodel.records.tensors import TensorSpec


@pytest.mark.parametrize(
    ("weight", "others"),
    [
        ("q.weight", ["q.weight_scale_inv"]),
        ("q.weight", ["q.weight_scale", "q.weight_scale_2", "q.input_scale"]),
        ("q.weight", ["q.weight_zero_point", "q.weight_scale"]),
        ("q.weight", ["q.weight.absmax", "q.weight.quant_map", "q.weight.quant_state.bitsandbytes__nf4"]),
        ("q.weight", ["q.weight.nested_absmax", "q.weight.nested_quant_map"]),
        ("q.weight", ["q.SCB", "q.weight_format"]),
        ("q.weight", ["q.scales", "q.biases"]),
        ("q.qweight", ["q.qzeros", "q.scales", "q.g_idx"]),
        ("q.qweight", ["q.scale"]),
        ("q.weight_packed", ["q.weight_scale", "q.weight_shape", "q.weight_zero_point"]),
        ("mlp.experts.gate_up_proj_blocks", ["mlp.experts.gate_up_proj_scales"]),
        ("mlp.experts.down_proj", ["mlp.experts.down_proj_scale_inv"]),
        ("q._weight_qdata", ["q._weight_scale"]),
        ("qweight", ["scales"]),
    ],
)
def test_groups_as_quantizers_write_them(weight: str, others: list[str]) -> None:
    assert companions([*others, weight, "q.bias", "norm.weight"]) == {weight: tuple(others)}
    assert all(weight_of(other, {weight}) == weight and is_companion(other) for other in others)


@pytest.mark.parametrize(
    "keys",
    [
        ["q.weight", "q.bias", "norm.weight", "norm.bias"],
        ["clip.logit_scale", "clip.weight"],
        ["norm.scale", "norm.weight"],
        ["q.weight_scale_inv"],
        ["a.weight", "b.weight_scale"],
        ["q.weight_v", "q.weight_g"],
        [],
    ],
)
def test_names_that_only_look_like_it_are_no_group(keys: list[str]) -> None:
    assert companions(keys) == {}


def test_a_scale_of_a_scale_belongs_to_the_weight() -> None:
    assert companions(["w", "w_scale", "w_scale_scale"]) == {"w": ("w_scale", "w_scale_scale")}


def test_a_choice_of_keys_takes_a_group_or_leaves_it() -> None:
    keys = ["q.weight", "q.weight_scale", "q.bias"]
    check_whole(keys, {"q.weight", "q.weight_scale"})
    check_whole(keys, {"q.bias"})
    with pytest.raises(RuleError) as caught:
        check_whole(keys, {"q.weight", "q.bias"})
    assert (caught.value.touched, caught.value.keys) == (("q.weight",), ("q.weight_scale",))


def quantized() -> StateDictPlan:
    def live(key: str, shape: list[int], dtype: str) -> None:
        entries[key] = build.live(key, TensorSpec(shape, dtype))

    entries: dict[str, object] = {}
    for name in "qkv":
        live(f"0.{name}.weight", [4, 8], "float8_e4m3fn")
        live(f"0.{name}.weight_scale_inv", [1, 2], "float32")
    live("norm.weight", [8], "float32")
    return StateDictPlan(entries)


Q, S = "{i}.q.weight", "{i}.q.weight_scale_inv"
SCALES_TRADE_PLACES = [
    *(Rename("0.q.weight", "0.q.weight"), Rename("0.k.weight", "0.k.weight")),
    *(Rename("0.q.weight_scale_inv", "x"), Rename("0.k.weight_scale_inv", "0.q.weight_scale_inv")),
    Rename("x", "0.k.weight_scale_inv"),
]


@pytest.mark.parametrize(
    "rules",
    [
        [Rename(Q, "{i}.wq.weight")],
        [Rename(S, "{i}.wq.weight_scale_inv")],
        [Transpose(Q)],
        [Merge(("{i}.q.weight", "{i}.k.weight"), "{i}.qk.weight")],
        [Transpose("{i}.k.weight"), Rename(Q, Q), Rename(S, S)],
        SCALES_TRADE_PLACES,
    ],
)
def test_rules_that_part_a_weight_from_its_scale_are_refused(rules: list[Rule]) -> None:
    with pytest.raises(RuleError) as caught:
        convert(*rules)(quantized())
    assert caught.value.keys


@pytest.mark.parametrize(
    ("rules", "groups"),
    [
        ([], 3),
        ([Rename("{i}.{*rest}", "layers.{i}.{*rest}")], 3),
        ([Rename("{*p}.weight", "{*p}.w"), Rename("{*p}.weight_scale_inv", "{*p}.w_scale_inv")], 3),
        ([Rename("norm.weight", "ln.weight")], 3),
        ([Transpose(Q), Transpose(S)], 3),
        ([Merge([f"{{i}}.{n}{s}" for n in "qkv"], f"{{i}}.qkv{s}") for s in (".weight", ".weight_scale_inv")], 1),
    ],
)
def test_rules_that_reach_the_whole_group_apply(rules: list[Rule], groups: int) -> None:
    assert len(companions(convert(*rules)(quantized()))) == groups
