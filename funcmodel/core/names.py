"""The name index: dotted names as a tree, built once in linear time, so that nothing scans all names per module."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from attrs import field, frozen

from funcmodel.records.mapping import FrozenMap

T = TypeVar("T")


@frozen(repr=False)
class NameIndex:
    """Dotted names and everything above them.

    Attributes:
        names: the names, once each, in the order given.
        below: prefix -> the names one segment longer, in the order in which they first appear; the root is "".
    """

    names: FrozenMap[str, None]
    below: FrozenMap[str, tuple[str, ...]] = field(eq=False)

    def __repr__(self) -> str:
        return f"<NameIndex: {len(self.names)} names>"


def name_index(names: Iterable[str]) -> NameIndex:
    """The index of `names`. Each distinct prefix is visited once, however many names share it.

    Example:
        >>> index = name_index(["model.embed.weight", "model.layers.0.w", "model.layers.1.w", "head.weight"])
        >>> children(index, ""), children(index, "model")
        (('model', 'head'), ('model.embed', 'model.layers'))
    """
    known: dict[str, None] = dict.fromkeys(names)
    below: dict[str, list[str]] = {"": []}
    for name in known:
        child = name
        # A prefix that is known has all of its own ancestors already, so the walk up stops there.
        while child:
            above = parent(child)
            siblings = below.get(above)
            if siblings is not None:
                siblings.append(child)
                break
            below[above] = [child]
            child = above
    return NameIndex(FrozenMap(known), FrozenMap({prefix: _distinct(found) for prefix, found in below.items()}))


def _distinct(found: list[str]) -> tuple[str, ...]:
    # A name that is listed and also a prefix of others is met twice.
    return tuple(dict.fromkeys(found))


def parent(name: str) -> str:
    """`name` without its last segment; "" for a name of one segment, and for "".

    Example:
        >>> parent("model.layers.0"), parent("model")
        ('model.layers', '')
    """
    return name.rpartition(".")[0]


def ancestors(name: str) -> Iterator[str]:
    """`name` itself and everything above it, most specific first, "" last.

    Example:
        >>> list(ancestors("model.layers.0"))
        ['model.layers.0', 'model.layers', 'model', '']
    """
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def children(index: NameIndex, prefix: str) -> tuple[str, ...]:
    """The names and prefixes one segment below `prefix`, in order; empty where nothing is below.

    Example:
        >>> children(name_index(["a.b.c", "a.d"]), "a")
        ('a.b', 'a.d')
    """
    return index.below.get(prefix, ())


def descendants(index: NameIndex, prefix: str) -> tuple[str, ...]:
    """The names of the index that are `prefix` or lie below it, as a walk from the top; its cost is what it gives.

    Example:
        >>> descendants(name_index(["a.b.c", "x", "a.d"]), "a")
        ('a.b.c', 'a.d')
    """
    found: list[str] = []
    pending = [prefix]
    while pending:
        name = pending.pop()
        if name in index.names:
            found.append(name)
        pending += reversed(index.below.get(name, ()))
    return tuple(found)


def longest_prefix(entries: Mapping[str, T], name: str, default: T | None = None) -> T | None:
    """The entry of the most specific ancestor of `name`, itself included; at most one look-up per segment.

    Args:
        entries: prefix -> anything; the entry "" holds for every name.
        name: a dotted name.
        default: what to give where no ancestor has an entry.

    Example:
        >>> longest_prefix({"": "cpu", "model.layers": "cuda:0"}, "model.layers.3.w")
        'cuda:0'
        >>> longest_prefix({"": "cpu", "model.layers": "cuda:0"}, "model.layers_norm.w")
        'cpu'
    """
    for prefix in ancestors(name):
        if prefix in entries:
            return entries[prefix]
    return default
