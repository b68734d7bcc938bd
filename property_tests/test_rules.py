"""Laws of templates and rules: 9 to 14, and the way back of 42."""

import re
from collections.abc import Iterable

import torch
from attrs import evolve
from hypothesis import assume, given
from hypothesis import strategies as st

from funcmodel.core import build
from funcmodel.core.shapes import spec_of
from funcmodel.core.templates import Matcher, fill, literal, match, placeholders
from funcmodel.errors import RuleError
from funcmodel.plan.convert import convert, inverse, invert
from funcmodel.plan.restored import restored
from funcmodel.records.expressions import Expr, Live, Read
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.rules import Merge, Rename, Rule, Split, Stacked, Transpose, Unstacked
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.evaluate import materialize
from property_tests.strategies.keys import FEW, filled_templates, key_sets, keys, template_texts
from property_tests.strategies.rules import encounters, packs, rules, sources, views

Tensors = dict[str, torch.Tensor]
SPEC = TensorSpec((2,), "float32")


def pattern(text: str) -> re.Pattern[str]:
    """The same template for an engine that is not ours."""
    out = ""
    for token in re.findall(r"\{\{|\}\}|\{\*?\w+\}|[^{}]", text):
        if len(token) > 2:
            inner = "(?s:.*)" if token[1] == "*" else r"[^.]+"
            out += f"(?P<{token.strip('{*}')}>{inner})"
        else:
            out += re.escape(token[0])
    return re.compile(out)


def re_match(text: str, key: str) -> dict[str, str] | None:
    found = pattern(text).fullmatch(key)
    return None if found is None else found.groupdict()


@given(filled_templates())
def test_law_9_match_inverts_fill(both: tuple[str, dict[str, str]]) -> None:
    """match(t, fill(t, f)) = f"""
    text, fields = both
    assert match(text, fill(text, fields)) == fields


@given(st.data())
def test_law_9_fill_inverts_match(data: st.DataObject) -> None:
    """match(t, key) = f  =>  fill(t, f) = key, and a regular expression reads the key in the same way"""
    text, key = data.draw(template_texts(alphabet=FEW)), data.draw(keys(FEW))
    fields = match(text, key)
    assert fields == re_match(text, key)
    assert fields is None or fill(text, fields) == key


@given(keys(), keys())
def test_law_9_a_literal_matches_itself_alone(key: str, other: str) -> None:
    """match(literal(a), b) = {} iff a = b"""
    assert match(literal(key), key) == {}
    assert (match(literal(key), other) is None) == (key != other)


@given(st.lists(template_texts(alphabet=FEW), max_size=8), st.data())
def test_a_matcher_is_its_templates_one_by_one(texts: list[str], data: st.DataObject) -> None:
    """Matcher(ts)(key) = [(i, match(t, key)) for i, t in enumerate(ts) if it matches]"""
    key = data.draw(st.sampled_from([fill_somehow(data, text) for text in texts]) if texts else keys(FEW)) or "a"
    expected = [(at, fields) for at, text in enumerate(texts) if (fields := re_match(text, key)) is not None]
    assert list(Matcher(texts)(key)) == expected


def fill_somehow(data: st.DataObject, text: str) -> str:
    fields = {name: data.draw(keys(FEW, 3 if many else 1)) for name, many in placeholders(text).items()}
    return fill(text, fields)


@given(packs())
def test_law_10_the_inverse_leads_back(pack: tuple[StateDictPlan, tuple[Rule, ...]]) -> None:
    """convert(*inverse(r)) . convert(*r) = id on the domain, as equality of plans"""
    plan, pack_rules = pack
    there = convert(*pack_rules)(plan)
    assert convert(*inverse(*pack_rules))(there) == plan
    # The inverse has an inverse too: what it reads is in its own domain.
    assert convert(*inverse(*inverse(*pack_rules)))(plan) == there


@given(st.lists(rules(), max_size=4))
def test_law_11_invert_is_an_involution(some: list[Rule]) -> None:
    """invert . invert = id, inverse . inverse = id"""
    assert [invert(invert(rule)) for rule in some] == some
    assert inverse(*inverse(*some)) == tuple(some)


