"""The name index: dotted names as a tree, in linear time."""

from collections.abc import Iterator, Mapping

from funcmodel.core.names import ancestors, children, descendants, longest_prefix, name_index, parent

NAMES = ["model.embed.weight", "model.layers.0.w", "model.layers.1.w", "model.layers", "head.weight"]


def test_children_are_one_segment_longer_in_order_of_appearance() -> None:
    index = name_index(NAMES)
    assert children(index, "") == ("model", "head")
    assert children(index, "model") == ("model.embed", "model.layers")
    assert children(index, "model.layers") == ("model.layers.0", "model.layers.1")
    assert children(index, "model.layers.0.w") == ()
    assert children(index, "mod") == ()


def test_descendants_are_the_names_below_and_the_name_itself() -> None:
    index = name_index(NAMES)
    assert descendants(index, "model.layers") == ("model.layers", "model.layers.0.w", "model.layers.1.w")
    assert set(descendants(index, "")) == set(NAMES)
    assert descendants(index, "nothing") == ()


def test_a_name_given_twice_is_one_name() -> None:
    assert name_index(["a.b", "a", "a.b", "a"]) == name_index(["a.b", "a"])
    assert children(name_index(["a.b", "a", "a.b", "a"]), "") == ("a",)


def test_parents_and_ancestors() -> None:
    assert [parent(name) for name in ("a.b.c", "a", "")] == ["a.b", "", ""]
    assert list(ancestors("a.b")) == ["a.b", "a", ""]
    assert list(ancestors("")) == [""]


def test_the_most_specific_ancestor_wins_and_whole_segments_count() -> None:
    entries = {"": 0, "model": 1, "model.layers.1": 2}
    found = [longest_prefix(entries, name) for name in ("model.layers.1.w", "model.layers.10.w", "models.w", "model")]
    assert found == [2, 1, 0, 1]
    assert longest_prefix({"a": 1}, "b") is None
    assert longest_prefix({"a": 1}, "b", default=9) == 9


class Counted(Mapping[str, int]):
    """A mapping that counts how often it is asked."""

    def __init__(self, entries: dict[str, int]) -> None:
        self.entries, self.asked = entries, 0

    def __getitem__(self, key: str) -> int:
        self.asked += 1
        return self.entries[key]

    def __contains__(self, key: object) -> bool:
        self.asked += 1
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a look-up scans all entries")

    def __len__(self) -> int:
        return len(self.entries)


class CountedName(str):
    """A name that counts how often it, or a prefix made from it, is hashed or cut."""

    __slots__ = ()
    work = 0

    def __hash__(self) -> int:
        CountedName.work += 1
        return str.__hash__(self)

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True

    def rpartition(self, sep: str) -> tuple[str, str, str]:  # type: ignore[override]
        CountedName.work += 1
        head, dot, tail = str.rpartition(self, sep)
        return CountedName(head), dot, tail


def layers(count: int) -> list[str]:
    return [f"model.layers.{n}.{part}.weight" for n in range(count) for part in ("attn.q", "attn.k", "mlp.up")]


def work_of_an_index(count: int) -> int:
    names = [CountedName(name) for name in layers(count)]
    CountedName.work = 0
    name_index(names)
    return CountedName.work


def test_law_32_an_index_is_linear_work() -> None:
    small, large = work_of_an_index(200), work_of_an_index(400)
    assert 0 < small < large <= 2.1 * small


def test_law_32_a_lookup_costs_segments_and_not_entries() -> None:
    entries = Counted({f"model.layers.{n}": n for n in range(1000)})
    assert longest_prefix(entries, "model.layers.999.attn.q.weight") == 999
    assert entries.asked <= 7
