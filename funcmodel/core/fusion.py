"""The other direction of slicing: neighbors that were cut from one expression become that expression again.

Everything here takes expressions in normal form and builds nodes directly, since what it builds is normal by
construction. `core.normal` cuts, this puts together; both preserve the normal form that `core.build` describes.
"""

from collections.abc import Sequence

from funcmodel.core.shapes import shape_of
from funcmodel.records.expressions import (
    At,
    Cast,
    Concat,
    Expr,
    Full,
    Index,
    Permute,
    Reshape,
    Stack,
    Take,
)
from funcmodel.records.tensors import TensorSpec


def join(a: Expr, b: Expr, dim: int) -> Expr | None:
    """`a` and `b` side by side along `dim` as *one* piece, or None where they were not cut from one.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> x = Live("x", TensorSpec([4, 3], "float32"))
        >>> join(Index(x, ((0, 1), (0, 3))), Index(x, ((1, 4), (0, 3))), 0) is x
        True
    """
    kind = a.__class__
    if kind is not b.__class__ or kind is Concat:
        if isinstance(a, Take) or isinstance(b, Take):
            return _join_rows(a, b, dim)
        if isinstance(a, Concat) or isinstance(b, Concat):
            return _join_concats(a, b, dim)
        return None
    joined: Expr | None = None
    match a, b:
        case Index(), Index():
            joined = _join_slices(a, b, dim)
        case Cast(), Cast():
            if a.dtype is b.dtype and (inner := join(a.of, b.of, dim)) is not None:
                joined = Cast(inner, a.dtype)
        case Permute(), Permute():
            if a.dims == b.dims and (inner := join(a.of, b.of, a.dims[dim])) is not None:
                joined = Permute(inner, a.dims)
        case Full(), Full():
            if same_value(a, b):
                shape, more = a.spec.shape, b.spec.shape[dim]
                joined = Full(TensorSpec((*shape[:dim], shape[dim] + more, *shape[dim + 1 :]), a.spec.dtype), a.value)
        case Take(), Take():
            if a.dim == b.dim != dim and a.indices == b.indices and (inner := join(a.of, b.of, dim)) is not None:
                return Take(inner, a.dim, a.indices)
            joined = _join_rows(a, b, dim)
        case Stack(), Stack():
            joined = _join_stacks(a, b, dim)
        case Reshape(), Reshape():
            joined = _join_reshapes(a, b, dim)
    return joined


def same_value(a: Full, b: Full) -> bool:
    """Whether two constants are the same bits: -0.0 is not 0.0, a NaN is a NaN.

    Example:
        >>> s = TensorSpec([], "float32")
        >>> same_value(Full(s, 0.0), Full(s, -0.0)), same_value(Full(s, float("nan")), Full(s, float("nan")))
        (False, True)
    """
    return repr(a.value) == repr(b.value)


def _join_slices(a: Index, b: Index, dim: int) -> Expr | None:
    at: list[int | tuple[int, int]] = []
    kept = -1
    for p, q in zip(a.at, b.at, strict=False):
        if p.__class__ is tuple:
            kept += 1
            if kept == dim:
                if q.__class__ is not tuple or p[1] != q[0]:
                    return None
                at.append((p[0], q[1]))
                continue
        if p != q:
            return None
        at.append(p)
    if a.of is not b.of and a.of != b.of:
        return None
    return _slice(a.of, tuple(at))


def _slice(of: Expr, at: At) -> Expr:
    shape = shape_of(of)
    for a, n in zip(at, shape, strict=True):
        if a != (0, n):
            return Index(of, at)
    return of


def _join_concats(a: Expr, b: Expr, dim: int) -> Expr | None:
    if (isinstance(a, Concat) and a.dim == dim) or (isinstance(b, Concat) and b.dim == dim):
        left = a.parts if isinstance(a, Concat) and a.dim == dim else (a,)
        right = b.parts if isinstance(b, Concat) and b.dim == dim else (b,)
        middle = join(left[-1], right[0], dim)
        if middle is None:
            return None
        parts = (*left[:-1], middle, *right[1:])
        return Concat(parts, dim) if len(parts) > 1 else middle
    if not isinstance(a, Concat) or not isinstance(b, Concat) or a.dim != b.dim or not _aligned((a, b)):
        return None
    columns = _join_all(a.parts, b.parts, dim)
    return Concat(columns, a.dim) if columns else None


def _join_stacks(a: Stack, b: Stack, dim: int) -> Expr | None:
    if a.dim != b.dim:
        return None
    if a.dim == dim:
        return Stack(a.parts + b.parts, dim)
    columns = _join_all(a.parts, b.parts, dim - (dim > a.dim))
    return Stack(columns, a.dim) if columns else None


def _join_all(left: Sequence[Expr], right: Sequence[Expr], dim: int) -> tuple[Expr, ...] | None:
    if len(left) != len(right):
        return None
    columns = []
    for p, q in zip(left, right, strict=True):
        column = join(p, q, dim)
        if column is None:
            return None
        columns.append(column)
    return tuple(columns)


