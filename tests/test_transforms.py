from functools import wraps

import pytest
import torch

from funcmodel._toolz import pipe
from funcmodel.core import build
from funcmodel.core.shapes import dtype_of, spec_of
from funcmodel.errors import KeyMismatchError, PlanError, ShapeError, TemplateError
from funcmodel.plan.casting import cast, casts, like
from funcmodel.plan.transforms import at, combine, drop, keep, overlay, take
from funcmodel.records.expressions import Call, Cast, FileRef, Live, Read
from funcmodel.records.module import ModuleSpec, ParamSpec, TiedGroup
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec
from funcmodel.run import functions


def live(key: str, shape=(4, 2), dtype="float32") -> Live:
    return Live(key, TensorSpec(shape, dtype))


def plan(**dtypes: str) -> StateDictPlan:
    return StateDictPlan({key: live(key, dtype=dtype) for key, dtype in dtypes.items()})


NET = StateDictPlan(
    {
        key: live(key)
        for key in ("model.embed.weight", "model.layers.0.attn.weight", "model.layers.1.attn.weight", "head.weight")
    }
)
IDS = {"ids": live("ids", dtype="int64")}
QUANTIZED = {
    "up.weight": live("up.weight", dtype="float8_e4m3fn"),
    "up.weight_scale": live("up.weight_scale", (4, 1)),
}


# -- keep and drop -------------------------------------------------------------------------------------------------


def test_keep_takes_what_any_template_matches_in_the_order_of_the_plan() -> None:
    kept = keep("head.weight", "model.layers.{i}.{*rest}")(NET)
    assert list(kept) == ["model.layers.0.attn.weight", "model.layers.1.attn.weight", "head.weight"]
    assert list(drop("head.weight", "model.layers.{i}.{*rest}")(NET)) == ["model.embed.weight"]


@pytest.mark.parametrize("transform", [keep, drop])
def test_a_typing_error_is_not_an_empty_match(transform) -> None:
    with pytest.raises(PlanError) as caught:
        transform("head.weight", "model.layers.0.atn.weight")(NET)
    assert caught.value.templates == ("model.layers.0.atn.weight",)
    assert "model.layers.0.attn.weight" in caught.value.near


def test_near_misses_are_found_among_very_many_keys() -> None:
    many = StateDictPlan({f"layers.{i}.mlp.up.weight": live("w") for i in range(5000)})
    with pytest.raises(PlanError) as caught:
        keep("layers.4321.mlp.upp.weight")(many)
    assert "layers.4321.mlp.up.weight" in caught.value.near


def test_the_template_of_everything_may_find_nothing() -> None:
    empty = StateDictPlan()
    assert keep("{*key}")(empty) == drop("{*key}")(empty) == cast("float16")(empty) == empty


def test_keep_of_no_template_is_empty_and_drop_of_none_is_the_plan() -> None:
    assert keep()(NET) == StateDictPlan()
    assert drop()(NET) == NET


def test_a_text_that_is_no_template_is_refused_before_there_is_a_plan() -> None:
    for make in (lambda text: keep(text), lambda text: cast("float16", where=text), lambda text: at(text, max)):
        with pytest.raises(TemplateError):
            make("layers.{i")


@pytest.mark.parametrize("transform", [keep, drop])
def test_a_quantized_weight_is_not_parted_from_its_scale(transform) -> None:
    with pytest.raises(PlanError) as caught:
        transform("up.weight")(StateDictPlan(QUANTIZED))
    assert "up.weight_scale" in caught.value.keys
    transform("up.{*p}")(StateDictPlan(QUANTIZED))


# -- cast ----------------------------------------------------------------------------------------------------------


def test_cast_leaves_other_kinds_of_number_alone() -> None:
    done = cast("bfloat16")(plan(w="float32", ids="int64", mask="bool", z="complex64", done="bfloat16"))
    assert [dtype_of(expr).name for expr in done.values()] == ["bfloat16", "int64", "bool", "complex64", "bfloat16"]
    assert done["done"] == live("done", dtype="bfloat16")


def test_cast_by_template_casts_what_matches() -> None:
    done = cast("float16", where="model.layers.{i}.{*p}")(NET)
    assert [key for key, expr in done.items() if isinstance(expr, Cast)] == [k for k in NET if "layers" in k]


