"""`FrozenMap`: the one mapping that records hold."""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, overload

K = TypeVar("K")
V = TypeVar("V", covariant=True)
W = TypeVar("W")


class FrozenMap(Mapping[K, V]):
    """An immutable, hashable mapping.

    It iterates in insertion order and, like every `Mapping`, compares and hashes without order. The dict it is made
    from is copied once; nothing hands the copy out. It is no subclass of dict, so `dict.__setitem__` cannot reach it.

    Example:
        >>> m = FrozenMap({"b": 1, "a": 2})
        >>> list(m), m["a"], m == FrozenMap([("a", 2), ("b", 1)])
        (['b', 'a'], 2, True)
        >>> hash(m) == hash(FrozenMap(a=2, b=1))
        True
    """

    __slots__ = ("_data", "_hash")
    _data: Mapping[K, V]
    _hash: int | None

    @overload
    def __init__(self, entries: Mapping[K, V] | Iterable[tuple[K, V]] = ..., /) -> None: ...
    @overload
    def __init__(self: "FrozenMap[str, W]", entries: Mapping[str, W] = ..., /, **named: W) -> None: ...
    def __init__(self, entries: Any = (), /, **named: Any) -> None:
        same = type(entries) is FrozenMap and not named  # nobody can change what that one holds
        object.__setattr__(self, "_data", entries._data if same else MappingProxyType(dict(entries, **named)))
        object.__setattr__(self, "_hash", None)

    def __getitem__(self, key: K) -> V:
        return self._data[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __contains__(self, key: object) -> bool:
        return key in self._data

    # The mixins of Mapping make a Python call per entry; these delegate to the dict's own views.
    def keys(self) -> Any:
        """The keys, in order."""
        return self._data.keys()

    def values(self) -> Any:
        """The values, in order."""
        return self._data.values()

    def items(self) -> Any:
        """Pairs of key and value, in order."""
        return self._data.items()

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, FrozenMap):
            return self._data == other._data
        return dict(self._data) == other if isinstance(other, Mapping) else NotImplemented

    def __hash__(self) -> int:
        if self._hash is None:
            object.__setattr__(self, "_hash", hash(frozenset(self._data.items())))
        assert self._hash is not None
        return self._hash

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"FrozenMap is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"FrozenMap is immutable; cannot delete {name!r}")

    def __reduce__(self) -> tuple[type["FrozenMap[K, V]"], tuple[dict[K, V]]]:
        return FrozenMap, (dict(self._data),)

    def __copy__(self) -> "FrozenMap[K, V]":
        return self

    def __repr__(self) -> str:
        return f"FrozenMap({dict(self._data)!r})"
