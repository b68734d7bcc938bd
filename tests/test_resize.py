from hashlib import blake2b

import pytest

from funcmodel.core import build
from funcmodel.core.shapes import spec_of
from funcmodel.errors import PlanError, ShapeError
from funcmodel.plan.resize import Normal, resize_rows, resized, row_seed
from funcmodel.records.expressions import Call, Concat, Full, Index, Live, Noise
from funcmodel.records.module import ModuleSpec, ParamSpec, TiedGroup, ViewSpec
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec

EMBED = Live("embed", TensorSpec([10, 4], "float32"))
PLAN = StateDictPlan({"first": Live("first", TensorSpec([3], "float32")), "embed": EMBED})


def only(dtype: str, shape=(10, 4)) -> StateDictPlan:
    return StateDictPlan({"embed": Live("embed", TensorSpec(shape, dtype))})


def test_growing_keeps_the_old_rows_and_fills_the_new() -> None:
    grown = resize_rows("embed", 12, fill=0.5)(PLAN)
    assert grown["embed"] == Concat((EMBED, Full(TensorSpec([2, 4], "float32"), 0.5)), 0)
    assert list(grown) == list(PLAN)
    assert grown["first"] == PLAN["first"]


def test_shrinking_is_a_slice_and_needs_no_fill() -> None:
    assert resize_rows("embed", 7)(PLAN)["embed"] == Index(EMBED, ((0, 7), (0, 4)))
    assert spec_of(resize_rows("embed", 0)(PLAN)["embed"]).shape == (0, 4)
    assert resize_rows("embed", 10)(PLAN) is PLAN


def test_new_rows_can_be_the_mean_of_the_old() -> None:
    new = resize_rows("embed", 12, fill="mean")(PLAN)["embed"].parts[1]
    assert new == Call("funcmodel.run.functions:mean_rows", (EMBED,), TensorSpec([2, 4], "float32"), {"rows": 2})


def test_new_rows_can_be_drawn_by_a_seed_of_key_and_row() -> None:
    new = resize_rows("embed", 12, fill=Normal(std=0.02, seed=3))(PLAN)["embed"].parts[1]
    assert new == Noise(TensorSpec([2, 4], "float32"), 0.0, 0.02, row_seed("embed", 10, 3))
    seeds = {row_seed(key, row, seed) for key in ("embed", "head") for row in (10, 12) for seed in (0, 1)}
    assert len(seeds) == 8
    # A plan means the same everywhere and always.
    assert row_seed("embed", 10, 3) == int.from_bytes(blake2b(b"3:10:embed", digest_size=8).digest(), "big") >> 1


def test_growing_twice_does_not_draw_the_same_rows_twice() -> None:
    fill = Normal(std=0.02)
    twice = resize_rows("embed", 14, fill=fill)(resize_rows("embed", 12, fill=fill)(PLAN))["embed"]
    assert twice.parts[1] != twice.parts[2]
    assert twice.parts[1].spec == twice.parts[2].spec


def test_growing_without_a_fill_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        resize_rows("embed", 12)(PLAN)
    assert caught.value.keys == ("embed",)


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        ("int64", 0.0),
        ("int64", "mean"),
        ("int64", Normal()),
        ("uint8", -1),
        ("uint8", 256),
        ("int8", 128),
        ("float16", 1e6),
        ("float32", 1j),
        ("float32", True),
        ("bool", 1),
        ("float8_e8m0fnu", -1.0),
        ("float8_e8m0fnu", 0.0),
        ("float32", "median"),
    ],
)
def test_a_fill_that_the_dtype_cannot_hold_is_refused(dtype, fill) -> None:
    with pytest.raises(PlanError) as caught:
        resize_rows("embed", 12, fill=fill)(only(dtype))
    assert caught.value.keys == ("embed",)


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        ("int64", 7),
        ("uint8", 255),
        ("int8", -128),
        ("float16", 65504),
        ("float32", float("-inf")),
        ("bool", True),
        ("complex64", 1j),
    ],
)
def test_a_fill_that_the_dtype_can_hold(dtype, fill) -> None:
    assert resize_rows("embed", 12, fill=fill)(only(dtype))["embed"].parts[1].value == fill


def test_the_mean_of_no_rows_is_refused() -> None:
    with pytest.raises(PlanError):
        resize_rows("embed", 2, fill="mean")(only("float32", (0, 4)))


def test_what_has_no_rows_is_refused() -> None:
    with pytest.raises(ShapeError) as caught:
        resize_rows("embed", 2, fill=0.0)(only("float32", ()))
    assert caught.value.key == "embed"
    with pytest.raises(ValueError, match="-1"):
        resize_rows("embed", -1)
    with pytest.raises(ValueError, match="-1"):
        resized("embed", -1)


def test_a_key_that_is_not_there_is_named_with_its_neighbors() -> None:
    with pytest.raises(PlanError) as caught:
        resize_rows("embd", 2)(PLAN)
    assert caught.value.near == ("embed",)


def test_a_quantized_weight_is_not_resized_without_its_scale() -> None:
    scale = Live("s", TensorSpec([10, 1], "float32"))
    with pytest.raises(PlanError) as caught:
        resize_rows("up.weight", 2)(StateDictPlan({"up.weight": EMBED, "up.weight_scale": scale}))
    assert caught.value.keys == ("up.weight", "up.weight_scale")


# -- the module's side ---------------------------------------------------------------------------------------------


def leaf(*shape: int) -> ParamSpec:
    return ParamSpec(spec=TensorSpec(shape, "bfloat16"), requires_grad=False)


NET = ModuleSpec(
    name="Net",
    params={"embed": leaf(10, 4), "block.w": leaf(4, 4), "head": leaf(10, 4), "scale": leaf()},
    tied=(TiedGroup(("embed", "head")),),
)


@pytest.mark.parametrize("key", ["embed", "head"])
def test_a_spec_is_resized_under_every_tied_name(key) -> None:
    grown = resized(key, 12)(NET)
    assert [p.spec.shape for p in grown.params.values()] == [(12, 4), (4, 4), (12, 4), ()]
    assert list(grown.params) == list(NET.params)
    assert grown.params["head"].requires_grad is False
    assert resized(key, 10)(grown) == NET


def test_a_leaf_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        resized("lm_head", 12)(NET)
    assert caught.value.keys == ("lm_head",)
    with pytest.raises(ShapeError):
        resized("scale", 12)(NET)


def test_a_leaf_that_shares_part_of_its_storage_is_refused() -> None:
    views = {"block.w": ViewSpec("head", (4, 1), 0)}
    spec = ModuleSpec(name="Net", params=NET.params, tied=NET.tied, views=views)
    for key in ("embed", "block.w"):
        with pytest.raises(PlanError) as caught:
            resized(key, 12)(spec)
        assert "block.w" in caught.value.keys


def test_both_sides_agree() -> None:
    grown = resize_rows("embed", 12, fill=0)(PLAN)
    spec = resized("embed", 12)(ModuleSpec(name="Net", params={"embed": ParamSpec(spec=EMBED.spec)}))
    assert spec_of(grown["embed"]) == spec.params["embed"].spec
    assert build.narrow(grown["embed"], 0, 0, 10) == EMBED