def test_a_change_of_kind_needs_the_literal_name() -> None:
    assert dtype_of(cast("float32", where="ids")(StateDictPlan(IDS))["ids"]).name == "float32"
    for where in ("{*key}", "{key}"):
        with pytest.raises(PlanError) as caught:
            cast("int8", where=where)(NET if where == "{*key}" else plan(w="float32"))
        assert caught.value.keys


def test_a_cast_of_everything_to_floats_may_find_no_float() -> None:
    assert cast("bfloat16")(StateDictPlan(IDS)) == StateDictPlan(IDS)
    with pytest.raises(PlanError):
        cast("bfloat16", where="{key}")(StateDictPlan(IDS))


def test_cast_refuses_quantized_weights_and_their_scales() -> None:
    source = StateDictPlan(QUANTIZED | {"norm": live("norm")})
    for where in ("{*key}", "up.weight", "up.weight_scale"):
        with pytest.raises(PlanError) as caught:
            cast("bfloat16", where=where)(source)
        assert caught.value.keys == ("up.weight", "up.weight_scale")
    assert cast("bfloat16", where="norm")(source)["up.weight"] == source["up.weight"]


def test_an_unknown_dtype_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="float33"):
        cast("float33")


def test_casts_shows_the_worst_loss_of_every_key_that_is_cast() -> None:
    w = live("w")
    shown = casts(
        {
            "plain": w,
            "half": build.cast(w, "float16"),
            "brain": build.cast(w, "bfloat16"),
            "wide": build.cast(w, "float64"),
            "kind": build.cast(w, "int64"),
            "back": build.cast(build.cast(w, "bfloat16"), "float32"),
            "twice": build.cast(build.cast(w, "bfloat16"), "float16"),
            "parts": build.concat((build.cast(w, "float64"), build.cast(live("v"), "float64")), 0),
            "mixed": build.concat((live("d", dtype="float16"), build.cast(live("v"), "float16")), 0),
            "called": Call("m:f", (build.cast(w, "bfloat16"),), w.spec),
        }
    )
    assert dict(shown) == {
        "half": "range",
        "brain": "rounding",
        "wide": "exact",
        "kind": "kind",
        "back": "rounding",
        "twice": "range",
        "parts": "exact",
        "mixed": "range",
        "called": "rounding",
    }


# -- at, overlay, take ---------------------------------------------------------------------------------------------


def test_at_gives_key_and_expression_and_takes_an_expression() -> None:
    seen = []

    def turned(key, expr):
        seen.append(key)
        return build.transpose(expr)

    done = at("model.layers.{i}.{*p}", turned)(NET)
    assert seen == [key for key in NET if "layers" in key]
    assert spec_of(done[seen[0]]).shape == (2, 4)
    assert list(done) == list(NET)


def test_at_refuses_what_is_no_expression() -> None:
    with pytest.raises(PlanError) as caught:
        at("head.weight", lambda key, expr: torch.zeros(4, 2))(NET)
    assert caught.value.keys == ("head.weight",)


def test_overlay_counts_over_the_plan_and_keeps_its_order() -> None:
    laid = overlay(StateDictPlan({"new": live("new"), "head.weight": live("other")}))(NET)
    assert list(laid) == [*NET, "new"]
    assert laid["head.weight"] == live("other")


def test_overlay_does_not_mix_a_quantized_weight_with_an_old_scale() -> None:
    fresh = {key: live(f"fresh {key}", expr.spec.shape, expr.spec.dtype) for key, expr in QUANTIZED.items()}
    for key in fresh:
        with pytest.raises(PlanError) as caught:
            overlay(StateDictPlan({key: fresh[key]}))(StateDictPlan(QUANTIZED))
        assert caught.value.keys == ("up.weight", "up.weight_scale")
    assert overlay(StateDictPlan(fresh))(StateDictPlan(QUANTIZED)) == StateDictPlan(fresh)
    halves = [StateDictPlan({key: expr}) for key, expr in QUANTIZED.items()]
    assert overlay(halves[1])(halves[0]) == StateDictPlan(QUANTIZED)


