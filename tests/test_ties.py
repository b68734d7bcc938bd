import pytest

from funcmodel.errors import PlanError, TieConflictError
from funcmodel.plan.ties import canonical, dedupe, spread
from funcmodel.records.expressions import Live
from funcmodel.records.module import TiedGroup
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec

EMBED, HEAD, DECODER = "model.embed.weight", "lm_head.weight", "decoder.embed.weight"
TIED = (TiedGroup((EMBED, DECODER, HEAD)),)


def weight(name: str) -> Live:
    return Live(name, TensorSpec([8, 4], "float32"))


ONE, OTHER, NORM = weight("one"), weight("other"), weight("norm")


def test_dedupe_keeps_the_first_member_that_is_there_in_its_place() -> None:
    plan = StateDictPlan({HEAD: ONE, "norm": NORM, DECODER: ONE})
    assert list(dedupe(TIED)(plan).items()) == [("norm", NORM), (DECODER, ONE)]


def test_spread_puts_missing_names_behind_the_one_that_is_there() -> None:
    plan = StateDictPlan({HEAD: ONE, "norm": NORM})
    assert list(spread(TIED)(plan).items()) == [(HEAD, ONE), (EMBED, ONE), (DECODER, ONE), ("norm", NORM)]


def test_a_group_of_which_nothing_is_there_stays_away() -> None:
    plan = StateDictPlan({"norm": NORM})
    assert spread(TIED)(plan) == dedupe(TIED)(plan) == plan


@pytest.mark.parametrize("transform", [dedupe, spread])
def test_different_values_for_one_tie_are_refused(transform) -> None:
    plan = StateDictPlan({EMBED: ONE, "norm": NORM, HEAD: OTHER})
    with pytest.raises(TieConflictError) as caught:
        transform(TIED)(plan)
    assert caught.value.keys == (EMBED, HEAD)
    assert caught.value.tied == TIED[0]


@pytest.mark.parametrize(
    ("prefer", "kept", "value"), [("first", EMBED, ONE), ("last", HEAD, OTHER), ("lm_head.{p}", HEAD, OTHER)]
)
def test_a_policy_says_whose_value_counts(prefer, kept, value) -> None:
    plan = StateDictPlan({HEAD: OTHER, EMBED: ONE})
    assert dict(dedupe(TIED, prefer=prefer)(plan)) == {kept: value}
    assert dict(spread(TIED, prefer=prefer)(plan)) == {EMBED: value, DECODER: value, HEAD: value}


def test_a_policy_that_names_none_of_the_members_at_odds_settles_nothing() -> None:
    with pytest.raises(TieConflictError):
        dedupe(TIED, prefer=DECODER)(StateDictPlan({EMBED: ONE, HEAD: OTHER}))


def test_a_policy_that_names_both_members_at_odds_settles_nothing() -> None:
    with pytest.raises(TieConflictError):
        dedupe(TIED, prefer="{*p}.weight")(StateDictPlan({EMBED: ONE, HEAD: OTHER}))


def test_a_policy_that_names_no_tied_key_is_a_typing_error() -> None:
    with pytest.raises(PlanError) as caught:
        dedupe(TIED, prefer="lm_haed.weight")
    assert caught.value.keys == ("lm_haed.weight",)


def test_canonical_names() -> None:
    assert dict(canonical(TIED)) == {EMBED: EMBED, DECODER: EMBED, HEAD: EMBED}


def test_a_key_in_two_groups_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        canonical((TiedGroup((EMBED, HEAD)), TiedGroup((DECODER, HEAD))))
    assert HEAD in caught.value.keys
