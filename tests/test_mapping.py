import copy
import pickle

import pytest

from funcmodel.records.mapping import FrozenMap


def test_it_iterates_in_order_and_compares_without() -> None:
    a, b = FrozenMap({"x": 1, "y": 2}), FrozenMap({"y": 2, "x": 1})
    assert list(a) == ["x", "y"]
    assert list(b) == ["y", "x"]
    assert a == b == {"x": 1, "y": 2}
    assert hash(a) == hash(b)
    assert a != FrozenMap({"x": 1})


def test_it_copies_what_it_is_made_from() -> None:
    source = {"x": 1}
    frozen = FrozenMap(source)
    source["x"] = 2
    assert frozen["x"] == 1


@pytest.mark.parametrize(
    "attempt",
    [
        lambda m: m.__setitem__("x", 2),
        lambda m: dict.__setitem__(m, "x", 2),
        lambda m: setattr(m, "_data", {}),
        lambda m: m._data.__setitem__("x", 2),
        lambda m: delattr(m, "_data"),
        lambda m: m.update(x=2),
    ],
)
def test_nothing_changes_it(attempt: object) -> None:
    frozen = FrozenMap({"x": 1})
    with pytest.raises((TypeError, AttributeError)):
        attempt(frozen)  # type: ignore[operator]
    assert frozen == {"x": 1}


def test_it_pickles_and_copies() -> None:
    frozen = FrozenMap({"x": (1, 2)})
    assert pickle.loads(pickle.dumps(frozen)) == frozen
    assert copy.copy(frozen) is frozen
    assert copy.deepcopy(frozen) == frozen


def test_an_unhashable_value_shows_when_it_is_hashed() -> None:
    with pytest.raises(TypeError):
        hash(FrozenMap({"x": [1]}))
