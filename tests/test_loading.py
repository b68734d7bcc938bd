"""What `plan_load` plans, and what `checked` refuses."""

import pytest
import torch

import funcmodel as fm
from funcmodel.errors import KeyMismatchError, PlacementError, PlanError
from funcmodel.plan.loading import checked, plan_load
from funcmodel.records.actions import Assign, Initialize, Move, Offload, Tie
from funcmodel.records.devices import CPU, DISK, Device, DeviceMap
from funcmodel.records.expressions import Cast, Expr, FileRef, Live, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import ModuleSpec, ParamSpec, SubmoduleSpec, TiedGroup, Traits, ViewSpec
from funcmodel.records.plans import LoadPlan, StateDictPlan
from funcmodel.records.reports import DtypeChange, LoadPolicy, LoadReport, Mismatch
from funcmodel.records.tensors import TensorSpec

FILE = FileRef("ckpt/model.safetensors", "safetensors", 1 << 20, "ab" * 16)
W, B = TensorSpec([4, 3], "float32"), TensorSpec([4], "float32")
CUDA = Device("cuda", 0)
VOCABULARY = ("Rename", "Transpose", "aligned", "convert", "drop", "resize_rows")
NO_TRAITS = Traits()


def stored(name: str, spec: TensorSpec = W) -> Read:
    return Read(FILE, name, spec, 4096)


def net(tied: tuple[TiedGroup, ...] = (), traits: Traits = NO_TRAITS, **leaves: ParamSpec) -> ModuleSpec:
    """A module whose leaves are written with `__` for the dot."""
    params = {key.replace("__", "."): leaf for key, leaf in leaves.items()}
    modules = {"": SubmoduleSpec("Net")}
    modules |= {key.rpartition(".")[0]: SubmoduleSpec("Linear", "reset_parameters") for key in params if "." in key}
    return ModuleSpec(name="Net", params=params, modules=FrozenMap(modules), tied=tied, traits=traits)


def param(spec: TensorSpec = W, **options: object) -> ParamSpec:
    return ParamSpec(spec=spec, **options)  # type: ignore[arg-type]


def refused(plan: LoadPlan, policy: LoadPolicy = LoadPolicy()) -> KeyMismatchError:
    with pytest.raises(KeyMismatchError) as caught:
        checked(plan, policy)
    return caught.value


def fixed(error: KeyMismatchError, spec: ModuleSpec, source: StateDictPlan) -> LoadPlan:
    """The plan after the error's hints, which are Python, were piped in."""
    for hint in error.hints:
        source = eval(hint, {name: getattr(fm, name) for name in VOCABULARY} | {"spec": spec})(source)
    return plan_load(spec, source)


# -- what fits -----------------------------------------------------------------------------------------------------


def test_what_fits_is_assigned_in_module_order_and_the_report_is_empty() -> None:
    spec = net(a__weight=param(), a__bias=param(B))
    plan = plan_load(spec, StateDictPlan({"a.bias": stored("a.bias", B), "a.weight": stored("a.weight")}))
    assert plan.actions == (Assign("a.weight", stored("a.weight"), CPU), Assign("a.bias", stored("a.bias", B), CPU))
    assert plan.report == LoadReport()
    assert checked(plan) is plan


def test_a_plain_dict_is_a_source_and_stays_as_it_was() -> None:
    source: dict[str, Expr] = {"w": stored("w"), "more": stored("more")}
    before = dict(source)
    assert plan_load(net(w=param()), source).report.unexpected_keys == ("more",)
    assert source == before


def test_views_are_assigned_like_other_leaves() -> None:
    spec = ModuleSpec(name="Net", params={"w": param(), "v": param(B)}, views=FrozenMap({"v": ViewSpec("w", (1,), 0)}))
    plan = plan_load(spec, {"w": stored("w"), "v": stored("v", B)})
    assert [action.key for action in plan.actions if isinstance(action, Assign)] == ["w", "v"]


def test_extra_state_is_assigned_whatever_its_shape() -> None:
    spec = net(w=param(), x__extra=param(B, kind="extra_state", device=CPU))
    plan = checked(plan_load(spec, {"w": stored("w"), "x.extra": stored("x.extra", W)}))
    assert plan.actions[-1] == Assign("x.extra", stored("x.extra", W), CPU)


