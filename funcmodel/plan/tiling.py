"""Tiling: the pieces of one tensor, put together where they cover each element exactly once."""

from collections.abc import Sequence
from math import prod
from typing import TypeAlias

from funcmodel.core import build
from funcmodel.core.lowering import leaves
from funcmodel.core.shapes import shape_of, spec_of
from funcmodel.errors import RuleError
from funcmodel.records.expressions import (
    At,
    Expr,
    Read,
    Reshape,
)

Span: TypeAlias = tuple[int, int]
# Where a value belongs in a tensor: the value lacks the axes that are ints, as with `Index`.
Piece: TypeAlias = tuple[At, Expr]


class Tiles:
    """A stored tensor, or a reshape of one, and what is known of it so far.

    Attributes:
        node: the tensor.
        pieces: parts of it, and the expressions that have their values.
        keys: the keys that each piece comes from.
        volume: elements of all pieces.
    """

    __slots__ = ("keys", "node", "pieces", "volume")

    def __init__(self, node: Read | Reshape) -> None:
        self.node = node
        self.pieces: list[Piece] = []
        self.keys: list[tuple[str, ...]] = []
        self.volume = 0

    def add(self, at: At, value: Expr, keys: tuple[str, ...]) -> None:
        """One more piece."""
        self.pieces.append((at, value))
        self.keys.append(keys)
        self.volume += volume(at)

    def refusal(self, why: str, more: tuple[str, ...] = ()) -> RuleError:
        """The error for pieces that do not make the tensor."""
        keys = tuple(dict.fromkeys(key for some in (*self.keys, more) for key in some))
        name = next((leaf.name for leaf in leaves(self.node) if isinstance(leaf, Read)), None)
        return RuleError(
            f"cannot restore {name!r} ({spec_of(self.node)}) from {', '.join(keys[:8])}: {why}; rename with rules and "
            f"`inverse`, or save under the new names",
            keys=keys,
            name=name,
        )


def whole(shape: tuple[int, ...]) -> At:
    """The box that is everything.

    Example:
        >>> whole((2, 3))
        ((0, 2), (0, 3))
    """
    return tuple([(0, length) for length in shape])


def volume(at: At) -> int:
    """Number of elements of a box.

    Example:
        >>> volume((1, (0, 3), (2, 4)))
        6
    """
    return prod([1 if isinstance(span, int) else span[1] - span[0] for span in at])


def axis_of(at: At, dim: int) -> int:
    """Which axis of a piece's value the axis `dim` of the tensor is.

    Example:
        >>> axis_of((1, (0, 3), (2, 4)), 2)
        1
    """
    return sum(isinstance(span, tuple) for span in at[:dim])


def put_together(tiles: Tiles) -> Expr:
    """The whole tensor from its pieces.

    Raises:
        RuleError: an element is in no piece, or in two.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> from funcmodel.records.expressions import FileRef
        >>> tiles = Tiles(Read(FileRef("a.safetensors", "safetensors", 64, ""), "w", TensorSpec([4, 2], "float32"), 32))
        >>> x = build.live("x", TensorSpec([3, 2], "float32"))
        >>> tiles.add(((0, 3), (0, 2)), x, ("x",))
        >>> tiles.add((3, (0, 2)), build.live("y", TensorSpec([2], "float32")), ("y",))
        >>> spec_of(put_together(tiles))
        [4, 2] float32
    """
    shape = shape_of(tiles.node)
    at, value = tiles.pieces[0]
    if len(tiles.pieces) == 1 and at == whole(shape):
        return value
    expected = prod(shape)
    if not expected:
        return build.reshape(value, shape)
    if tiles.volume != expected:
        why = "is in no key" if tiles.volume < expected else "is in more than one key"
        raise tiles.refusal(f"a part of it {why}")
    pieces = [piece for piece in tiles.pieces if volume(piece[0])]
    return _region([(0, length) for length in shape], pieces, tiles)


def _region(region: list[Span | None], pieces: list[Piece], tiles: Tiles) -> Expr:
    """The value of a box from the pieces within it. Axes that are None are not in the value."""
    for axis, span in enumerate(region):
        if span is not None and all(isinstance(at[axis], int) for at, _ in pieces) and span[1] - span[0] == 1:
            below = _region([*region[:axis], None, *region[axis + 1 :]], pieces, tiles)
            return build.stack([below], _position(region, axis))
    for axis, span in enumerate(region):
        if span is not None:
            slabs = _slabs(axis, span, pieces, tiles)
            if len(slabs) > 1:
                return _layered(region, axis, slabs, tiles)
    if len(pieces) == 1:
        return pieces[0][1]
    return _region(region, _cut_somewhere(region, pieces, tiles), tiles)


def _position(region: Sequence[Span | None], axis: int) -> int:
    return sum(span is not None for span in region[:axis])


def _span(at: At, axis: int) -> Span:
    here = at[axis]
    return (here, here + 1) if isinstance(here, int) else here


def _slabs(axis: int, span: Span, pieces: list[Piece], tiles: Tiles) -> list[tuple[Span, list[Piece]]]:
    """The pieces in as many layers along `axis` as can be had without cutting one."""
    slabs: list[tuple[Span, list[Piece]]] = []
    first, stop, layer = span[0], span[0], list[Piece]()
    for piece in sorted(pieces, key=lambda piece: _span(piece[0], axis)):
        start, end = _span(piece[0], axis)
        if start > stop:
            raise tiles.refusal("a part of it is in no key, and another in more than one")
        if start == stop and layer:
            slabs.append(((first, stop), layer))
            first, layer = start, []
        layer.append(piece)
        stop = max(stop, end)
    if stop != span[1]:
        raise tiles.refusal("a part of it is in no key, and another in more than one")
    return [*slabs, ((first, stop), layer)]


def _layered(region: list[Span | None], axis: int, slabs: list[tuple[Span, list[Piece]]], tiles: Tiles) -> Expr:
    """Layers joined: those that are single slices without this axis by a stack, the others by a concat."""
    position = _position(region, axis)
    parts: list[Expr] = []
    slices: list[Expr] = []
    for span, pieces in slabs:
        flat = span[1] - span[0] == 1 and all(isinstance(at[axis], int) for at, _ in pieces)
        value = _region([*region[:axis], None if flat else span, *region[axis + 1 :]], pieces, tiles)
        if flat:
            slices.append(value)
            continue
        if slices:
            parts.append(build.stack(slices, position))
            slices = []
        parts.append(value)
    if slices:
        parts.append(build.stack(slices, position))
    return build.concat(parts, position)


def _cut_somewhere(region: list[Span | None], pieces: list[Piece], tiles: Tiles) -> list[Piece]:
    """Pieces that interlock like a pinwheel, cut along one plane so that they fall into layers."""
    for axis, span in enumerate(region):
        if span is None:
            continue
        planes = [start for start, _ in (_span(at, axis) for at, _ in pieces) if start > span[0]]
        if not planes:
            continue
        plane, cut = min(planes), list[Piece]()
        for at, value in pieces:
            start, stop = _span(at, axis)
            if not start < plane < stop:
                cut.append((at, value))
                continue
            for low, high in ((start, plane), (plane, stop)):
                part = build.narrow(value, axis_of(at, axis), low - start, high - start)
                cut.append(((*at[:axis], (low, high), *at[axis + 1 :]), part))
        return cut
    raise tiles.refusal("a part of it is in no key, and another in more than one")