def matches(rule: Rule, key: str) -> list[dict[str, str]]:
    found = [fields for text in sources(rule) if (fields := re_match(text, key)) is not None]
    return [f for f in found if not isinstance(rule, Stacked) or re.fullmatch("[0-9]+", f["e"])]


@given(encounters(1))
def test_law_12_a_rule_touches_only_what_it_matches_and_keeps_order(
    both: tuple[tuple[Rule, ...], StateDictPlan],
) -> None:
    """untouched(convert(r)(p)) = untouched(p), in the same order and with the very same expressions"""
    (rule,), plan = both
    try:
        out = convert(rule)(plan)
    except RuleError:
        assume(False)
        raise
    left = [key for key in plan if not matches(rule, key)]
    assert [key for key in out if key in set(left)] == left
    assert all(out[key] is plan[key] for key in left)
    if isinstance(rule, Rename):
        assert [expr for _, expr in out.items()] == [expr for _, expr in plan.items()]


@given(packs())
def test_law_12_what_is_made_stands_where_its_first_source_stood(
    pack: tuple[StateDictPlan, tuple[Rule, ...]],
) -> None:
    """the first place, in p, of the sources of out[n] never falls with n, for one rule"""
    plan, pack_rules = pack
    for rule in pack_rules:
        place = {key: at for at, key in enumerate(plan)}
        out = convert(rule)(lived(plan))
        first = [min(place[leaf.key] for leaf in leaves([expr]) if isinstance(leaf, Live)) for expr in out.values()]
        assert first == sorted(first)
        plan = out


def lived(plan: StateDictPlan) -> StateDictPlan:
    return StateDictPlan({key: build.live(key, spec_of(expr)) for key, expr in plan.items()})


def outcome(transform: object, plan: StateDictPlan) -> list[tuple[str, Expr]] | None:
    try:
        return list(transform(plan).items())  # type: ignore[operator]
    except RuleError:
        return None


@given(encounters(), st.integers(0, 4))
def test_law_13_rules_compose(both: tuple[tuple[Rule, ...], StateDictPlan], cut: int) -> None:
    """convert(*a, *b) = convert(*b) . convert(*a), convert() = id; also in order, and in what is refused"""
    some, plan = both
    a, b = some[:cut], some[cut:]
    assert convert()(plan) == plan
    assert outcome(convert(*a, *b), plan) == outcome(lambda p: convert(*b)(convert(*a)(p)), plan)


@given(encounters())
def test_law_14_nothing_is_ever_lost(both: tuple[tuple[Rule, ...], StateDictPlan]) -> None:
    """convert(*r)(p) raises RuleError, or has every element of p exactly once"""
    some, plan = both
    try:
        out = convert(*some)(plan)
    except RuleError:
        return
    assert sum(spec_of(e).numel for e in out.values()) == sum(spec_of(e).numel for e in plan.values())
    assert leaves(out.values()) == leaves(plan.values())


def leaves(exprs: Iterable[Expr]) -> set[Expr]:
    found: set[Expr] = set()
    pending = list(exprs)
    while pending:
        expr = pending.pop()
        inside = [*getattr(expr, "parts", ()), *([expr.of] if hasattr(expr, "of") else [])]
        pending += inside
        if not inside:
            found.add(expr)
    return found


# -- rules on tensors, written down a second time --------------------------------------------------------------------


