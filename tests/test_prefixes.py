import pytest

from funcmodel.errors import PlanError
from funcmodel.plan.prefixes import Alignment, aligned, alignment, hint
from funcmodel.records.expressions import Live
from funcmodel.records.module import ModuleSpec, ParamSpec, Traits
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec

SPEC = TensorSpec([4], "float32")
BASE = ("embeddings.w", "encoder.0.w", "encoder.1.w", "norm.w")
HEADED = (*(f"bert.{key}" for key in BASE), "classifier.w")


def module(*keys: str, base_prefix: str = "", **shapes: list[int]) -> ModuleSpec:
    params = {key: ParamSpec(spec=TensorSpec(shapes.get(key, [4]), "float32")) for key in keys}
    return ModuleSpec(name="Net", params=params, traits=Traits(base_prefix=base_prefix))


def plan(*keys: str) -> StateDictPlan:
    """Each expression remembers the name it came from."""
    return StateDictPlan({key: Live(key, SPEC) for key in keys})


def moves(spec: ModuleSpec, source: StateDictPlan) -> dict[str, str]:
    return {expr.key: name for name, expr in aligned(spec)(source).items()}


def test_a_base_checkpoint_fits_a_model_with_a_head() -> None:
    assert moves(module(*HEADED), plan(*BASE)) == {key: f"bert.{key}" for key in BASE}


def test_a_checkpoint_with_a_head_fits_the_base_and_the_head_stays_visible() -> None:
    expected = {f"bert.{key}": key for key in BASE} | {"classifier.w": "classifier.w"}
    assert moves(module(*BASE), plan(*HEADED)) == expected


def test_a_wrapper_around_everything_comes_off_and_goes_on() -> None:
    wrapped = tuple(f"module.{key}" for key in HEADED)
    assert moves(module(*HEADED), plan(*wrapped)) == dict(zip(wrapped, HEADED, strict=True))
    assert moves(module(*wrapped), plan(*HEADED)) == dict(zip(HEADED, wrapped, strict=True))


def test_two_wrappers_come_off_at_once() -> None:
    wrapped = tuple(f"_orig_mod.module.{key}" for key in HEADED)
    assert moves(module(*HEADED), plan(*wrapped)) == dict(zip(wrapped, HEADED, strict=True))


def test_a_wrapped_base_checkpoint_fits_a_model_with_a_head() -> None:
    wrapped = tuple(f"module.{key}" for key in BASE)
    found = alignment(module(*HEADED), plan(*wrapped))
    assert (found.strip, found.add, found.hits) == ("module", "bert", len(BASE))


def test_a_declared_prefix_may_have_several_segments() -> None:
    headed = (*(f"model.decoder.{key}" for key in BASE), "model.other.x", "score.w")
    spec = module(*headed, base_prefix="model.decoder")
    assert moves(spec, plan(*BASE)) == {key: f"model.decoder.{key}" for key in BASE}
    assert alignment(module(*BASE, base_prefix="model.decoder"), plan(*headed)).strip == "model.decoder"


def test_a_head_beside_a_base_without_prefix_keeps_its_name() -> None:
    found = alignment(module(*HEADED), plan(*BASE, "classifier.w"))
    assert found == Alignment(add="bert", kept=("classifier",), hits=5, keys=5)
    assert moves(module(*HEADED), plan(*BASE, "classifier.w"))["classifier.w"] == "classifier.w"


def test_what_fits_is_left_alone() -> None:
    for keys in (HEADED, HEADED[:1], HEADED[-1:]):
        source = plan(*keys)
        assert aligned(module(*HEADED))(source) is source
    assert alignment(module(*HEADED), plan()).hits == 0


# A backbone with a norm of its own beside the base model's: guessing key by key exchanges the two.
PIXIO = ("pixio.embeddings.w", "pixio.encoder.0.w", "pixio.layernorm.w", "layernorm.w")
PIXIO_BASE = ("embeddings.w", "encoder.0.w", "layernorm.w")


def test_a_backbone_whose_names_repeat_never_swaps() -> None:
    source = plan(*PIXIO)
    assert aligned(module(*PIXIO, base_prefix="pixio"))(source) is source
    two = plan("layernorm.w", "pixio.layernorm.w")
    assert aligned(module(*PIXIO, base_prefix="pixio"))(two) is two