def test_extra_state_that_is_no_tensor_has_no_action() -> None:
    spec = ModuleSpec(name="Net", params={"w": param()}, opaque=("_extra_state",))
    assert checked(plan_load(spec, {"w": stored("w")})).report == LoadReport()
    assert plan_load(spec, {"w": stored("w"), "_extra_state": stored("x")}).report.unexpected_keys == ("_extra_state",)


# -- buffers -------------------------------------------------------------------------------------------------------


def test_a_buffer_outside_the_state_dict_keeps_its_value() -> None:
    spec = net(w=param(), inv_freq=param(B, kind="buffer", persistent=False, device=CPU))
    plan = checked(plan_load(spec, {"w": stored("w")}, device_map="cuda:0"))
    assert plan.actions[-1] == Move("inv_freq", CUDA, 16)


def test_the_source_cannot_give_it_one() -> None:
    spec = net(w=param(), inv_freq=param(B, kind="buffer", persistent=False, device=CPU))
    plan = plan_load(spec, {"w": stored("w"), "inv_freq": stored("inv_freq", B)})
    assert plan.report.unexpected_keys == ("inv_freq",)
    assert isinstance(plan.actions[-1], Move)


def test_nor_if_it_has_two_names() -> None:
    buffer = param(B, kind="buffer", persistent=False, device=CPU)
    spec = net((TiedGroup(("a.inv_freq", "b.inv_freq")),), w=param(), a__inv_freq=buffer, b__inv_freq=buffer)
    plan = plan_load(spec, {"w": stored("w"), "b.inv_freq": stored("x", B)})
    assert plan.report.unexpected_keys == ("b.inv_freq",)
    assert plan.actions[1:] == (Move("a.inv_freq", CPU, 16), Tie("b.inv_freq", "a.inv_freq"))


def test_of_two_names_the_one_in_the_state_dict_counts() -> None:
    outside, inside = (param(B, kind="buffer", persistent=kept, device=CPU) for kept in (False, True))
    spec = net((TiedGroup(("a.b", "b.b")),), a__b=outside, b__b=inside)
    plan = checked(plan_load(spec, {"b.b": stored("b.b", B)}))
    assert plan.actions == (Assign("a.b", stored("b.b", B), CPU), Tie("b.b", "a.b"))
    assert plan_load(spec, {"a.b": stored("a.b", B)}).report.missing_keys == ("b.b",)


def test_on_meta_it_has_no_value_and_that_is_refused() -> None:
    spec = net(w=param(), inv_freq=param(B, kind="buffer", persistent=False))
    plan = plan_load(spec, {"w": stored("w")}, init="reset_parameters")
    assert plan.report.meta_keys == ("inv_freq",)
    with pytest.raises(PlanError) as caught:
        checked(plan)
    assert caught.value.keys == ("inv_freq",)


def test_there_is_nothing_to_keep_on_meta() -> None:
    spec = net(w=param(), inv_freq=param(B, kind="buffer", persistent=False))
    plan = plan_load(spec, {"w": stored("w")}, init={"{*k}": "constructor"})
    assert plan.report.meta_keys == ("inv_freq",)


def test_a_function_by_template_can_give_it_one() -> None:
    spec = net(w=param(), rope__inv_freq=param(B, kind="buffer", persistent=False))
    plan = checked(plan_load(spec, {"w": stored("w")}, init={"{*p}.inv_freq": "pkg.rope:inv_freq"}, seed=3))
    assert plan.actions[0] == Initialize("rope", ("rope.inv_freq",), "pkg.rope:inv_freq", 3, CPU, 16)


def test_a_missing_buffer_with_a_value_keeps_it() -> None:
    spec = net(bn__weight=param(B), bn__running_mean=param(B, kind="buffer", device=CPU))
    plan = plan_load(spec, {"bn.weight": stored("bn.weight", B)})
    assert plan.report.missing_keys == ("bn.running_mean",)
    assert plan.actions[0] == Initialize("bn", ("bn.running_mean",), "constructor", 0, CPU, 16)


# -- ties ----------------------------------------------------------------------------------------------------------

TIED = (TiedGroup(("embed.weight", "head.weight")),)
PAIR = net(TIED, embed__weight=param(), head__weight=param())


