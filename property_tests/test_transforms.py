"""Laws of transforms, on plans: nothing is read."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from funcmodel._toolz import compose_left
from funcmodel.core import build
from funcmodel.core.shapes import dtype_of, shape_of, spec_of
from funcmodel.core.templates import literal, match
from funcmodel.errors import KeyMismatchError, PlanError
from funcmodel.plan.casting import cast, casts, like
from funcmodel.plan.transforms import at, combine, drop, keep, overlay, take
from funcmodel.records.expressions import Call
from funcmodel.records.plans import StateDictPlan
from funcmodel.run import functions
from funcmodel.run.evaluate import materialize
from funcmodel.run.tensors import tensor_spec
from property_tests.strategies.plans import DTYPES, FLOATS, keys, module_of, plans

dtypes = st.sampled_from(DTYPES)


def items(plan):
    """A plan with its order: equality of plans alone does not see it."""
    return list(plan.items())


@st.composite
def transforms(draw):
    """Transforms that apply to every plan."""
    chosen = draw(st.sampled_from(("cast", "at", "overlay", "keep", "drop")))
    if chosen == "cast":
        return cast(draw(st.sampled_from(FLOATS)))
    if chosen == "at":
        return at("{*key}", lambda key, expr: build.reshape(expr, (-1,)) if spec_of(expr).numel else expr)
    if chosen == "overlay":
        return overlay(draw(plans()))
    return keep("{*key}") if chosen == "keep" else drop()


@st.composite
def templates_of(draw, plan):
    """Templates that match at least one key: a key itself, or with one segment or everything behind one left open."""
    chosen = []
    for key in draw(st.lists(st.sampled_from(list(plan)), max_size=3)) if plan else ():
        segments = [literal(segment) for segment in key.split(".")]
        at_ = draw(st.integers(0, len(segments) - 1))
        kind = draw(st.sampled_from(("literal", "rest", "one")))
        if kind == "rest":
            segments[at_:] = ["{*rest}"]
        if kind == "one" and key.split(".")[at_]:
            segments[at_] = "{one}"
        chosen.append(".".join(segments))
    return tuple(chosen)


@given(plans(), transforms(), transforms(), transforms())
def test_law_15_composition_is_a_monoid(plan, f, g, h) -> None:
    """(f . g) . h = f . (g . h); the composition of nothing changes nothing."""
    left, right = compose_left(compose_left(f, g), h), compose_left(f, compose_left(g, h))
    assert items(left(plan)) == items(right(plan)) == items(h(g(f(plan))))
    assert compose_left()(plan) is plan


@given(plans(), plans(), plans())
def test_law_16_overlay_is_associative_with_the_empty_plan_as_identity(a, b, c) -> None:
    """overlay(c)(overlay(b)(a)) = overlay(overlay(c)(b))(a); overlay(0)(a) = a = overlay(a)(0)."""
    assert items(overlay(c)(overlay(b)(a))) == items(overlay(overlay(c)(b))(a))
    assert items(overlay(StateDictPlan())(a)) == items(a) == items(overlay(a)(StateDictPlan()))


@given(plans(), plans())
def test_overlay_is_right_biased_and_keeps_order(a, b) -> None:
    """overlay(b)(a)[k] = b[k] where b has k, else a[k]; a's keys come first, then b's new ones."""
    union = overlay(b)(a)
    assert list(union) == [*a, *(key for key in b if key not in a)]
    assert all(union[key] == (b[key] if key in b else a[key]) for key in union)


@given(st.data(), plans())
def test_law_17_keep_and_drop_partition(data, plan) -> None:
    """keep(t)(p) and drop(t)(p) are disjoint, together p, each in p's order; keep holds what a template matches."""
    templates = data.draw(templates_of(plan))
    kept, rest = keep(*templates)(plan), drop(*templates)(plan)
    assert not kept.keys() & rest.keys()
    assert overlay(kept)(rest) == plan
    assert list(kept) == [key for key in plan if any(match(t, key) is not None for t in templates)]
    assert list(rest) == [key for key in plan if key not in kept]


@given(plans(), keys.map(literal))
def test_a_template_that_matches_nothing_raises(plan, template) -> None:
    """keep(t), drop(t), at(t) and cast(where=t) raise PlanError exactly where no key matches t."""
    for transform in (keep(template), drop(template), at(template, lambda _, e: e), cast("float32", where=template)):
        if any(match(template, key) is not None for key in plan):
            transform(plan)
        else:
            with pytest.raises(PlanError) as caught:
                transform(plan)
            assert caught.value.templates == (template,)


@given(plans(), st.sampled_from(FLOATS))
def test_a_cast_never_changes_shape_order_or_kind(plan, dtype) -> None:
    """Of cast(d)(p): keys, order, shapes are p's; floats are d; everything else is what it was. It is idempotent."""
    done = cast(dtype)(plan)
    assert list(done) == list(plan)
    for key, expr in plan.items():
        if dtype_of(expr).kind == "float":
            assert (shape_of(done[key]), dtype_of(done[key])) == (shape_of(expr), dtype)
        else:
            assert done[key] == expr
    assert cast(dtype)(done) == done
    assert set(casts(done)) == {
        key for key in plan if dtype_of(plan[key]).kind == "float" and dtype_of(plan[key]) != dtype
    }