def test_a_name_that_base_and_head_share_goes_where_the_others_go() -> None:
    expected = {key: f"pixio.{key}" for key in PIXIO_BASE}
    assert moves(module(*PIXIO, base_prefix="pixio"), plan(*PIXIO_BASE)) == expected


def test_two_keys_for_one_name_are_refused_instead_of_losing_one() -> None:
    with pytest.raises(PlanError) as caught:
        aligned(module(*PIXIO_BASE))(plan(*PIXIO))
    assert set(caught.value.keys) == {"layernorm.w", "pixio.layernorm.w"}
    assert [candidate.strip for candidate in caught.value.candidates] == ["pixio"]


def test_equally_good_candidates_are_refused_and_shown() -> None:
    twins = module("student.enc.w", "student.norm.w", "teacher.enc.w", "teacher.norm.w")
    with pytest.raises(PlanError) as caught:
        aligned(twins)(plan("enc.w", "norm.w"))
    assert {candidate.add for candidate in caught.value.candidates} == {"student", "teacher"}


def test_a_plan_that_fits_as_it_is_and_below_a_prefix_is_ambiguous() -> None:
    with pytest.raises(PlanError) as caught:
        aligned(module("norm.w", "base.norm.w"))(plan("norm.w"))
    assert {candidate.add for candidate in caught.value.candidates} == {"", "base"}


def test_part_of_a_backbone_is_not_moved_into_its_head() -> None:
    source = plan("pixio.layernorm.w")
    assert aligned(module(*PIXIO, base_prefix="pixio"))(source) is source


def test_one_step_comes_before_two() -> None:
    assert moves(module("base.fc.w", "head.w"), plan("fc.w")) == {"fc.w": "base.fc.w"}


def test_one_of_two_twins_is_not_moved_to_the_other() -> None:
    source = plan("student.enc.w", "student.norm.w")
    spec = module("student.enc.w", "student.norm.w", "teacher.enc.w", "teacher.norm.w")
    assert aligned(spec)(source) is source


def test_moving_keys_that_fit_nowhere_is_no_rival() -> None:
    source = plan("shared.w", "encoder.w", "decoder.x.w", "decoder.y.w", "lm_head.w")
    assert aligned(module("shared.w", "encoder.w", "encoder.z.w"))(source) is source


def test_nothing_fits_is_an_error_not_an_empty_match() -> None:
    with pytest.raises(PlanError):
        aligned(module(*HEADED))(plan("something.else", "again"))
    with pytest.raises(PlanError):
        aligned(module("enc.w", **{"enc.w": [9]}))(plan("base.enc.w"))
    with pytest.raises(PlanError):
        aligned(module())(plan("a"))


def test_shapes_decide_between_two_places() -> None:
    spec = module("small.enc.w", "large.enc.w", **{"large.enc.w": [9]})
    assert moves(spec, plan("enc.w")) == {"enc.w": "small.enc.w"}


def test_buffers_that_no_checkpoint_holds_do_not_count() -> None:
    params = {"a.w": ParamSpec(spec=SPEC, persistent=False), "b.w": ParamSpec(spec=SPEC)}
    assert moves(ModuleSpec(name="Net", params=params), plan("w")) == {"w": "b.w"}


def test_a_prefix_is_whole_segments() -> None:
    assert moves(module("enc.w", "norm.w"), plan("bert.enc.w", "bert.norm.w", "bertha.w")) == {
        "bert.enc.w": "enc.w",
        "bert.norm.w": "norm.w",
        "bertha.w": "bertha.w",
    }


def test_a_hint_is_the_transform_that_would_help() -> None:
    assert hint(module(*HEADED), plan(*BASE)) == 'convert(Rename("{*key}", "bert.{*key}"))'
    assert hint(module(*BASE), plan(*HEADED)) == 'convert(Rename("bert.{*key}", "{*key}"))'
    assert hint(module(*HEADED), plan(*BASE, "classifier.w")) == "aligned(spec)"
    assert hint(module(*BASE), plan(*BASE)) is None
    assert hint(module(*BASE), plan("nothing.like.it")) is None