@pytest.mark.parametrize("held", ["embed.weight", "head.weight"])
def test_one_name_of_a_tie_is_enough(held: str) -> None:
    plan = checked(plan_load(PAIR, {held: stored(held)}))
    assert plan.actions == (Assign("embed.weight", stored(held), CPU), Tie("head.weight", "embed.weight"))
    assert plan.report == LoadReport(tied_keys=(("head.weight", "embed.weight"),))


def test_two_names_of_one_stored_tensor_are_one_tensor() -> None:
    plan = checked(plan_load(PAIR, {"head.weight": stored("w"), "embed.weight": stored("w")}))
    assert plan.actions[-1] == Tie("head.weight", "embed.weight")
    assert plan.report.skipped_keys == ("head.weight",)


def test_two_stored_tensors_for_one_tie_must_be_equal_when_the_plan_is_applied() -> None:
    plan = checked(plan_load(PAIR, {"head.weight": stored("h"), "embed.weight": stored("e")}))
    assert plan.actions == (
        Assign("embed.weight", stored("e"), CPU),
        Tie("head.weight", "embed.weight", stored("h")),
    )
    assert plan.report.skipped_keys == ("head.weight",)


def test_a_twin_of_another_shape_is_a_mismatch() -> None:
    plan = plan_load(PAIR, {"head.weight": stored("h", B), "embed.weight": stored("e")})
    assert refused(plan).report.mismatched_keys == (Mismatch("head.weight", W, B),)


def test_a_tie_of_which_nothing_is_there_is_missing_under_every_name_and_drawn_once() -> None:
    plan = plan_load(net(TIED, embed__weight=param(), head__weight=param(), w=param()), {"w": stored("w")})
    assert plan.report.missing_keys == ("embed.weight", "head.weight")
    assert plan.report.initialized_keys == ("embed.weight",)
    assert plan.actions[0] == Initialize("embed", ("embed.weight",), "reset_parameters", 0, CPU, 48)
    assert plan.actions[-1] == Tie("head.weight", "embed.weight")


def test_a_key_in_two_ties_is_refused() -> None:
    tied = (TiedGroup(("a.w", "b.w")), TiedGroup(("b.w", "c.w")))
    with pytest.raises(PlanError):
        plan_load(net(tied, a__w=param(), b__w=param(), c__w=param()), {})


# -- places --------------------------------------------------------------------------------------------------------


def test_the_longest_prefix_on_a_dot_boundary_wins() -> None:
    spec = net(**{"a__w": param(), "a__b__w": param(), "ab__w": param(), "a__b__v": param()})
    plan = plan_load(spec, {}, device_map={"": "cpu", "a": 0, "a.b": 1, "a.b.v": "cpu"}, init="pkg.mod:zeros")
    homes = {key: action.device for action in plan.actions for key in action.keys}  # type: ignore[union-attr]
    assert homes == {"a.w": CUDA, "a.b.w": Device("cuda", 1), "ab.w": CPU, "a.b.v": CPU}


def test_without_a_map_a_tensor_goes_where_the_module_has_it() -> None:
    spec = net(a=param(device=CUDA), b=param())
    plan = plan_load(spec, {"a": stored("a"), "b": stored("b")})
    assert [action.device for action in plan.actions if isinstance(action, Assign)] == [CUDA, CPU]


@pytest.mark.parametrize("where", ["meta", {"": "meta"}])
def test_meta_is_no_place_for_a_value(where: object) -> None:
    with pytest.raises(PlacementError):
        plan_load(net(w=param()), {"w": stored("w")}, device_map=where)


@pytest.mark.parametrize("where", [{"a": 0}, DeviceMap({"a": 0}), {"": 0, "nowhere": 1}, {"": 0, "a.w": 1, "x.y": 1}])
def test_a_map_that_misses_a_leaf_or_the_module_is_refused(where: object) -> None:
    with pytest.raises(PlacementError):
        plan_load(net(a__w=param(), b__w=param()), {}, device_map=where)


def test_a_prefix_above_the_leaves_is_known_even_if_no_module_is_listed() -> None:
    spec = ModuleSpec(name="Net", params={"a.b.w": param()})
    plan = plan_load(spec, {"a.b.w": stored("w")}, device_map={"a": "cuda:0"})
    assert plan.actions == (Assign("a.b.w", stored("w"), CUDA),)


