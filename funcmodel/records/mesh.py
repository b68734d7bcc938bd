"""`Mesh` and `Layout`: named axes of ranks, and shardings in the order in which they are applied."""

from collections.abc import Mapping
from math import prod
from typing import Any

from attrs import field, frozen

from funcmodel.records.mapping import FrozenMap


def _axes(value: Any) -> tuple[tuple[str, int], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    axes = tuple((str(name), int(size)) for name, size in pairs)
    if len({name for name, _ in axes}) != len(axes) or any(size < 1 for _, size in axes):
        raise ValueError(f"mesh axes need distinct names and sizes of at least 1: {axes}")
    return axes


@frozen
class Mesh:
    """Named axes of a grid of ranks.

    Attributes:
        axes: `(name, size)` pairs, slowest first; ranks run row-major over them.
        ranks: an explicit table, row-major, where rank numbers are permuted; None for 0, 1, 2, ...

    Example:
        >>> Mesh({"pp": 2, "tp": 4}).size
        8
    """

    axes: tuple[tuple[str, int], ...] = field(converter=_axes)
    ranks: tuple[int, ...] | None = field(default=None)

    @ranks.validator
    def _permutation(self, _: Any, value: tuple[int, ...] | None) -> None:
        if value is not None and sorted(value) != list(range(self.size)):
            raise ValueError(f"ranks must be a permutation of 0...{self.size - 1}, found {value}")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return prod(size for _, size in self.axes)


@frozen
class Shard:
    """A split of one axis, as `torch.chunk` cuts unless explicit `sizes` (elements, one per coordinate) are given."""

    dim: int
    sizes: tuple[int, ...] | None = None


@frozen(kw_only=True)
class Only:
    """Membership: the tensor exists at coordinate `index` of mesh axis `axis` alone (pipeline and expert axes)."""

    axis: str
    index: int


@frozen(kw_only=True)
class Flat:
    """ZeRO-3: the flattened tensor is split into equal chunks over mesh axis `axis`, the last one padded."""

    axis: str


@frozen(kw_only=True)
class Layout:
    """How one tensor lies on a mesh. Axes that are not named replicate it.

    Attributes:
        order: `(axis, Shard)` in the order in which the cuts are made: each cuts what the one before left. This is not
            the order of the mesh axes: FSDP over tensor parallel cuts `tp` first.
        only: memberships.
        flat: a flat split after all others, or None.
    """

    order: tuple[tuple[str, Shard], ...] = ()
    only: tuple[Only, ...] = ()
    flat: Flat | None = None


@frozen
class LayoutMap:
    """Templates to layouts; the first that matches a key is its layout, a key that none matches is replicated."""

    entries: FrozenMap[str, Layout] = field(converter=FrozenMap)
