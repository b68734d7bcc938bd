"""Templates: `{i}` is one segment, `{*rest}` one or more."""

import pytest

from funcmodel.core.templates import Matcher, fill, literal, match, placeholders, template
from funcmodel.errors import TemplateError


@pytest.mark.parametrize(
    ("text", "key", "fields"),
    [
        ("layers.{i}.weight", "layers.12.weight", {"i": "12"}),
        ("layers.{i}.weight", "layers.12.norm.weight", None),
        ("layers.{i}.weight", "layers.weight", None),
        ("layers.{i}.weight", "layers..weight", None),
        ("{*p}.weight", "layers.12.norm.weight", {"p": "layers.12.norm"}),
        ("{*p}.weight", "weight", None),
        ("model.{*rest}", "model", None),
        ("model.{*rest}", "model_2.w", None),
        ("{*key}", "anything.at.all", {"key": "anything.at.all"}),
        ("{*key}", "", {"key": ""}),
        ("a.{*mid}.b.{i}", "a.x.y.b.b.0", {"mid": "x.y.b", "i": "0"}),
        ("experts.w{n}", "experts.w13", {"n": "13"}),
        ("experts.w{n}", "experts.w", None),
        ("experts.w{n}.scale", "experts.v1.scale", None),
        ("block{a}_{{x}}", "block7_{x}", {"a": "7"}),
        ("lm_head.weight", "lm_head.weight", {}),
        ("lm_head.weight", "lm_headXweight", None),
        ("layers.*.weight", "layers.0.weight", None),
    ],
)
def test_a_key_matches_in_at_most_one_way(text: str, key: str, fields: dict[str, str] | None) -> None:
    found = match(text, key)
    assert found == fields
    if found is not None:
        assert fill(text, found) == key


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "}",
        "a.{i",
        "a.i}",
        "{}",
        "{*}",
        "{0}",
        "{a b}",
        "{i}.{i}",
        "{*a}.x.{*b}",
        "{i}{j}",
        "w{*rest}",
        "{*rest}w",
        "{i.j}",
    ],
)
def test_a_template_that_could_be_read_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(TemplateError) as caught:
        template(text)
    assert caught.value.template == text


@pytest.mark.parametrize(
    "fields", [{}, {"i": "0"}, {"i": "0", "rest": "w", "more": "x"}, {"i": "0.1", "rest": "w"}, {"i": "", "rest": "w"}]
)
def test_fill_needs_exactly_the_fields(fields: dict[str, str]) -> None:
    with pytest.raises(TemplateError):
        fill("layers.{i}.{*rest}", fields)


def test_a_literal_key_is_a_template_of_itself() -> None:
    assert match(literal("odd.{key}.}{"), "odd.{key}.}{") == {}
    assert placeholders(literal("odd.{key}")) == {}


def test_placeholders_tell_one_segment_from_many() -> None:
    assert placeholders("{*p}.{i}.w{n}") == {"p": True, "i": False, "n": False}


def test_a_matcher_finds_all_templates_in_their_order() -> None:
    find = Matcher(["{*key}", "h.{i}.w", "h.{*r}", "h.0.w", "h.{i}.w{n}", "{*p}.w", "{*p}.{i}.w", "g.{i}.w"])
    assert find("h.0.w") == (
        (0, {"key": "h.0.w"}),
        (1, {"i": "0"}),
        (2, {"r": "0.w"}),
        (3, {}),
        (5, {"p": "h.0"}),
        (6, {"p": "h", "i": "0"}),
    )
    assert find.values("h.0.w1") == [(0, ("h.0.w1",)), (2, ("0.w1",)), (4, ("0", "1"))]
    assert (find.first("g.0.w"), find.first("x")) == (0, 0)
    assert Matcher(["a", "h.{*r}.w", "{*p}.h.w"]).values("h.w") == []
    assert Matcher(["a"]).first("b") is None
    assert Matcher([])("a") == ()


class CountedSegments(str):
    """Text whose parts count how often they are looked up."""

    __slots__ = ()
    hashed = 0

    def __hash__(self) -> int:
        CountedSegments.hashed += 1
        return str.__hash__(self)

    def split(self, *args: str) -> list["CountedSegments"]:  # type: ignore[override]
        return [CountedSegments(part) for part in str.split(self, *args)]


@pytest.mark.parametrize("rules", [1, 100, 1000])
def test_matching_costs_segments_and_not_templates(rules: int) -> None:
    find = Matcher(f"model.layers.{{i}}.part{n}.w" for n in range(rules))
    CountedSegments.hashed = 0
    assert find.values(CountedSegments("model.layers.3.part0.w")) == [(0, ("3",))]
    assert CountedSegments.hashed <= 10
