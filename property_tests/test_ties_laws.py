"""Laws of ties."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from funcmodel.errors import TieConflictError
from funcmodel.plan.ties import canonical, dedupe, spread
from funcmodel.records.module import TiedGroup
from funcmodel.records.plans import StateDictPlan
from property_tests.strategies.plans import plans, tied_groups

policies = st.sampled_from((None, "first", "last"))


@st.composite
def tied_plans(draw: st.DrawFn) -> tuple[StateDictPlan, tuple[TiedGroup, ...]]:
    """A plan and groups over its keys and some that it lacks; members of most groups agree, not of all."""
    plan = draw(plans())
    groups = draw(tied_groups([*plan, "tied.only", "tied.too"]))
    entries = dict(plan)
    for group in groups:
        held = [key for key in group.keys if key in plan]
        if draw(st.integers(0, 3)):
            entries |= dict.fromkeys(held, plan[held[0]]) if held else {}
    return StateDictPlan(entries), groups


def in_conflict(plan: StateDictPlan, groups: tuple[TiedGroup, ...]) -> bool:
    return any(len({plan[key] for key in group.keys if key in plan}) > 1 for group in groups)


@given(tied_plans(), policies)
def test_law_33_dedupe_and_spread_are_idempotent(case, prefer) -> None:
    """dedupe . dedupe = dedupe, spread . spread = spread, dedupe . spread . dedupe = dedupe . spread."""
    plan, groups = case
    assume(prefer is not None or not in_conflict(plan, groups))
    one, all_ = dedupe(groups, prefer=prefer), spread(groups, prefer=prefer)
    assert list(one(one(plan)).items()) == list(one(plan).items())
    assert list(all_(all_(plan)).items()) == list(all_(plan).items())
    assert all_(one(plan)) == all_(plan)


@given(tied_plans())
def test_law_36_different_values_for_one_tie_raise(case) -> None:
    """dedupe and spread raise TieConflictError exactly where two members of a group differ."""
    plan, groups = case
    for transform in (dedupe(groups), spread(groups)):
        if in_conflict(plan, groups):
            with pytest.raises(TieConflictError) as caught:
                transform(plan)
            values = {plan[key] for key in caught.value.keys}
            assert len(values) > 1
            assert set(caught.value.keys) <= set(caught.value.tied.keys)
        else:
            transform(plan)


@given(tied_plans(), policies)
def test_dedupe_leaves_one_key_per_group_and_touches_no_other(case, prefer) -> None:
    """|group & dedupe(p)| = min(1, |group & p|); untied keys, values and order are those of p."""
    plan, groups = case
    assume(prefer is not None or not in_conflict(plan, groups))
    result = dedupe(groups, prefer=prefer)(plan)
    for group in groups:
        held = [key for key in group.keys if key in plan]
        left = [key for key in group.keys if key in result]
        assert left == ([held[-1 if prefer == "last" else 0]] if held else [])
    tied = canonical(groups)
    assert list(result) == [key for key in plan if key in result]
    assert all(key in result for key in plan if key not in tied)
    assert all(result[key] == plan[key] for key in result)


@given(tied_plans(), policies)
def test_spread_holds_every_name_of_a_group_or_none(case, prefer) -> None:
    """group & spread(p) is empty or the whole group, all of one value; the order of p's keys stays."""
    plan, groups = case
    assume(prefer is not None or not in_conflict(plan, groups))
    result = spread(groups, prefer=prefer)(plan)
    for group in groups:
        present = [key for key in group.keys if key in result]
        assert present == (list(group.keys) if any(key in plan for key in group.keys) else [])
        assert len({result[key] for key in present}) <= 1
    assert [key for key in result if key in plan] == list(plan)
