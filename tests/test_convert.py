"""Rules: what each does to keys and expressions, and what it refuses."""

import pickle

import pytest

from funcmodel.core import build
from funcmodel.core.shapes import spec_of
from funcmodel.errors import RuleError, TemplateError
from funcmodel.plan.convert import convert, inverse, invert, unmatched
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.rules import Merge, Rename, Rule, Split, Stacked, Transpose, Unstacked
from funcmodel.records.tensors import TensorSpec
from property_tests.strategies.rules import stored


def there_and_back(plan: StateDictPlan, *rules: Rule) -> StateDictPlan:
    there = convert(*rules)(plan)
    assert convert(*inverse(*rules))(there) == plan
    return there


def test_rename_moves_placeholders_and_keeps_order() -> None:
    plan = stored({"model.layers.0.w": (2,), "lm_head": (2,), "model.layers.1.w": (2,)})
    out = there_and_back(plan, Rename("model.{*p}.{i}.w", "h{i}.{*p}.weight"))
    assert list(out) == ["h0.layers.weight", "lm_head", "h1.layers.weight"]
    assert out["h1.layers.weight"] is plan["model.layers.1.w"]


def test_two_keys_may_trade_names() -> None:
    plan = stored({"gate.a.w": (2,), "gate.b.w": (3,)})
    assert convert(Rename("{x}.{y}.w", "{y}.{x}.w"))(plan).keys() == {"a.gate.w", "b.gate.w"}
    swapped = there_and_back(stored({"a.b": (2,), "b.a": (3,)}), Rename("{x}.{y}", "{y}.{x}"))
    assert [spec_of(swapped[key]).shape for key in ("a.b", "b.a")] == [(3,), (2,)]


def test_rules_act_one_after_the_other() -> None:
    plan = stored({"a": (2,)})
    assert list(convert(Rename("a", "b"), Rename("b", "c"), Rename("a", "never"))(plan)) == ["c"]
    assert list(convert(Rename("b", "c"), Rename("a", "b"))(plan)) == ["b"]


def test_merge_is_a_concat_of_all_sources_per_layer() -> None:
    plan = stored({f"{i}.{n}": (s, 8) for i in (0, 1) for n, s in (("q", 4), ("k", 2), ("v", 2))} | {"norm": (8,)})
    rule = Merge(("{i}.q", "{i}.k", "{i}.v"), "{i}.qkv", sizes=[4, 2, 2])
    out = there_and_back(plan, rule)
    assert list(out) == ["0.qkv", "1.qkv", "norm"]
    assert out["1.qkv"] == build.concat([plan["1.q"], plan["1.k"], plan["1.v"]])


def test_a_merged_key_takes_the_place_of_the_first_of_its_sources() -> None:
    plan = stored(dict.fromkeys(("x", "0.k", "y", "0.q", "z"), (2, 2)))
    assert list(there_and_back(plan, Merge(("{i}.q", "{i}.k"), "{i}.qk", dim=-1))) == ["x", "0.qk", "y", "z"]


def test_split_puts_its_targets_where_the_source_was() -> None:
    plan = stored({"a": (2,), "qkv": (6, 4), "z": (2,)})
    out = there_and_back(plan, Split("qkv", ("q", "k", "v")))
    assert list(out) == ["a", "q", "k", "v", "z"]
    assert out["k"] == build.narrow(plan["qkv"], 0, 2, 4)


def test_experts_are_stacked_by_number_not_by_order() -> None:
    plan = stored(
        {f"l.0.experts.{e}.w": (2, 3) for e in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)} | {"l.0.experts.shared.w": (2, 3)}
    )
    out = there_and_back(plan, Stacked("l.{i}.experts.{e}.w", "l.{i}.experts.w", over="e", count=11))
    assert list(out) == ["l.0.experts.w", "l.0.experts.shared.w"]
    assert out["l.0.experts.w"] == build.stack([plan[f"l.0.experts.{e}.w"] for e in range(11)])


def test_unstacked_and_stacked_along_the_last_axis() -> None:
    plan = stored({"w": (2, 3, 4)})
    out = there_and_back(plan, Unstacked("w", "e{n}.w", over="n", dim=-1))
    assert [spec_of(expr).shape for expr in out.values()] == [(2, 3)] * 4


def test_transpose_needs_the_axes_it_orders() -> None:
    plan = stored({"w": (2, 3, 4), "b": (2,)})
    out = there_and_back(plan, Transpose("w", [1, 2, 0]))
    assert spec_of(out["w"]).shape == (3, 4, 2)
    with pytest.raises(RuleError) as caught:
        convert(Transpose("{*key}"))(plan)
    assert caught.value.keys == ("w",)