def test_take_keeps_rows() -> None:
    done = take("head.weight", [3, 0], dim=0)(NET)
    assert spec_of(done["head.weight"]).shape == (2, 2)
    assert spec_of(take("head.weight", range(1), dim=-1)(NET)["head.weight"]).shape == (4, 1)
    assert done["model.embed.weight"] == NET["model.embed.weight"]


def test_take_names_a_key_not_a_template() -> None:
    with pytest.raises(PlanError) as caught:
        take("haed.weight", [0])(NET)
    assert caught.value.keys == ("haed.weight",)
    assert "head.weight" in caught.value.near
    with pytest.raises(ShapeError):
        take("head.weight", [4])(NET)
    with pytest.raises(PlanError):
        take("up.weight", [0])(StateDictPlan(QUANTIZED))


# -- combine -------------------------------------------------------------------------------------------------------


def double(*tensors: torch.Tensor) -> torch.Tensor:
    return sum(tensors)


def test_combine_names_the_function_and_declares_its_result() -> None:
    a, b = plan(w="float32"), plan(w="float32")
    assert combine("mean", a, b)["w"].fn == "funcmodel.run.functions:mean"
    assert combine(functions.mean, a, b) == combine("funcmodel.run.functions:mean", a, b) == combine("mean", a, b)
    called = combine(double, a, b)["w"]
    assert called.fn == f"{__name__}:double"
    assert called.args == (a["w"], b["w"])
    assert called.spec == a["w"].spec


@pytest.mark.parametrize(
    "fn", [lambda *t: t[0], "medium", "no colon.f", ":f", "m:", "m:a.b", torch.nn.Linear.forward, StateDictPlan().get]
)
def test_a_function_that_has_no_name_in_a_module_is_refused(fn) -> None:
    with pytest.raises(PlanError):
        combine(fn, plan(w="float32"))


def test_a_closure_is_refused() -> None:
    factor = 2

    def scaled(*tensors):
        return tensors[0] * factor

    with pytest.raises(PlanError) as caught:
        combine(scaled, plan(w="float32"))
    assert caught.value.function is scaled


def test_a_function_under_the_name_of_another_is_refused() -> None:
    @wraps(double)
    def tripled(*tensors):
        return 3 * double(*tensors)

    with pytest.raises(PlanError) as caught:
        combine(tripled, plan(w="float32"))
    assert caught.value.function is tripled


def test_combine_wants_the_same_keys_shapes_and_dtypes() -> None:
    a = plan(w="float32", b="float32")
    with pytest.raises(KeyMismatchError) as caught:
        combine("mean", a, plan(w="float32", c="float32"))
    assert (caught.value.report.missing_keys, caught.value.report.unexpected_keys) == (("b",), ("c",))
    more = plan(w="float32", b="float32", c="float32")
    for pair in ((a, more), (more, a), (a, a, more)):
        with pytest.raises(KeyMismatchError):
            combine("mean", *pair)
    with pytest.raises(ShapeError) as shapes:
        combine("mean", a, plan(b="float32", w="float16"))
    assert (shapes.value.key, shapes.value.found.dtype.name) == ("w", "float16")
    with pytest.raises(PlanError):
        combine("mean")


@pytest.mark.parametrize("dtype", ["int64", "bool", "float4_e2m1fn_x2"])
def test_there_is_no_mean_of_ints(dtype) -> None:
    with pytest.raises(PlanError) as caught:
        combine("mean", plan(ids=dtype), plan(ids=dtype))
    assert caught.value.keys == ("ids",)
    combine(double, plan(ids=dtype), plan(ids=dtype))


def test_quantized_weights_are_not_combined() -> None:
    with pytest.raises(PlanError) as caught:
        combine("mean", StateDictPlan(QUANTIZED), StateDictPlan(QUANTIZED))
    assert caught.value.keys == ("up.weight", "up.weight_scale")


# -- like ----------------------------------------------------------------------------------------------------------


def net(tied=(), **leaves) -> ModuleSpec:
    params = {
        key: leaf if isinstance(leaf, ParamSpec) else ParamSpec(spec=TensorSpec((4, 2), leaf))
        for key, leaf in leaves.items()
    }
    return ModuleSpec(name="Net", params=params, tied=tied)


