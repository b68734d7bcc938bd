"""Normal forms: each operation on a normal expression gives a normal expression.

The arguments are trusted here; `core.build` checks them first. A normal form is a tree of `Concat` and `Stack` over
chains, and a chain is, outermost first,

    Cast*  Permute?  Take* (lowest axis innermost)  Index?  leaf | Reshape | Call

where a chain over `Reshape` has no `Cast`, because casting goes below reshaping. Neighbors that were cut from one
expression are one expression again (`core.fusion`), and nothing that changes nothing is kept.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Final

from funcmodel.core.casts import holds, loss
from funcmodel.core.fusion import join, picks_of, restack, widened, with_picks
from funcmodel.core.leaves import constant
from funcmodel.core.rowmajor import check_whole_bytes, common_prefix, cut_distances, through
from funcmodel.core.shapes import dtype_of, selected, shape_of
from funcmodel.records.dtypes import DType
from funcmodel.records.expressions import (
    At,
    Call,
    Cast,
    Concat,
    Expr,
    Full,
    Index,
    Live,
    Noise,
    Permute,
    Read,
    Reshape,
    Stack,
    Take,
)
from funcmodel.records.tensors import TensorSpec

ZERO: Final = {"float": 0.0, "int": 0, "bool": False, "complex": 0j}


def sliced(of: Expr, at: At) -> Expr:
    """`of` sliced by `at`, which has an in-range int or `(start, stop)` for every axis.

    Example:
        >>> x = Live("x", TensorSpec([4, 3], "float32"))
        >>> sliced(Permute(x, (1, 0)), ((0, 3), 2)) == sliced(x, (2, (0, 3)))
        True
    """
    whole, empty = True, False
    for a, n in zip(at, shape_of(of), strict=True):
        if a != (0, n):
            whole = False
            if a.__class__ is tuple and a[0] == a[1]:
                empty = True
    if whole:
        return of
    return _nothing(selected(at), of) if empty else _cut(of, at)


def _nothing(shape: tuple[int, ...], of: Expr) -> Full:
    """What is left where every element was cut away: no leaf is worth naming for it."""
    dtype = dtype_of(of)
    return Full(TensorSpec(shape, dtype), ZERO[dtype.kind])


def _cut(of: Expr, at: At) -> Expr:
    match of:
        case Read() | Live() | Noise() | Call():
            return _leaf_slice(of, at)
        case Index(inner, before):
            fused = _composed(before, at)
            return _cut_reshape(inner, fused) if isinstance(inner, Reshape) else _leaf_slice(inner, fused)
        case Full(spec, value):
            return Full(TensorSpec(selected(at), spec.dtype), value)
        case Cast(inner, dtype):
            return converted(sliced(inner, at), dtype)
        case Permute(inner, dims):
            kept = [d for d, a in zip(dims, at, strict=True) if a.__class__ is tuple]
            below = sliced(inner, tuple([a for _, a in sorted(zip(dims, at, strict=True))]))
            return permuted(below, tuple([sorted(kept).index(d) for d in kept]))
        case Take(inner, dim, indices):
            return _cut_take(inner, dim, indices, at)
        case Concat(parts, dim):
            return _cut_concat(parts, dim, at)
        case Stack(parts, dim):
            rest, a = (*at[:dim], *at[dim + 1 :]), at[dim]
            if isinstance(a, int):
                return sliced(parts[a], rest)
            return stacked([sliced(p, rest) for p in parts[a[0] : a[1]]], _kept_before(at, dim))
        case Reshape():
            return _cut_reshape(of, at)


def _kept_before(at: At, axis: int) -> int:
    return sum([a.__class__ is tuple for a in at[:axis]])


def _composed(before: At, at: At) -> At:
    """The one slicing that `before` and then `at` are."""
    rest = iter(at)
    fused: list[int | tuple[int, int]] = []
    for a in before:
        if isinstance(a, int):
            fused.append(a)
        else:
            b = next(rest)
            fused.append(a[0] + b if isinstance(b, int) else (a[0] + b[0], a[0] + b[1]))
    return tuple(fused)


def _leaf_slice(of: Expr, at: At) -> Index:
    bits = dtype_of(of).bits
    if bits % 8:
        shape = shape_of(of)
        check_whole_bytes(bits, cut_distances(shape, at), f"slice {list(at)} of {list(shape)}")
    return Index(of, at)


def _cut_take(of: Expr, dim: int, indices: tuple[int, ...], at: At) -> Expr:
    a = at[dim]
    if isinstance(a, int):
        return sliced(of, (*at[:dim], indices[a], *at[dim + 1 :]))
    below = sliced(of, (*at[:dim], (0, shape_of(of)[dim]), *at[dim + 1 :]))
    return taken(below, _kept_before(at, dim), indices[a[0] : a[1]])


def _cut_concat(parts: tuple[Expr, ...], dim: int, at: At) -> Expr:
    a = at[dim]
    low, high = (a, a + 1) if isinstance(a, int) else a
    pieces, start = [], 0
    for part in parts:
        stop = start + shape_of(part)[dim]
        if low < stop and start < high:
            inside = low - start if isinstance(a, int) else (max(low, start) - start, min(high, stop) - start)
            pieces.append(sliced(part, (*at[:dim], inside, *at[dim + 1 :])))
        start = stop
        if start >= high:
            break
    return pieces[0] if isinstance(a, int) else concatenated(pieces, _kept_before(at, dim))


# -- slices of reshapes ---------------------------------------------------------------------------------------------


def _cut_reshape(of: Reshape, at: At) -> Expr:
    """A slice goes below a reshape as far as row-major order allows; the rest stays above it."""
    inner, shape = of.of, of.shape
    below = shape_of(inner)
    if 0 in shape:
        return Index(of, at)
    head = common_prefix(below, shape)
    tail = common_prefix(below[head:][::-1], shape[head:][::-1])
    end = len(shape) - tail
    before, middle, behind = at[:head], at[head:end], at[end:]
    pushed_at, between, left = through(below[head : len(below) - tail], shape[head:end], middle)
    pushed = sliced(inner, (*before, *pushed_at, *behind))
    if pushed is inner and left == middle:
        return _leaf_slice(of, at)
    front, back = selected(before), selected(behind)
    rest = (*[(0, n) for n in front], *left, *[(0, n) for n in back])
    return sliced(reshaped(pushed, (*front, *between, *back)), rest)


# -- rows, axes, shapes, dtypes -------------------------------------------------------------------------------------


def taken(of: Expr, dim: int, indices: tuple[int, ...]) -> Expr:
    """Rows `indices` of `of` along `dim`, each in range.

    Example:
        >>> x = Live("x", TensorSpec([4, 3], "float32"))
        >>> taken(x, 0, (1, 2)), taken(taken(x, 0, (3, 1, 0)), 0, (2, 0)).indices
        (Index(of=Live(key='x', spec=[4, 3] float32), at=((1, 3), (0, 3))), (0, 3))
    """
    shape = shape_of(of)
    if not indices:
        return of if not shape[dim] else _nothing((*shape[:dim], 0, *shape[dim + 1 :]), of)
    start, stop = indices[0], indices[-1] + 1
    if stop - start == len(indices) and indices == tuple(range(start, stop)):
        return sliced(of, tuple([(start, stop) if d == dim else (0, n) for d, n in enumerate(shape)]))
    match of:
        case Full(spec, value):
            return Full(TensorSpec((*shape[:dim], len(indices), *shape[dim + 1 :]), spec.dtype), value)
        case Cast(inner, dtype):
            return converted(taken(inner, dim, indices), dtype)
        case Permute(inner, dims):
            return permuted(taken(inner, dims[dim], indices), dims)
        case Concat(parts, across) if across != dim:
            return concatenated([taken(p, dim, indices) for p in parts], across)
        case Concat(parts):
            return concatenated(_taken_across(parts, dim, indices), dim)
        case Stack(parts, across) if across != dim:
            return stacked([taken(p, dim - (dim > across), indices) for p in parts], across)
        case Stack(parts):
            return stacked([parts[i] for i in indices], dim)
    return _taken_from_chain(of, dim, indices)


def _taken_across(parts: tuple[Expr, ...], dim: int, indices: tuple[int, ...]) -> list[Expr]:
    owner: list[tuple[Expr, int]] = []
    start = 0
    for part in parts:
        length = shape_of(part)[dim]
        owner += [(part, start)] * length
        start += length
    pieces: list[Expr] = []
    begin = 0
    for end in range(1, len(indices) + 1):
        part, start = owner[indices[begin]]
        if end == len(indices) or owner[indices[end]][1] != start:
            pieces.append(taken(part, dim, tuple([i - start for i in indices[begin:end]])))
            begin = end
    return pieces


def _taken_from_chain(of: Expr, dim: int, indices: tuple[int, ...]) -> Expr:
    base, picks = picks_of(of)
    if dim in picks:
        before = picks.pop(dim)
        base = taken(base, dim, tuple([before[i] for i in indices]))
        for d in sorted(picks):
            base = taken(base, d, picks[d])
        return base
    base, start, _ = widened(base, dim)
    shape = shape_of(base)
    bits = dtype_of(base).bits
    if bits % 8:
        check_whole_bytes(bits, [prod(shape[dim + 1 :])], f"rows of {list(shape)} along {dim}")
    return with_picks(base, {**picks, dim: tuple([i + start for i in indices]) if start else indices})


def permuted(of: Expr, dims: tuple[int, ...]) -> Expr:
    """`of` with axis `dims[i]` as its axis `i`.

    Example:
        >>> x = Live("x", TensorSpec([4, 3], "float32"))
        >>> permuted(permuted(x, (1, 0)), (1, 0)) is x
        True
    """
    if dims == tuple(range(len(dims))):
        return of
    match of:
        case Permute(inner, before):
            return permuted(inner, tuple([before[d] for d in dims]))
        case Cast(inner, dtype):
            return converted(permuted(inner, dims), dtype)
        case Full(spec, value):
            return Full(TensorSpec([spec.shape[d] for d in dims], spec.dtype), value)
        case Concat(parts, across):
            return concatenated([permuted(p, dims) for p in parts], dims.index(across))
        case Stack(parts, across):
            rest = tuple([d - (d > across) for d in dims if d != across])
            return stacked([permuted(p, rest) for p in parts], dims.index(across))
    bits = dtype_of(of).bits
    if bits % 8:
        fixed = common_prefix(dims[::-1], tuple(range(len(dims)))[::-1])
        shape = shape_of(of)
        check_whole_bytes(bits, [prod(shape[len(shape) - fixed :])], f"axes {list(dims)} of {list(shape)}")
    return Permute(of, dims)


def reshaped(of: Expr, shape: tuple[int, ...]) -> Expr:
    """The elements of `of`, as many as `shape` has, in row-major order.

    Example:
        >>> x = Live("x", TensorSpec([4, 3], "float32"))
        >>> reshaped(reshaped(x, (12,)), (4, 3)) is x
        True
    """
    match of:
        case Reshape(inner):
            return reshaped(inner, shape)
        case Full(spec, value):
            return of if spec.shape == shape else Full(TensorSpec(shape, spec.dtype), value)
        case Cast(Full() as inner, dtype):
            return Cast(reshaped(inner, shape), dtype)
    return of if shape_of(of) == shape else Reshape(of, shape)


def converted(of: Expr, dtype: DType) -> Expr:
    """The numbers of `of` in another dtype.

    Two casts become one only where the first is exact and stays within its kind, as does the second.

    Example:
        >>> x = Live("x", TensorSpec([4, 3], "bfloat16"))
        >>> from funcmodel.records.dtypes import BFLOAT16, FLOAT16, FLOAT32
        >>> converted(converted(x, FLOAT32), BFLOAT16) is x
        True
        >>> converted(converted(x, FLOAT16), BFLOAT16) is x
        False
    """
    source = dtype_of(of)
    if source is dtype:
        return of
    match of:
        case Concat(parts, dim):
            return concatenated([converted(p, dtype) for p in parts], dim)
        case Stack(parts, dim):
            return stacked([converted(p, dtype) for p in parts], dim)
        case Full(spec, value):
            if 0 in spec.shape:
                return Full(TensorSpec(spec.shape, dtype), ZERO[dtype.kind])
            if holds(source, value) and holds(dtype, value):
                return constant(TensorSpec(spec.shape, dtype), value)
        case Cast(inner):
            first = dtype_of(inner)
            if first.kind == source.kind == dtype.kind and loss(first, source) == "exact":
                return converted(inner, dtype)
        case Reshape(inner, shape):
            return reshaped(converted(inner, dtype), shape)
        case Index(Reshape() as inner, at):
            return sliced(converted(inner, dtype), at)
        case Take(inner, dim, indices) if _over_reshape(inner):
            return taken(converted(inner, dtype), dim, indices)
        case Permute(inner, dims) if _over_reshape(inner):
            return permuted(converted(inner, dtype), dims)
    return Cast(of, dtype)


def _over_reshape(chain: Expr) -> bool:
    while isinstance(chain, Take | Index):
        chain = chain.of
    return isinstance(chain, Reshape)


# -- putting together -----------------------------------------------------------------------------------------------


def concatenated(parts: Sequence[Expr], dim: int) -> Expr:
    """Parts of one dtype, none empty along `dim`, side by side.

    Example:
        >>> x = Live("x", TensorSpec([4, 3], "float32"))
        >>> concatenated([sliced(x, ((0, 1), (0, 3))), sliced(x, ((1, 4), (0, 3)))], 0) is x
        True
    """
    if len(parts) == 1:
        return parts[0]
    out: list[Expr] = []
    for part in parts:
        for piece in part.parts if isinstance(part, Concat) and part.dim == dim else (part,):
            while out and (joined := join(out[-1], piece, dim)) is not None:
                out.pop()
                piece = joined
            out.append(piece)
    if len(out) == 1:
        return out[0]
    if dtype_of(out[0]).bits % 8:
        _check_concat_bytes(out, dim)
    return Concat(tuple(out), dim)


def _check_concat_bytes(parts: Sequence[Expr], dim: int) -> None:
    shape = shape_of(parts[0])
    row = prod(shape[dim + 1 :])
    lengths = [shape_of(p)[dim] * row for p in parts]
    if prod(shape[:dim]) == 1:
        lengths.pop()
    check_whole_bytes(dtype_of(parts[0]).bits, lengths, f"{len(parts)} parts like {list(shape)} along {dim}")


def stacked(parts: Sequence[Expr], dim: int) -> Expr:
    """Parts of one spec along a new axis.

    Example:
        >>> x = Live("x", TensorSpec([2, 3], "float32"))
        >>> stacked([sliced(x, (0, (0, 3))), sliced(x, (1, (0, 3)))], 0) is x
        True
    """
    whole = restack(parts, dim)
    if whole is not None:
        return whole
    pieces = _runs(parts, dim)
    if pieces:
        return concatenated(pieces, dim)
    bits = dtype_of(parts[0]).bits
    if bits % 8 and len(parts) > 1:
        shape = shape_of(parts[0])
        check_whole_bytes(bits, [prod(shape[dim:])], f"{len(parts)} parts like {list(shape)} along {dim}")
    return Stack(tuple(parts), dim)


def _runs(parts: Sequence[Expr], dim: int) -> list[Expr]:
    """Parts among which some neighbors are rows of one tensor, as slices with stacks between; else nothing."""
    ties = [restack(pair, dim) is not None for pair in pairwise(parts)]
    if True not in ties:
        return []
    pieces: list[Expr] = []
    begin = 0
    for end in range(1, len(parts) + 1):
        if end == len(parts) or not ties[end - 1]:
            run = parts[begin:end]
            pieces.append(restack(run, dim) or Stack(tuple(run), dim))
            begin = end
    return pieces