def test_fused_then_split_otherwise_reads_the_stored_parts() -> None:
    plan = stored({"q": (4, 2), "k": (2, 2)})
    out = convert(Merge(("q", "k"), "qk", sizes=(4, 2)), Split("qk", ("a", "b")))(plan)
    assert out["a"] == build.narrow(plan["q"], 0, 0, 3)
    assert out["b"] == build.concat([build.narrow(plan["q"], 0, 3, 4), plan["k"]])


def test_only_complete_groups_are_touched_and_layers_without_any_source_are_fine() -> None:
    plan = stored({"0.q": (2,), "0.k": (2,), "1.other": (2,)})
    assert list(there_and_back(plan, Merge(("{i}.q", "{i}.k"), "{i}.qk"))) == ["0.qk", "1.other"]


@pytest.mark.parametrize(
    ("shapes", "rule", "field", "value"),
    [
        ({"0.q": (2,), "0.k": (2,), "1.q": (2,)}, Merge(("{i}.q", "{i}.k"), "{i}.qk"), "missing", ("1.k",)),
        ({"e.0": (2,), "e.2": (2,)}, Stacked("e.{n}", "e", over="n"), "missing", ("e.1",)),
        ({"e.1": (2,), "e.2": (2,)}, Stacked("e.{n}", "e", over="n"), "missing", ("e.0",)),
        ({"e.0": (2,)}, Stacked("e.{n}", "e", over="n", count=3), "missing", ("e.1", "e.2")),
        ({"e.0": (2,), "e.1": (2,)}, Stacked("e.{n}", "e", over="n", count=1), "keys", ("e.0", "e.1")),
        ({"e.0": (2,), "e.01": (2,)}, Stacked("e.{n}", "e", over="n"), "keys", ("e.01",)),
        ({"e.0": (2,), "e." + "9" * 5000: (2,)}, Stacked("e.{n}", "e", over="n"), "missing", ("e.1",)),
        ({"e.0": (2,), "e.1": (3,)}, Stacked("e.{n}", "e", over="n"), "keys", ("e.0", "e.1")),
        ({"a.w": (2,), "b.w": (2,), "c": (1,)}, Rename("{x}.w", "c"), None, None),
        ({"a.w": (2,), "c.w": (2,)}, Rename("a.w", "c.w"), "keys", ("a.w", "c.w")),
        ({"q": (2,), "k": (2,), "qk": (2,)}, Merge(("q", "k"), "qk"), "target", "qk"),
        ({"w": (4,), "a": (2,)}, Split("w", ("a", "b")), "target", "a"),
        ({"w": (2,), "e.1": (2,)}, Unstacked("w", "e.{n}", over="n"), "target", "e.1"),
        ({"q": (2,), "k": (3,)}, Merge(("q", "k"), "qk"), "found", (2, 3)),
        ({"q": (2,), "k": (2,)}, Merge(("q", "k"), "qk", sizes=(2, 3)), "expected", (2, 3)),
        ({"q": (2, 3), "k": (2, 4)}, Merge(("q", "k"), "qk"), "keys", ("q", "k")),
        ({"q": (2, 3), "k": (2,)}, Merge(("q", "k"), "qk", dim=1, sizes=(3, 3)), "keys", ("k",)),
        ({"q": (0, 3), "k": (0, 3)}, Merge(("q", "k"), "qk"), "keys", ("q",)),
        ({"w": (0, 4)}, Split("w", ("a", "b"), dim=1), "keys", ("w",)),
        ({"e.0": (0,), "e.1": (0,)}, Stacked("e.{n}", "e", over="n"), "keys", ("e.0", "e.1")),
        ({"q": (), "k": ()}, Merge(("q", "k"), "qk"), "keys", ("q",)),
        ({"w": (5,)}, Split("w", ("a", "b")), "found", 5),
        ({"w": (5,)}, Split("w", ("a", "b"), sizes=(2, 2)), "found", 5),
        ({"w": (1,)}, Split("w", ("a", "b")), "keys", ("w",)),
        ({"w": (0, 2)}, Unstacked("w", "e.{n}", over="n"), "keys", ("w",)),
        ({"w": (3, 2)}, Unstacked("w", "e.{n}", over="n", count=2), "found", 3),
        ({"w": ()}, Unstacked("w", "e.{n}", over="n"), "keys", ("w",)),
        ({"a.a": (2,)}, Merge(("a.{i}", "{i}.a"), "x.{i}"), "keys", ("a.a",)),
        ({"a.x.b": (2,), "a.a.b": (2,)}, Merge(("{i}.x.b", "a.{i}.b"), "c.{i}"), "keys", ("a.x.b",)),
    ],
)
def test_a_rule_that_does_not_fit_raises(
    shapes: dict[str, tuple[int, ...]], rule: Rule, field: str | None, value: object
) -> None:
    with pytest.raises(RuleError) as caught:
        convert(rule)(stored(shapes))
    assert caught.value.rule == rule
    if field is not None:
        assert getattr(caught.value, field) == value
    assert pickle.loads(pickle.dumps(caught.value)).rule == rule