def test_like_casts_and_orders() -> None:
    done = like(net(a="bfloat16", b="float32", c="float32", missing="float32"))(
        plan(c="float16", b="float32", a="float32")
    )
    assert [(key, dtype_of(expr).name) for key, expr in done.items()] == [
        ("a", "bfloat16"),
        ("b", "float32"),
        ("c", "float32"),
    ]
    assert dict(casts(done)) == {"a": "rounding", "c": "exact"}


def test_like_refuses_keys_the_module_has_not_and_says_what_is_missing() -> None:
    spec = net(
        a="float32",
        b="float32",
        c="float32",
        buffer=ParamSpec(spec=TensorSpec([1], "float32"), kind="buffer", persistent=False),
        tied=(TiedGroup(("a", "b")),),
    )
    with pytest.raises(KeyMismatchError) as caught:
        like(spec)(plan(a="float32", x="float32", buffer="float32"))
    assert caught.value.report.unexpected_keys == ("x", "buffer")
    assert caught.value.report.missing_keys == ("c",)


def test_like_hints_at_the_prefix_that_would_fit() -> None:
    spec = ModuleSpec(name="Net", params={"base.w": ParamSpec(spec=TensorSpec((4, 2), "float32"))})
    with pytest.raises(KeyMismatchError) as caught:
        like(spec)(plan(w="float32"))
    assert caught.value.hints == ('convert(Rename("{*key}", "base.{*key}"))',)


def test_like_raises_on_shape_with_all_of_them() -> None:
    spec = net(**{key: ParamSpec(spec=TensorSpec((9, 2), "float32")) for key in ("a", "b")}, c="float32")
    with pytest.raises(ShapeError) as caught:
        like(spec)(plan(c="float32", b="float32", a="float32"))
    assert [mismatch.key for mismatch in caught.value.mismatched] == ["a", "b"]
    assert (caught.value.key, caught.value.expected.shape, caught.value.found.shape) == ("a", (9, 2), (4, 2))


def test_like_never_changes_the_kind_or_a_quantized_weight() -> None:
    with pytest.raises(PlanError) as caught:
        like(net(a="float32", b="float32"))(plan(a="float32", b="int64"))
    assert caught.value.keys == ("b",)
    spec = ModuleSpec(
        name="Net", params={key: ParamSpec(spec=TensorSpec(e.spec.shape, "bfloat16")) for key, e in QUANTIZED.items()}
    )
    with pytest.raises(PlanError):
        like(spec)(StateDictPlan(QUANTIZED))


def test_like_leaves_extra_state_as_it_is() -> None:
    state = ParamSpec(spec=TensorSpec([7], "float32"), kind="extra_state")
    source = plan(_extra_state="uint8")
    assert like(net(_extra_state=state))(source) == source


# -- together ------------------------------------------------------------------------------------------------------


def test_transforms_compose_left_to_right() -> None:
    done = pipe(
        NET, drop("head.weight"), cast("bfloat16"), keep("model.layers.{*p}"), take("model.layers.0.attn.weight", [1])
    )
    assert [repr(spec_of(expr)) for expr in done.values()] == ["[1, 2] bfloat16", "[4, 2] bfloat16"]


def test_transforms_of_stored_tensors_read_what_they_keep() -> None:
    file = FileRef("m.safetensors", "safetensors", 4096 + 32, "0" * 32)
    stored = StateDictPlan({"w": Read(file, "w", TensorSpec((4, 2), "float32"), 4096)})
    done = pipe(stored, cast("bfloat16"), take("w", [1, 2]))
    assert done["w"] == build.cast(build.index(stored["w"], [(1, 3)]), "bfloat16")


def test_the_mean_widens_before_it_adds() -> None:
    half = torch.full((3,), 60000.0, dtype=torch.float16)
    assert torch.equal(functions.mean(half, half, half), half)
    one, small = torch.tensor([1.0]), torch.tensor([2.0**-24])
    assert functions.mean(one, small, small).item() == (1 + 2 * 2.0**-24) / 3
    turned = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(functions.mean(turned, turned), turned)
    assert functions.mean(torch.empty(0, 3)).shape == (0, 3)


def test_the_mean_of_rows_is_one_row_many_times() -> None:
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0]], dtype=torch.bfloat16)
    assert torch.equal(functions.mean_rows(rows, rows=3), torch.tensor([[1.5, 15.0]] * 3, dtype=torch.bfloat16))