def test_what_is_no_device_is_refused() -> None:
    with pytest.raises(PlacementError):
        plan_load(net(w=param()), {}, device_map="not a device")


def test_ties_stay_together() -> None:
    with pytest.raises(PlacementError) as caught:
        plan_load(PAIR, {}, device_map={"embed": 0, "head": 1})
    assert caught.value.keys == ("embed.weight", "head.weight")


def test_on_disk_a_stored_tensor_is_left_where_it_is_and_another_is_copied() -> None:
    half = Cast(stored("b"), "float16")
    spec = net(a=param(), b=param(TensorSpec([4, 3], "float16")))
    plan = checked(plan_load(spec, {"a": stored("a"), "b": half}, device_map="disk"))
    assert plan.actions == (Offload("a", stored("a"), copy=False), Offload("b", half, copy=True))
    assert Device("disk") == DISK


# -- what is missing -----------------------------------------------------------------------------------------------


def zeros(key: str, spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(spec.shape)


def test_missing_leaves_of_one_submodule_are_drawn_together() -> None:
    plan = plan_load(net(w=param(), head__weight=param(), head__bias=param(B)), {"w": stored("w")}, seed=7)
    assert plan.actions[0] == Initialize("head", ("head.weight", "head.bias"), "reset_parameters", 7, CPU, 64)
    assert refused(plan).keys == ("head.weight", "head.bias")
    assert checked(plan, LoadPolicy(missing="init")) is plan


def test_a_missing_bare_parameter_needs_a_function() -> None:
    spec = net(gain=param(B), a__w=param())
    with pytest.raises(PlanError) as caught:
        checked(plan_load(spec, {"a.w": stored("a.w")}), LoadPolicy(missing="init"))
    assert caught.value.keys == ("gain",)
    plan = checked(plan_load(spec, {"a.w": stored("a.w")}, init={"gain": zeros}), LoadPolicy(missing="init"))
    assert isinstance(plan.actions[0], Initialize)
    assert plan.actions[0].how == f"{__name__}:zeros"


def test_the_first_template_that_matches_chooses_the_initializer() -> None:
    spec = net(a__w=param(), b__w=param(), c__w=param())
    plan = plan_load(spec, {}, init={"a.{*p}": zeros, "{*p}.w": "reset_parameters"})
    assert [a.how for a in plan.actions if isinstance(a, Initialize)] == [
        f"{__name__}:zeros",
        "reset_parameters",
        "reset_parameters",
    ]


def test_keeping_a_value_needs_a_value() -> None:
    plan = plan_load(net(a=param(device=CPU), b=param()), {}, init="constructor")
    assert [a.how for a in plan.actions if isinstance(a, Initialize)] == ["constructor", None]


@pytest.mark.parametrize("init", [lambda k, s, g: None, "zeros", "pkg.mod:a.b", zeros.__call__, 3, {"{*k}": "x"}])
def test_what_a_plan_cannot_name_is_no_initializer(init: object) -> None:
    with pytest.raises(PlanError):
        plan_load(net(w=param()), {}, init=init)  # type: ignore[arg-type]


def test_keys_that_the_class_declares_ignorable_are_no_findings() -> None:
    traits = Traits(ignore_missing=["position_ids"], ignore_unexpected=["{*p}.inv_freq"])
    ids = param(TensorSpec([4], "int64"), kind="buffer", device=CPU)
    spec = net(traits=traits, w=param(), position_ids=ids)
    plan = checked(plan_load(spec, {"w": stored("w"), "rope.inv_freq": stored("x")}))
    assert plan.report.skipped_keys == ("position_ids", "rope.inv_freq")
    assert plan.report.initialized_keys == ("position_ids",)
    assert plan.actions[0] == Initialize("", ("position_ids",), "constructor", 0, CPU, 32)


# -- dtypes --------------------------------------------------------------------------------------------------------

HALF = TensorSpec([4, 3], "bfloat16")


def test_by_default_a_leaf_takes_the_dtype_of_the_file() -> None:
    plan = checked(plan_load(net(w=param()), {"w": stored("w", HALF)}))
    assert plan.actions == (Assign("w", stored("w", HALF), CPU),)
    assert plan.report.dtype_changes == (DtypeChange("w", W.dtype, HALF.dtype, "exact", cast=False),)


def test_or_the_module_decides_and_the_loss_is_reported() -> None:
    plan = plan_load(net(w=param(HALF)), {"w": stored("w")}, dtype="module")
    assert plan.actions == (Assign("w", Cast(stored("w"), "bfloat16"), CPU),)
    assert plan.report.dtype_changes == (DtypeChange("w", HALF.dtype, W.dtype, "rounding", cast=True),)
    assert checked(plan, LoadPolicy(dtype="module")) is plan


@pytest.mark.parametrize("dtype", ["error", "module"])
def test_a_policy_can_refuse_another_dtype(dtype: str) -> None:
    plan = plan_load(net(w=param(HALF)), {"w": stored("w")})
    with pytest.raises(PlanError) as caught:
        checked(plan, LoadPolicy(dtype=dtype))  # type: ignore[arg-type]
    assert caught.value.keys == ("w",)


@pytest.mark.parametrize("dtype", ["file", "module"])
def test_a_change_of_kind_is_refused_always(dtype: str) -> None:
    numbers = TensorSpec([4, 3], "int64")
    plan = plan_load(net(w=param()), {"w": stored("w", numbers)}, dtype=dtype)  # type: ignore[arg-type]
    assert plan.report.dtype_changes == (DtypeChange("w", W.dtype, numbers.dtype, "kind", cast=False),)
    for policy in (LoadPolicy(), LoadPolicy(dtype="module"), LoadPolicy(dtype="error")):
        with pytest.raises(PlanError) as caught:
            checked(plan, policy)
        assert caught.value.keys == ("w",)


def test_unless_the_caller_planned_it() -> None:
    checked(plan_load(net(w=param()), {"w": Cast(stored("w", TensorSpec([4, 3], "int64")), "float32")}))


def test_another_word_for_dtype_is_refused() -> None:
    with pytest.raises(PlanError):
        plan_load(net(w=param()), {}, dtype="float16")  # type: ignore[arg-type]


# -- refusing ------------------------------------------------------------------------------------------------------


def test_all_findings_come_in_one_error() -> None:
    spec = net(a__w=param(), b__w=param(), c__w=param())
    plan = plan_load(spec, {"a.w": stored("a.w", B), "b.w": stored("b.w"), "x": stored("x")})
    error = refused(plan)
    assert error.report == plan.report
    assert error.report.missing_keys == ("c.w",)
    assert error.report.unexpected_keys == ("x",)
    assert error.report.mismatched_keys == (Mismatch("a.w", W, B),)
    assert error.keys == ("c.w", "x", "a.w")
    assert str(error).startswith("Net does not match ckpt/model.safetensors (1 missing, 1 unexpected, 1 mismatched)\n")


def test_a_waiver_allows_what_it_matches_and_nothing_else() -> None:
    plan = plan_load(net(a__w=param(), b__w=param()), {"a.w": stored("a.w"), "x.y": stored("x"), "z": stored("z")})
    assert refused(plan, LoadPolicy(allow=("missing:b.w", "unexpected:x.{k}"))).keys == ("z",)
    checked(plan, LoadPolicy(allow=("missing:{*k}", "unexpected:{*k}")))


def test_a_waiver_that_matches_nothing_is_an_error() -> None:
    plan = plan_load(net(w=param()), {"w": stored("w"), "x": stored("x")})
    error = refused(plan, LoadPolicy(unexpected="ignore", allow=("unexpected:x", "unexpected:y", "missing:x")))
    assert error.unused == ("missing:x", "unexpected:y")


def test_a_policy_can_draw_what_has_another_shape() -> None:
    plan = plan_load(net(a__w=param(), b__w=param()), {"a.w": stored("a.w", B), "b.w": stored("b.w")})
    assert plan.report.initialized_keys == ("a.w",)
    assert refused(plan, LoadPolicy(missing="init", unexpected="ignore")).keys == ("a.w",)
    checked(plan, LoadPolicy(mismatched="init"))
    checked(plan, LoadPolicy(allow=("mismatched:a.{k}",)))


@pytest.mark.parametrize("source", [{}, {"x.w": stored("x.w")}])
def test_a_source_that_shares_nothing_with_the_module_is_refused_whatever_the_policy(source: dict[str, Expr]) -> None:
    plan = plan_load(net(a__w=param()), source)
    assert "a.w" in refused(plan, LoadPolicy(missing="init", unexpected="ignore", mismatched="init")).keys


def test_a_module_without_weights_loads_from_nothing() -> None:
    checked(plan_load(ModuleSpec(name="ReLU", params={}), {}))


# -- companions ----------------------------------------------------------------------------------------------------


def test_the_scale_of_a_quantized_weight_is_never_ignored() -> None:
    plan = plan_load(net(fc__weight=param()), {"fc.weight": stored("w"), "fc.weight_scale_inv": stored("s", B)})
    assert plan.report.companion_keys == ("fc.weight_scale_inv",)
    for policy in (LoadPolicy(unexpected="ignore"), LoadPolicy(allow=("unexpected:{*k}",))):
        assert refused(plan, policy).keys == ("fc.weight_scale_inv",)
    checked(plan, LoadPolicy(allow=("unexpected:fc.weight_scale_inv",)))


def test_a_scale_whose_weight_is_as_unexpected_goes_with_it() -> None:
    source = {"w": stored("w"), "mtp.weight": stored("m"), "mtp.weight_scale": stored("s", B)}
    plan = plan_load(net(w=param()), source)
    assert plan.report.companion_keys == ()
    checked(plan, LoadPolicy(unexpected="ignore"))


def test_a_scale_whose_weight_only_the_module_has_is_not_ignored() -> None:
    plan = plan_load(net(w=param(), fc__weight=param()), {"w": stored("w"), "fc.weight_scale": stored("s", B)})
    assert plan.report.companion_keys == ("fc.weight_scale",)


# -- hints ---------------------------------------------------------------------------------------------------------


def source_of(**entries: Expr) -> StateDictPlan:
    return StateDictPlan({key.replace("__", "."): expr for key, expr in entries.items()})


def layers(*names: str, prefix: str = "enc", count: int = 12) -> dict[str, TensorSpec]:
    return {f"{prefix}.{i}.{name}": TensorSpec([4], "float32") for i in range(count) for name in names}


HINTED = {
    "a prefix": (layers("w", "v"), layers("w", "v", prefix="model.enc") | {"model.head.w": W}),
    "old names": (layers("norm.weight", "norm.bias"), layers("norm.gamma", "norm.beta")),
    "another word": (layers("key", "query", "w"), layers("k", "qry", "w")),
    "surplus buffers": (layers("w"), layers("w", "inv_freq")),
    "one surplus": (layers("w"), layers("w") | {"position_ids": B}),
    "surplus layers": (layers("w", count=3), layers("w", count=5)),
    "a surplus tower": (
        layers("w"),
        layers("w") | {f"tower.{n}.{k}": W for n, k in zip("abcdefgh", "ijklmnop", strict=True)},
    ),
    "odd characters": (layers("w"), layers("w") | {'a"{b}.\\c': B}),
    "more rows": ({"e.w": W, "e.b": B}, {"e.w": TensorSpec([2, 3], "float32"), "e.b": TensorSpec([2], "float32")}),
    "fewer rows": ({"e.w": W, "x": B}, {"e.w": TensorSpec([9, 3], "float32"), "x": B}),
    "turned": (
        layers("w") | {f"c.{i}.w": W for i in range(3)},
        layers("w") | {f"c.{i}.w": TensorSpec([3, 4], "float32") for i in range(3)},
    ),
    "some turned": ({"c.0.w": W, "c.1.w": W}, {"c.0.w": W, "c.1.w": TensorSpec([3, 4], "float32")}),
}


@pytest.mark.parametrize("name", HINTED)
def test_a_hint_piped_in_fixes_what_was_found(name: str) -> None:
    wanted, held = HINTED[name]
    spec = ModuleSpec(name="Net", params={key: param(found) for key, found in wanted.items()})
    source = StateDictPlan({key: stored(key, found) for key, found in held.items()})
    error = refused(plan_load(spec, source))
    assert error.hints
    assert checked(fixed(error, spec, source)).report.missing_keys == ()


def test_names_of_old_become_what_they_meant() -> None:
    wanted, held = HINTED["old names"]
    spec = ModuleSpec(name="Net", params={key: param(found) for key, found in wanted.items()})
    source = StateDictPlan({key: stored(key, found) for key, found in held.items()})
    plan = fixed(refused(plan_load(spec, source)), spec, source)
    meant = {"weight": "gamma", "bias": "beta"}
    for action in plan.actions:
        assert isinstance(action, Assign)
        assert isinstance(action.expr, Read)
        assert meant[action.key.rpartition(".")[2]] == action.expr.name.rpartition(".")[2]


def test_no_rename_is_proposed_that_would_take_other_keys_with_it() -> None:
    wanted = layers("w", count=3) | {f"dec.{i}.w": B for i in (3, 4)}
    spec = ModuleSpec(name="Net", params={key: param(found) for key, found in wanted.items()})
    plan = plan_load(spec, {key: stored(key, found) for key, found in layers("w", count=5).items()})
    assert plan.report.missing_keys == ("dec.3.w", "dec.4.w")
    assert not [hint for hint in plan.report.hints if "Rename" in hint]


def test_no_rename_is_proposed_where_two_would_do() -> None:
    spec = ModuleSpec(name="Net", params={"a": param(B), "x.p": param(B), "x.q": param(B)})
    plan = plan_load(spec, {"a": stored("a", B), "x.r": stored("r", B), "x.s": stored("s", B)})
    assert not [hint for hint in plan.report.hints if "Rename" in hint]


def test_a_name_that_is_nearly_right_is_shown_where_no_rename_fits() -> None:
    spec = ModuleSpec(name="Net", params={"a": param(B), "layer.attention.weight": param(W)})
    plan = plan_load(spec, {"a": stored("a", B), "layer.atention.weight": stored("w", B)})
    assert plan.report.near_misses == (("layer.attention.weight", "layer.atention.weight"),)


def test_where_nothing_fits_dropping_everything_is_no_hint() -> None:
    plan = plan_load(net(a__w=param()), {"x.y": stored("x", B), "z": stored("z", B)})
    assert not [hint for hint in plan.report.hints if "drop" in hint]


def test_the_message_is_folded_and_holds_the_hint() -> None:
    rope = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": stored("r", B) for i in range(32)}
    spec = net(model__w=param(), lm_head__weight=param(), model__embed=param())
    source = {"model.w": stored("w"), "model.embed": stored("e", TensorSpec([2, 3], "float32")), **rope}
    assert str(refused(plan_load(spec, source))).splitlines() == [
        "Net does not match ckpt/model.safetensors (1 missing, 32 unexpected, 1 mismatched)",
        "  missing     lm_head.weight",
        "  unexpected  model.layers.{0...31}.self_attn.rotary_emb.inv_freq",
        "  mismatched  model.embed   expected [4, 3] float32, found [2, 3] float32",
        '  hint        resize_rows("model.embed", 4, fill="mean"); drop("{*p}.inv_freq")',
    ]


def test_the_source_is_named_by_its_folder_or_its_file() -> None:
    shards = {f"s{i}": Read(FileRef(f"ckpt/m-{i}.safetensors", "safetensors", 9, ""), "s", B, 0) for i in range(2)}
    assert plan_load(net(w=param()), shards).source == "ckpt/"
    assert plan_load(net(w=param()), {"x": stored("x")}).source == "ckpt/model.safetensors"
    assert plan_load(net(w=param()), {"x": Live("x", B)}).source == ""
    assert plan_load(net(w=param()), {"w": stored("w")}).source == ""


# -- memory --------------------------------------------------------------------------------------------------------


def test_what_is_replaced_is_counted_once_and_meta_is_not() -> None:
    tied = (TiedGroup(("a.w", "b.w")),)
    keep = param(B, kind="buffer", persistent=False, device=CPU)
    spec = net(tied, a__w=param(device=CPU), b__w=param(device=CPU), c__w=param(), keep=keep)
    source = {"a.w": stored("a.w"), "c.w": stored("c.w")}
    assert plan_load(spec, source).replaced == {CPU: 48}
    assert plan_load(spec, source, device_map="cuda:0").replaced == {CPU: 48 + 16}