@given(st.data(), plans(min_size=1), dtypes)
def test_a_cast_by_name_touches_one_key(data, plan, dtype) -> None:
    """cast(d, where=key) changes that key, to d whatever its kind, and no other."""
    key = data.draw(st.sampled_from(list(plan)))
    done = cast(dtype, where=literal(key))(plan)
    assert dtype_of(done[key]) is dtype
    assert all(done[other] == plan[other] for other in plan if other != key)


@given(st.data(), plans(dtypes=FLOATS))
def test_like_gives_the_plans_keys_in_module_order_with_the_modules_dtypes(data, plan) -> None:
    """like(s)(p): keys(p) in the order of s, specs of s; idempotent; like(spec of p)(p) = p."""
    shuffled = StateDictPlan(data.draw(st.permutations(items(plan))))
    wanted = module_of(cast(data.draw(st.sampled_from(FLOATS)))(StateDictPlan()) or shuffled)
    lacking = data.draw(st.sets(st.sampled_from(list(plan)))) if plan else set()
    part = StateDictPlan({key: expr for key, expr in plan.items() if key not in lacking})
    done = like(wanted)(part)
    assert list(done) == [key for key in shuffled if key in part]
    assert all(spec_of(done[key]) == wanted.params[key].spec for key in done)
    assert items(like(wanted)(done)) == items(done)
    assert like(module_of(plan))(plan) == plan


@given(plans(dtypes=FLOATS, min_size=1), keys)
def test_like_refuses_every_key_the_module_lacks(plan, extra) -> None:
    """like(s)(p) raises KeyMismatchError with exactly keys(p) - keys(s) as unexpected, keys(s) - keys(p) as missing."""
    assume(extra not in plan)
    (first, expr), *rest = plan.items()
    source = StateDictPlan({extra: expr, **dict(rest)})
    with pytest.raises(KeyMismatchError) as caught:
        like(module_of(plan))(source)
    assert caught.value.report.unexpected_keys == (extra,)
    assert caught.value.report.missing_keys == (first,)


@given(st.data(), plans(min_size=1, min_dims=1))
def test_take_of_all_rows_is_the_plan_and_takes_compose(data, plan) -> None:
    """take(k, 0...n) = id; take(k, b) . take(k, a) = take(k, a[b])."""
    key = data.draw(st.sampled_from(list(plan)))
    count = shape_of(plan[key])[0]
    assert take(key, range(count))(plan) == plan
    assume(count)
    first = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5))
    second = data.draw(st.lists(st.integers(0, len(first) - 1), max_size=5))
    assert take(key, second)(take(key, first)(plan)) == take(key, [first[i] for i in second])(plan)


@given(plans(dtypes=FLOATS), st.integers(1, 4))
def test_combine_declares_the_spec_of_its_arguments(plan, count) -> None:
    """combine(f, p, ..., p): keys and order of p; each a Call of f on count arguments with p's spec."""
    done = combine("mean", *[plan] * count)
    assert list(done) == list(plan)
    for key, call in done.items():
        assert isinstance(call, Call)
        assert (call.args, call.spec) == ((plan[key],) * count, spec_of(plan[key]))


@st.composite
def finite(draw):
    """Tensors of finite floats within half the range, subnormal and extreme ones included."""
    dtype = draw(st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16)))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(bits)
    values = draw(st.lists(st.integers(info.min, info.max), max_size=20))
    tensor = torch.tensor(values, dtype=bits).view(dtype)
    inside = tensor.isfinite() & (tensor.double().abs() <= torch.finfo(dtype).max / 2)
    return torch.where(inside, tensor, torch.zeros((), dtype=dtype))


@given(finite())
def test_law_22_the_mean_of_equal_tensors_is_the_tensor(tensor) -> None:
    """materialize(combine(mean, a, a)) ~ a, bit for bit, for finite floats within half the range; a stays as it was."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    before = tensor.clone()
    plan = StateDictPlan({"w": build.live("w", tensor_spec(tensor))})
    mean = materialize(combine("mean", plan, plan), live={"w": tensor})["w"]
    assert torch.equal(mean.view(bits), before.view(bits))
    assert torch.equal(functions.mean(tensor, tensor).view(bits), before.view(bits))
    assert torch.equal(tensor.view(bits), before.view(bits))


@given(finite(), st.integers(2, 5))
def test_the_mean_agrees_with_torch_in_double(tensor, count) -> None:
    """mean(a, 2a, ..., na) is torch's float64 mean, rounded; torch is the oracle."""
    small = tensor / 8
    parts = [small * (i + 1) for i in range(count)]
    expected = torch.stack([part.double() for part in parts]).sum(0) / count
    found, info = functions.mean(*parts), torch.finfo(tensor.dtype)
    assert found.dtype == tensor.dtype
    assert torch.allclose(found.double(), expected, rtol=info.eps, atol=info.smallest_normal * info.eps)
