"""Laws of resizing."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from funcmodel.core import build
from funcmodel.core.shapes import shape_of, spec_of
from funcmodel.plan.resize import Normal, resize_rows, resized
from funcmodel.records.expressions import Concat, Live, Read
from funcmodel.records.plans import StateDictPlan
from funcmodel.run.evaluate import materialize
from funcmodel.run.tensors import tensor_spec
from property_tests.strategies.plans import FLOATS, module_of, plans, tied_groups

fills = st.one_of(
    st.floats(-4, 4),
    st.builds(Normal, std=st.floats(0, 2), seed=st.integers(0, 9)),
    st.just("mean"),
)


@st.composite
def cases(draw):
    plan = draw(plans(dtypes=FLOATS, min_size=1, min_dims=1))
    key = draw(st.sampled_from(list(plan)))
    fill = draw(fills)
    return plan, key, 0.0 if fill == "mean" and shape_of(plan[key])[0] == 0 else fill


@given(cases(), st.integers(0, 9))
def test_law_18_grow_then_shrink_is_the_identity(case, more) -> None:
    """resize_rows(k, n) . resize_rows(k, n + m, fill) = id, as plans, where k has an element; so old rows are the old
    expression. A tensor without elements has no source left to tell it by."""
    plan, key, fill = case
    assume(spec_of(plan[key]).numel)
    rows = shape_of(plan[key])[0]
    grown = resize_rows(key, rows + more, fill=fill)(plan)
    assert shape_of(grown[key]) == (rows + more, *shape_of(plan[key])[1:])
    assert list(resize_rows(key, rows)(grown).items()) == list(plan.items())
    assert build.narrow(grown[key], 0, 0, rows) == plan[key]


@given(st.integers(1, 6), st.integers(0, 5), fills, st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
def test_law_18_old_rows_are_kept_bit_for_bit(rows, more, fill, dtype) -> None:
    """materialize(resize_rows(k, n + m, fill)(p))[k][:n] ~ p[k], bit for bit; the new rows are what fill says."""
    old = torch.arange(rows * 3).reshape(rows, 3).to(dtype) / 7
    plan = StateDictPlan({"w": Live("w", tensor_spec(old))})
    grown = materialize(resize_rows("w", rows + more, fill=fill)(plan), live={"w": old})["w"]
    assert torch.equal(grown[:rows].view(torch.uint8), old.view(torch.uint8))
    assert grown.shape == (rows + more, 3)
    new = grown[rows:].double()
    if fill == "mean":
        assert torch.allclose(new, old.double().mean(0).expand(more, 3), rtol=torch.finfo(dtype).eps)
    elif isinstance(fill, float):
        assert torch.equal(grown[rows:], torch.full((more, 3), fill, dtype=dtype))
    else:
        again = materialize(resize_rows("w", rows + more, fill=fill)(plan), live={"w": old})["w"]
        assert torch.equal(again, grown)
        assert bool((new.abs() <= 8 * fill.std).all())


@given(cases(), st.integers(1, 5), st.integers(1, 5))
def test_growing_twice_draws_other_rows(case, more, again) -> None:
    """No appended block repeats the block before: their noise has different seeds."""
    plan, key, _ = case
    rows, fill = shape_of(plan[key])[0], Normal()
    grown = resize_rows(key, rows + more + again, fill=fill)(resize_rows(key, rows + more, fill=fill)(plan))
    parts = grown[key].parts if isinstance(grown[key], Concat) else (grown[key],)
    seeds = [part.seed for part in parts if not isinstance(part, Live | Read)]
    assert len(set(seeds)) == len(seeds)


@given(cases(), st.integers(0, 9), st.integers(0, 9))
def test_shrinking_composes(case, a, b) -> None:
    """resize_rows(k, min(a, b)) = resize_rows(k, min(a, b)) . resize_rows(k, max(a, b)) below the number of rows."""
    plan, key, _ = case
    rows = shape_of(plan[key])[0]
    low, high = sorted((min(a, rows), min(b, rows)))
    assert resize_rows(key, low)(resize_rows(key, high)(plan)) == resize_rows(key, low)(plan)


@given(st.data(), cases(), st.integers(0, 9))
def test_the_two_sides_of_a_resize_agree(data, case, rows) -> None:
    """spec_of(resize_rows(k, n)(p)[k]) = resized(k, n)(spec of p).params[k]; so is all that is tied to k, no other."""
    plan, key, fill = case
    tied = tuple(
        group
        for group in data.draw(tied_groups(list(plan)))
        if len({spec_of(plan[member]) for member in group.keys}) == 1
    )
    before = module_of(plan, tied=tied)
    after = resized(key, rows)(before)
    members = {key}.union(*(group.keys for group in tied if key in group.keys))
    source = plan
    if rows > shape_of(plan[key])[0] == 0 and fill == "mean":
        fill = 0.0
    for member in members:
        source = resize_rows(member, rows, fill=fill)(source)
    assert {name: leaf.spec for name, leaf in after.params.items()} == {k: spec_of(e) for k, e in source.items()}
    assert all(after.params[name] == before.params[name] for name in plan if name not in members)