@pytest.mark.parametrize("rule", [Merge(("e.0", "e.1"), "e"), Stacked("e.{n}", "e", over="n")])
def test_parts_of_different_dtypes_do_not_go_together(rule: Rule) -> None:
    one, other = (build.live("x", TensorSpec([2], dtype)) for dtype in ("float32", "bfloat16"))
    with pytest.raises(RuleError) as caught:
        convert(rule)(StateDictPlan({"e.0": one, "e.1": other}))
    assert caught.value.keys == ("e.0", "e.1")


@pytest.mark.parametrize(
    "rule",
    [
        Rename("a.{i}", "a"),
        Rename("a", "a.{i}"),
        Rename("a.{i}", "a.{j}"),
        Rename("a.{*i}", "a.{i}"),
        Merge(("{i}.q", "k"), "{i}.qk"),
        Merge(("q", "q"), "qk"),
        Merge((), "qk"),
        Merge(("q", "k"), "qk", sizes=(1,)),
        Merge(("q", "k"), "qk", sizes=(1, 0)),
        Split("w", ("a", "a")),
        Split("w", ("a", "b"), sizes=(-1, 2)),
        Stacked("e.{n}", "e.{n}", over="n"),
        Stacked("e", "f", over="n"),
        Stacked("e.{*n}", "e", over="n"),
        Stacked("{i}.e.{n}", "e", over="n"),
        Stacked("e.{n}", "e", over="n", count=0),
        Unstacked("e.{n}", "e.{n}", over="n"),
        Unstacked("e", "f", over="n"),
        Transpose("w", (0, 0)),
        Transpose("w", (1, 2)),
        Transpose("w", (-1, 0)),
        "not a rule",
    ],
)
def test_a_rule_without_an_inverse_is_refused_before_any_plan(rule: Rule) -> None:
    with pytest.raises(RuleError) as caught:
        convert(Rename("x", "y"), rule)
    assert caught.value.rule == rule


def test_a_text_that_is_no_template_is_refused() -> None:
    with pytest.raises(TemplateError):
        convert(Rename("{i", "x"))


@pytest.mark.parametrize(
    ("rule", "inverted"),
    [
        (Rename("a.{i}", "b.{i}"), Rename("b.{i}", "a.{i}")),
        (Merge(("q", "k"), "qk", 1, (2, 4)), Split("qk", ("q", "k"), 1, (2, 4))),
        (Stacked("e.{n}", "e", "n", -1, 8), Unstacked("e", "e.{n}", "n", -1, 8)),
        (Transpose("w", (2, 0, 1)), Transpose("w", (1, 2, 0))),
    ],
)
def test_each_rule_has_an_inverse(rule: Rule, inverted: Rule) -> None:
    assert invert(rule) == inverted
    assert invert(inverted) == rule


def test_rules_that_match_nothing_can_be_named() -> None:
    plan = stored({"a": (2,), "e.shared": (2,)})
    rules = (Rename("b", "c"), Rename("a", "b"), Rename("b", "d"), Stacked("e.{n}", "e", over="n"))
    assert unmatched(rules, plan) == (rules[0], rules[3])
    assert list(convert(*rules)(plan)) == ["d", "e.shared"]


def test_no_rules_and_no_matches_are_the_identity() -> None:
    plan = stored({"a": (2,), "b": (2,)})
    assert convert()(plan) is plan
    assert list(convert(Rename("x", "y"))(plan).items()) == list(plan.items())


class CountedKey(str):
    """A key that counts how often it is taken apart."""

    __slots__ = ()
    taken_apart = 0

    def split(self, *args: str) -> list[str]:  # type: ignore[override]
        CountedKey.taken_apart += 1
        return str.split(self, *args)


@pytest.mark.parametrize("count", [1, 200])
def test_a_key_is_matched_once_however_many_rules_there_are(count: int) -> None:
    plan = StateDictPlan({CountedKey(key): expr for key, expr in stored({f"h.{n}.w": (2,) for n in range(9)}).items()})
    rules = [Rename(f"other{n}.{{i}}.w", f"new{n}.{{i}}.w") for n in range(count)]
    CountedKey.taken_apart = 0
    assert list(convert(*rules, Rename("h.{i}.w", "g.{i}.w"))(plan)) == [f"g.{n}.w" for n in range(9)]
    assert CountedKey.taken_apart == 9