def _aligned(parts: Sequence[Concat]) -> bool:
    """Whether concatenations along one axis are cut at the same places."""
    dim = parts[0].dim
    lengths = [shape_of(p)[dim] for p in parts[0].parts]
    return all([shape_of(p)[dim] for p in other.parts] == lengths for other in parts[1:])


def _join_reshapes(a: Reshape, b: Reshape, dim: int) -> Expr | None:
    below_a, below_b = shape_of(a.of), shape_of(b.of)
    if a.shape[:dim] != b.shape[:dim] or a.shape[dim + 1 :] != b.shape[dim + 1 :]:
        return None
    joined = None
    # From here on nothing was reshaped: the axis is one of `of`'s own.
    inner = len(below_a) - len(a.shape) + dim
    if inner >= 0 and below_a[inner:] == a.shape[dim:] and below_b[inner:] == b.shape[dim:]:
        joined = join(a.of, b.of, inner) if below_a[:inner] == below_b[:inner] else None
    # Up to here nothing was reshaped: what follows is appended in row-major order.
    if joined is None and len(below_a) > dim and below_a[:dim] == a.shape[:dim] == below_b[:dim]:
        joined = join(a.of, b.of, dim) if below_a[dim + 1 :] == below_b[dim + 1 :] else None
    if joined is None:
        return None
    return Reshape(joined, (*a.shape[:dim], a.shape[dim] + b.shape[dim], *a.shape[dim + 1 :]))


# -- rows picked by `Take` ------------------------------------------------------------------------------------------


def picks_of(chain: Expr) -> tuple[Expr, dict[int, tuple[int, ...]]]:
    """What the `Take`s on top of `chain` pick from, and the indices per axis.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> x = Live("x", TensorSpec([4, 3], "float32"))
        >>> picks_of(Take(x, 1, (0, 2)))[1]
        {1: (0, 2)}
    """
    picks: dict[int, tuple[int, ...]] = {}
    while isinstance(chain, Take):
        picks[chain.dim] = chain.indices
        chain = chain.of
    return chain, picks


def with_picks(base: Expr, picks: dict[int, tuple[int, ...]]) -> Expr:
    """`Take`s over `base`, the lowest axis innermost.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> x = Live("x", TensorSpec([4, 3], "float32"))
        >>> with_picks(x, {1: (0, 2), 0: (3, 1)}).dim
        1
    """
    for dim in sorted(picks):
        base = Take(base, dim, picks[dim])
    return base


def widened(base: Expr, dim: int) -> tuple[Expr, int, int]:
    """`base` without the slice along its axis `dim`, and where that slice starts and stops.

    A slice of a `Reshape` is part of what is reshaped already, so it stays.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> x = Live("x", TensorSpec([4, 3], "float32"))
        >>> widened(Index(x, ((1, 3), (0, 2))), 0)[0] == Index(x, ((0, 4), (0, 2)))
        True
    """
    if not isinstance(base, Index) or isinstance(base.of, Reshape):
        return base, 0, shape_of(base)[dim]
    kept = -1
    for axis, a in enumerate(base.at):
        if isinstance(a, tuple):
            kept += 1
            if kept == dim:
                whole = (0, shape_of(base.of)[axis])
                return _slice(base.of, (*base.at[:axis], whole, *base.at[axis + 1 :])), *a
    raise AssertionError("an axis that the slice does not have")


def _join_rows(a: Expr, b: Expr, dim: int) -> Expr | None:
    """Picked rows and picked rows, or a slice no longer than the picked rows beside it."""
    base_a, picks_a = picks_of(a)
    base_b, picks_b = picks_of(b)
    rows_a, rows_b = picks_a.pop(dim, None), picks_b.pop(dim, None)
    if picks_a != picks_b or (rows_a is None and rows_b is None):
        return None
    if rows_a is None:
        base_a, start, stop = widened(base_a, dim)
        rows_a = tuple(range(start, stop))
        fits = len(rows_a) <= len(rows_b or ())
    elif rows_b is None:
        base_b, start, stop = widened(base_b, dim)
        rows_b = tuple(range(start, stop))
        fits = len(rows_b) <= len(rows_a)
    else:
        fits = True
    if not fits or rows_b is None or base_a != base_b:
        return None
    return with_picks(base_a, {**picks_a, dim: rows_a + rows_b})


# -- a new axis -----------------------------------------------------------------------------------------------------


