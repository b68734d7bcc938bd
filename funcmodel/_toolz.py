"""The few functions of toolz that funcmodel uses, with signatures: toolz ships no types. Nothing else imports toolz."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast, overload

import toolz

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")
F = TypeVar("F")
K = TypeVar("K")


@overload
def pipe(data: A, /) -> A: ...
@overload
def pipe(data: A, f: Callable[[A], B], /) -> B: ...
@overload
def pipe(data: A, f: Callable[[A], B], g: Callable[[B], C], /) -> C: ...
@overload
def pipe(data: A, f: Callable[[A], B], g: Callable[[B], C], h: Callable[[C], D], /) -> D: ...
@overload
def pipe(data: A, f: Callable[[A], B], g: Callable[[B], C], h: Callable[[C], D], i: Callable[[D], E], /) -> E: ...
@overload
def pipe(
    data: A, f: Callable[[A], B], g: Callable[[B], C], h: Callable[[C], D], i: Callable[[D], E], j: Callable[[E], F], /
) -> F: ...
@overload
def pipe(data: A, /, *functions: Callable[[A], A]) -> A: ...
def pipe(data: Any, /, *functions: Callable[[Any], Any]) -> Any:
    """`data` through `functions`, left to right.

    Example:
        >>> pipe(3, lambda x: x + 1, str)
        '4'
    """
    return toolz.pipe(data, *functions)


def compose_left(*functions: Callable[[A], A]) -> Callable[[A], A]:
    """The function that applies `functions` left to right; of none, the identity.

    Example:
        >>> compose_left(lambda x: x + 1, lambda x: x * 2)(3)
        8
    """
    return cast(Callable[[A], A], toolz.compose_left(*functions))


def groupby(key: Callable[[A], K], items: Iterable[A]) -> dict[K, list[A]]:
    """Items grouped by `key`, groups in the order of their first item."""
    return cast(dict[K, list[A]], toolz.groupby(key, items))


def valmap(function: Callable[[A], B], mapping: Mapping[K, A]) -> dict[K, B]:
    """`function` of every value."""
    return cast(dict[K, B], toolz.valmap(function, mapping))


def merge_with(function: Callable[[list[A]], B], *mappings: Mapping[K, A]) -> dict[K, B]:
    """Mappings merged, `function` of the list of each key's values."""
    return cast(dict[K, B], toolz.merge_with(function, *mappings))


def reduceby(key: Callable[[A], K], combine: Callable[[B, A], B], items: Iterable[A], initial: B) -> dict[K, B]:
    """A fold per group."""
    return cast(dict[K, B], toolz.reduceby(key, combine, items, initial))


def sliding_window(n: int, items: Iterable[A]) -> Iterator[tuple[A, ...]]:
    """Overlapping runs of `n` items."""
    return cast(Iterator[tuple[A, ...]], toolz.sliding_window(n, items))


def interleave(sequences: Iterable[Iterable[A]]) -> Iterator[A]:
    """One of each in turn, as long as they last.

    Example:
        >>> list(interleave(["ab", "c", "def"]))
        ['a', 'c', 'd', 'b', 'e', 'f']
    """
    return cast("Iterator[A]", toolz.interleave(sequences))