def by_hand(rule: Rule, held: Tensors) -> Tensors:
    """What one rule means, on tensors, by torch and regular expressions; ValueError where it must not apply."""
    found = [
        (text, key, f)
        for text in sources(rule)
        for key in held
        if (f := re_match(text, key)) in matches(rule, key) and f is not None
    ]
    if len({key for _, key, _ in found}) < len(found):
        raise ValueError("two readings")
    made: list[tuple[str, torch.Tensor]] = []
    if isinstance(rule, Merge | Stacked):
        groups: dict[tuple[tuple[str, str], ...], dict[str, torch.Tensor]] = {}
        for text, key, f in found:
            part = f.pop("e") if isinstance(rule, Stacked) else text
            groups.setdefault(tuple(sorted(f.items())), {})[part] = held[key]
        for shared, parts in groups.items():
            made.append((fill(rule.target, dict(shared)), together(rule, parts)))
    for _, key, f in found:
        x = held[key]
        match rule:
            case Rename():
                made.append((fill(rule.target, f), x))
            case Transpose():
                made.append((key, x.permute(rule.dims)))
            case Unstacked():
                if len(x.unbind(rule.dim)) != (rule.count or x.shape[rule.dim]) or not x.shape[rule.dim]:
                    raise ValueError("count")
                made += [(fill(rule.target, {**f, "e": str(n)}), y) for n, y in enumerate(x.unbind(rule.dim))]
            case Split():
                sizes = rule.sizes or [x.shape[rule.dim] // len(rule.targets)] * len(rule.targets)
                if min(sizes) < 1:
                    raise ValueError("empty part")
                made += [(fill(t, f), y) for t, y in zip(rule.targets, x.split(list(sizes), rule.dim), strict=True)]
    out = {key: x for key, x in held.items() if key not in {key for _, key, _ in found}}
    if len({key for key, _ in made} | set(out)) < len(made) + len(out):
        raise ValueError("collision")
    return out | dict(made)


def together(rule: Merge | Stacked, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(rule, Stacked):
        if sorted(parts) != sorted(str(n) for n in range(rule.count or len(parts))):
            raise ValueError("gap")
        return torch.stack([parts[str(n)] for n in range(len(parts))], rule.dim)
    members = [parts[text] for text in rule.sources]
    lengths = [x.shape[rule.dim] for x in members]
    if lengths != list(rule.sizes or lengths[:1] * len(lengths)) or 0 in lengths:
        raise ValueError("sizes")
    return torch.cat(members, rule.dim)


@given(encounters())
def test_rules_mean_what_torch_says(both: tuple[tuple[Rule, ...], StateDictPlan]) -> None:
    """materialize(convert(*r)(p)) ~ r on the tensors, one after the other"""
    some, plan = both
    tensors = {key: torch.randn(spec_of(expr).shape) for key, expr in plan.items()}
    expected: Tensors | None = tensors
    try:
        for rule in some:
            expected = by_hand(rule, expected or {})
    except (ValueError, KeyError, IndexError, RuntimeError):
        expected = None
    try:
        out = convert(*some)(lived(plan))
    except RuleError:
        assert expected is None
        return
    assert expected is not None
    found = materialize(out, live=tensors)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# -- the way back ----------------------------------------------------------------------------------------------------


@given(packs())
def test_law_42_every_pack_has_a_way_back(pack: tuple[StateDictPlan, tuple[Rule, ...]]) -> None:
    """restored(p)(p) = scan, for p = convert(*r)(scan)"""
    scanned, pack_rules = pack
    mine = convert(*pack_rules)(scanned)
    assert restored(mine)(mine) == scanned


@given(views())
def test_law_42_whatever_covers_the_stored_tensors_once_has_a_way_back(
    both: tuple[StateDictPlan, StateDictPlan],
) -> None:
    """restored(p)(live) ~ scan, on tensors; and saving that under p's keys again gives what was live"""
    scanned, mine = both
    tensors = {
        key: torch.arange(spec_of(e).numel, dtype=torch.float32).reshape(spec_of(e).shape) for key, e in scanned.items()
    }
    held = materialize(StateDictPlan({key: with_live(expr) for key, expr in mine.items()}), live=tensors)
    found = materialize(restored(mine)(lived(mine)), live=held)
    assert found.keys() == scanned.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def with_live(expr: Expr) -> Expr:
    """The expression with a live tensor in the place of each stored one."""
    if isinstance(expr, Read):
        return build.live(expr.name, expr.spec)
    if hasattr(expr, "parts"):
        return evolve(expr, parts=tuple(map(with_live, expr.parts)))
    return evolve(expr, of=with_live(expr.of))


@given(key_sets(), st.data())
def test_renames_of_odd_keys_lead_back(odd: list[str], data: st.DataObject) -> None:
    """convert(Rename(b, a)) . convert(Rename(a, b)) = id, for literal keys of any text"""
    assume(odd)
    plan = StateDictPlan({key: build.live(key, SPEC) for key in odd})
    key, new = data.draw(st.sampled_from(odd)), data.draw(keys())
    assume(new not in odd)
    there = convert(Rename(literal(key), literal(new)))(plan)
    assert list(there) == [new if k == key else k for k in odd]
    assert convert(Rename(literal(new), literal(key)))(there) == plan