def restack(parts: Sequence[Expr], dim: int) -> Expr | None:
    """`parts` along the new axis `dim` as one piece, or None where they are not the selections of one, in order.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> x = Live("x", TensorSpec([2, 3], "float32"))
        >>> restack([Index(x, (0, (0, 3))), Index(x, (1, (0, 3)))], 0) is x
        True
    """
    first = parts[0]
    kind = first.__class__
    if any(p.__class__ is not kind for p in parts):
        return None
    match first:
        case Full(spec, value):
            if not all(same_value(first, p) for p in parts):  # type: ignore[arg-type]
                return None
            return Full(TensorSpec((*spec.shape[:dim], len(parts), *spec.shape[dim:]), spec.dtype), value)
        case Cast(_, dtype):
            if any(p.dtype is not dtype for p in parts):  # type: ignore[union-attr]
                return None
            inner = restack(_below(parts), dim)
            return inner and Cast(inner, dtype)
        case Permute(_, dims):
            if any(p.dims != dims for p in parts):  # type: ignore[union-attr]
                return None
            natural = _restack_chain(_below(parts), dim)
            return natural and _moved(natural, dims, dim)
        case Concat() | Stack():
            return _restack_columns(parts, dim)
        case Reshape():
            return _restack_reshapes(parts, dim)
        case Index() | Take():
            natural = _restack_chain(parts, dim)
            return natural and _moved(natural, tuple(range(len(shape_of(first)))), dim)
    return None


def _below(parts: Sequence[Expr]) -> list[Expr]:
    return [p.of for p in parts]  # type: ignore[union-attr]


def _moved(natural: tuple[Expr, int], dims: tuple[int, ...], dim: int) -> Expr:
    """The new axis, which lies at its natural place, moved to `dim`, and the other axes permuted by `dims`."""
    expr, place = natural
    moved = [d + (d >= place) for d in dims]
    moved.insert(dim, place)
    return expr if moved == sorted(moved) else Permute(expr, tuple(moved))


def _restack_chain(parts: Sequence[Expr], dim: int) -> tuple[Expr, int] | None:
    """The one piece with its new axis where the axes of the leaf have it, and that place."""
    first = parts[0]
    if any(p.__class__ is not first.__class__ for p in parts):
        return None
    match first:
        case Index():
            return _restack_slices(parts, dim)  # type: ignore[arg-type]
        case Take(_, axis, indices):
            if any(p.dim != axis or p.indices != indices for p in parts):  # type: ignore[union-attr]
                return None
            inner = _restack_chain(_below(parts), dim)
            return inner and (Take(inner[0], axis + (axis >= inner[1]), indices), inner[1])
    return None


def _restack_slices(parts: Sequence[Index], dim: int) -> tuple[Expr, int] | None:
    first = parts[0].at
    axis = _varying(parts, dim)
    if axis is None:
        return None
    start, of = first[axis], parts[0].of
    assert isinstance(start, int)
    for i, p in enumerate(parts):
        if p.of is not of and p.of != of:
            return None
        if p.at[axis] != start + i or p.at[:axis] != first[:axis] or p.at[axis + 1 :] != first[axis + 1 :]:
            return None
    place = sum([isinstance(a, tuple) for a in first[:axis]])
    return _slice(of, (*first[:axis], (start, start + len(parts)), *first[axis + 1 :])), place


def _varying(parts: Sequence[Index], dim: int) -> int | None:
    """The axis of the leaf whose index counts up from part to part."""
    ints = [i for i, a in enumerate(parts[0].at) if isinstance(a, int)]
    if len(parts) > 1:
        ints = [i for i in ints if len(parts[1].at) > i and parts[1].at[i] != parts[0].at[i]][:1]
    else:
        # One part does not say which axis it is; the one that needs no permutation is the most likely.
        ints.sort(key=lambda i: sum([isinstance(a, tuple) for a in parts[0].at[:i]]) != dim)
    return ints[0] if ints else None


def _restack_columns(parts: Sequence[Expr], dim: int) -> Expr | None:
    first = parts[0]
    assert isinstance(first, Concat | Stack)
    across = first.dim
    if any(p.dim != across or len(p.parts) != len(first.parts) for p in parts):  # type: ignore[union-attr]
        return None
    stacks = isinstance(first, Stack)
    if not stacks and not _aligned(parts):  # type: ignore[arg-type]
        return None
    columns = []
    for column in zip(*[p.parts for p in parts], strict=True):  # type: ignore[union-attr]
        inner = restack(column, dim - (dim > across) if stacks else dim)
        if inner is None:
            return None
        columns.append(inner)
    moved = across + (across >= dim)
    return Stack(tuple(columns), moved) if stacks else Concat(tuple(columns), moved)


def _restack_reshapes(parts: Sequence[Expr], dim: int) -> Expr | None:
    first = parts[0]
    assert isinstance(first, Reshape)
    below, shape = shape_of(first.of), first.shape
    if any(p.shape != shape or shape_of(p.of) != below for p in parts):  # type: ignore[union-attr]
        return None
    restacked = None
    inner = len(below) - len(shape) + dim
    if inner >= 0 and below[inner:] == shape[dim:]:
        restacked = restack(_below(parts), inner)
    if restacked is None and below[:dim] == shape[:dim]:
        restacked = restack(_below(parts), dim)
    return restacked and Reshape(restacked, (*shape[:dim], len(parts), *shape[dim:]))
