"""Laws of prefixes: a renaming of the whole set of keys, injective, and never an exchange."""

from hypothesis import assume, given
from hypothesis import strategies as st

from funcmodel.errors import PlanError
from funcmodel.plan.prefixes import aligned, alignment
from funcmodel.records.expressions import Live
from funcmodel.records.module import ModuleSpec, ParamSpec, Traits
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec
from property_tests.strategies.plans import plain_keys

names = st.lists(plain_keys, min_size=1, max_size=6, unique=True)
sides = st.integers(1, 2)


@st.composite
def modules(draw) -> ModuleSpec:
    """Modules whose few names repeat inside one another, like a backbone with a norm beside its base model's norm."""
    params = {key: ParamSpec(spec=TensorSpec([draw(sides)], "float32")) for key in draw(names)}
    return ModuleSpec(name="Net", params=params, traits=Traits(base_prefix=draw(st.sampled_from(("", "a", "a.b")))))


@st.composite
def cases(draw) -> tuple[ModuleSpec, StateDictPlan]:
    """A module and a state dict with its names, some a prefix longer or shorter, some strange.

    Each expression remembers the name it came from.
    """
    spec = draw(modules())
    edit = draw(st.sampled_from(("same", "longer", "shorter", "any")))
    prefix = draw(st.sampled_from(("a", "b", "norm", "x.y")))
    entries = {}
    for name, leaf in spec.params.items():
        how = draw(st.sampled_from((edit, edit, edit, "same", "longer", "shorter", "gone"))) if edit == "any" else edit
        key = {"longer": f"{prefix}.{name}", "shorter": name.partition(".")[2] or name}.get(how, name)
        if how != "gone":
            entries[key] = Live(key, leaf.spec)
    for key in draw(st.lists(plain_keys, max_size=2)):
        entries.setdefault(key, Live(key, TensorSpec([draw(sides)], "float32")))
    return spec, StateDictPlan(entries)


def try_aligned(spec: ModuleSpec, plan: StateDictPlan) -> StateDictPlan | None:
    try:
        return aligned(spec)(plan)
    except PlanError:
        return None


def hits(spec: ModuleSpec, plan: StateDictPlan) -> int:
    return sum(key in spec.params and spec.params[key].spec == expr.spec for key, expr in plan.items())


@given(cases())
def test_an_alignment_is_a_bijection_that_keeps_order_and_values(case) -> None:
    """values(aligned(s)(p)) = values(p), in order: nothing is lost, nothing doubled."""
    spec, plan = case
    done = try_aligned(spec, plan)
    assume(done is not None)
    assert list(done.values()) == list(plan.values())


@given(cases())
def test_no_two_tensors_are_exchanged(case) -> None:
    """Where aligned(s)(p) has the same set of keys as p, it is p."""
    spec, plan = case
    done = try_aligned(spec, plan)
    assume(done is not None)
    if done.keys() == plan.keys():
        assert done is plan


@given(cases())
def test_every_key_moves_by_the_same_rule(case) -> None:
    """The renaming is the alignment's: strip from the keys that have it, add to all but the kept; none per key."""
    spec, plan = case
    done = try_aligned(spec, plan)
    assume(done is not None)
    found = alignment(spec, plan)
    for name, expr in done.items():
        bare = expr.key.removeprefix(found.strip + ".") if found.strip else expr.key
        kept = bare.split(".")[0] in found.kept or not found.add
        assert name == (bare if kept else f"{found.add}.{bare}")
    assert found.hits == hits(spec, done)
    assert found.keys == len(plan)


@given(cases())
def test_an_alignment_never_makes_it_worse_and_is_idempotent(case) -> None:
    """hits(aligned(p)) >= hits(p), > where a key moved and something did not fit; where all fits, nothing moves."""
    spec, plan = case
    done = try_aligned(spec, plan)
    assume(done is not None)
    assert hits(spec, done) >= max(min(1, len(plan)), hits(spec, plan))
    if hits(spec, plan) == len(plan):
        assert done is plan
    elif done is not plan:
        assert hits(spec, done) > hits(spec, plan)


@given(modules(), st.sampled_from(("a", "b", "wrapper", "a.b")))
def test_a_module_fits_its_own_state_dict_with_a_prefix_more_or_less(spec, prefix) -> None:
    """For the whole p of s: aligned(s)(p) = p, aligned(s)(x.p) = p, aligned(x.s)(p) = x.p, or it is refused."""
    whole = StateDictPlan({key: Live(key, leaf.spec) for key, leaf in spec.params.items()})
    assert aligned(spec)(whole) is whole
    longer = StateDictPlan({f"{prefix}.{key}": expr for key, expr in whole.items()})
    done = try_aligned(spec, longer)
    assert done is None or done == whole or hits(spec, longer) == len(longer)
    wrapped = ModuleSpec(name="Net", params={f"{prefix}.{key}": leaf for key, leaf in spec.params.items()})
    done = try_aligned(wrapped, whole)
    assert done is None or done == longer or hits(wrapped, whole) == len(whole)
