"""The six rules. A rule is data, has an inverse, and maps a set of keys to a set of keys.

Patterns are templates: `{i}` stands for one dotted segment, `{*rest}` for one or more.
"""

from collections.abc import Iterable
from typing import TypeAlias

from attrs import field, frozen


def _texts(value: Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _numbers(value: Iterable[int]) -> tuple[int, ...]:
    return tuple(value)


def _sizes(value: Iterable[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)


@frozen
class Rename:
    """`source` to `target`, for example `Rename("model.{*rest}", "{*rest}")`."""

    source: str
    target: str


@frozen
class Merge:
    """`sources`, joined along `dim`, become `target`.

    Attributes:
        sizes: length of each part along `dim`, in elements; None means that the parts are equally long.
    """

    sources: tuple[str, ...] = field(converter=_texts)
    target: str
    dim: int = 0
    sizes: tuple[int, ...] | None = field(default=None, converter=_sizes)


@frozen
class Split:
    """The inverse of `Merge`: `source`, cut along `dim`, becomes `targets`."""

    source: str
    targets: tuple[str, ...] = field(converter=_texts)
    dim: int = 0
    sizes: tuple[int, ...] | None = field(default=None, converter=_sizes)


@frozen
class Stacked:
    """Every `source`, for `over` = 0, 1, 2, ... without a gap, stacked along the new axis `dim`, becomes `target`.

    Attributes:
        count: how many there must be; None takes as many as there are.
    """

    source: str
    target: str
    over: str
    dim: int = 0
    count: int | None = None


@frozen
class Unstacked:
    """The inverse of `Stacked`: each slice of `source` along `dim` becomes `target` with its number for `over`."""

    source: str
    target: str
    over: str
    dim: int = 0
    count: int | None = None


@frozen
class Transpose:
    """The axes of every key that matches `template`, reordered: axis `i` of the result is axis `dims[i]`."""

    template: str
    dims: tuple[int, ...] = field(default=(1, 0), converter=_numbers)


Rule: TypeAlias = Rename | Merge | Split | Stacked | Unstacked | Transpose
