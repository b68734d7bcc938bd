"""Smart constructors of expressions, public as `funcmodel.expr`: checked at once, always in normal form.

Each takes expressions in normal form and gives one (see `core.normal`), so that equal plans are equal values and a
slice of a merge of a transpose is the bytes it needs:

* `index` goes down to the leaves; it stays only above a `Read`, `Live`, `Noise`, `Call`, or where a `Reshape` mixes
  the axes it cuts. An empty slice is an empty `Full`.
* `concat` and `stack` of neighbors cut from one expression are that expression again, where the cuts are those that
  `index` made. Rows picked by `take` count as neighbors too; two slices with a gap between them stay two slices.
* `cast`, `permute` and `take` go below `concat` and `stack`, `cast` also below `reshape`.
* What changes nothing vanishes.
"""

from collections.abc import Iterable, Sequence
from math import prod
from operator import index as as_int
from typing import SupportsIndex

from attrs import evolve

from funcmodel.core.leaves import call, full, live, noise, read, whole_bytes
from funcmodel.core.normal import concatenated, converted, permuted, reshaped, sliced, stacked, taken
from funcmodel.core.shapes import dtype_of, shape_of, spec_of
from funcmodel.errors import ShapeError
from funcmodel.records import expressions as node
from funcmodel.records.dtypes import dtype as dtype_named
from funcmodel.records.expressions import At, Expr, Full, Live, Noise, Read

__all__ = [
    "call",
    "cast",
    "concat",
    "full",
    "index",
    "live",
    "narrow",
    "noise",
    "permute",
    "read",
    "rebuilt",
    "reshape",
    "select",
    "stack",
    "take",
    "transpose",
]


def index(of: Expr, at: Sequence[int | tuple[int, int] | slice]) -> Expr:
    """A slice of `of`.

    Args:
        of: the expression.
        at: per axis an int (the axis goes), a `(start, stop)` pair or a slice of step 1 (the axis stays); negative
            numbers count from the end, bounds beyond an end mean the end, axes that are not mentioned stay whole.

    Raises:
        ShapeError: more entries than axes, an int out of range, or a step other than 1.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = live("x", TensorSpec([4, 8], "float32"))
        >>> index(x, (-1, slice(2, 5)))
        Index(of=Live(key='x', spec=[4, 8] float32), at=(3, (2, 5)))
        >>> index(permute(x, [1, 0]), [(2, 5), 3]) == index(x, [3, (2, 5)])
        True
    """
    shape = shape_of(of)
    if len(at) > len(shape):
        raise ShapeError(
            f"{len(at)} entries for the {len(shape)} axes of {spec_of(of)!r}: {list(at)}",
            expected=len(shape),
            found=len(at),
        )
    box: list[int | tuple[int, int]] = [_selector(of, axis, a, shape[axis]) for axis, a in enumerate(at)]
    box += [(0, n) for n in shape[len(at) :]]
    return sliced(of, tuple(box))


def _selector(of: Expr, axis: int, a: int | tuple[int, int] | slice, n: int) -> int | tuple[int, int]:
    if not isinstance(a, slice | tuple):
        return _in_range(of, axis, a, n)
    start, stop, step = (a if isinstance(a, slice) else slice(*a)).indices(n)
    if step != 1:
        raise ShapeError(f"axis {axis} of {spec_of(of)!r}: a slice of step {step}; take(...) picks rows", found=a)
    return start, max(start, stop)


def _in_range(of: Expr, axis: int, i: SupportsIndex, n: int) -> int:
    number = as_int(i)
    if not -n <= number < n:
        raise ShapeError(
            f"{number} on axis {axis} of {spec_of(of)!r}: expected at least {-n} and less than {n}",
            expected=n,
            found=number,
        )
    return number % n


def _axis(of: Expr, dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise ShapeError(
            f"{spec_of(of)!r} has no axis {dim}: expected at least {-ndim} and less than {ndim}",
            expected=ndim,
            found=dim,
        )
    return dim % ndim


def narrow(of: Expr, dim: int, start: int, stop: int) -> Expr:
    """Rows `start` to `stop` (excluded) along `dim`.

    Raises:
        ShapeError: no such axis, or the rows do not lie within it.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> narrow(live("x", TensorSpec([4, 8], "float32")), 1, 2, 5).at
        ((0, 4), (2, 5))
    """
    shape = shape_of(of)
    dim = _axis(of, dim, len(shape))
    if not 0 <= start <= stop <= shape[dim]:
        raise ShapeError(
            f"rows {start} to {stop} along axis {dim} of {spec_of(of)!r}: expected within 0 to {shape[dim]}",
            expected=shape[dim],
            found=(start, stop),
        )
    return sliced(of, tuple([(start, stop) if d == dim else (0, n) for d, n in enumerate(shape)]))


def select(of: Expr, dim: int, i: int) -> Expr:
    """Row `i` along `dim`; the axis goes.

    Raises:
        ShapeError: no such axis or row.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> select(live("x", TensorSpec([4, 8], "float32")), 1, -1).at
        ((0, 4), 7)
    """
    shape = shape_of(of)
    dim = _axis(of, dim, len(shape))
    row = _in_range(of, dim, i, shape[dim])
    return sliced(of, tuple([row if d == dim else (0, n) for d, n in enumerate(shape)]))


def take(of: Expr, indices: Iterable[SupportsIndex], dim: int = 0) -> Expr:
    """Rows `indices` along `dim`, in that order, also repeatedly.

    Args:
        of: the expression.
        indices: row numbers; negative ones count from the end. Neighbors in ascending order become a slice.
        dim: the axis.

    Raises:
        ShapeError: no such axis or row.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = live("x", TensorSpec([4, 8], "float32"))
        >>> take(x, [0, -1]).indices, take(x, [1, 2]) == narrow(x, 0, 1, 3)
        ((0, 3), True)
    """
    shape = shape_of(of)
    dim = _axis(of, dim, len(shape))
    n = shape[dim]
    rows = tuple(map(as_int, indices))
    if rows and (min(rows) < 0 or max(rows) >= n):
        rows = tuple([_in_range(of, dim, i, n) for i in rows])
    return taken(of, dim, rows)


# -- put together ---------------------------------------------------------------------------------------------------


def concat(parts: Iterable[Expr], dim: int = 0) -> Expr:
    """Parts joined along an existing axis.

    Args:
        parts: at least one; equal in dtype and in every other axis.
        dim: the axis.

    Raises:
        ShapeError: no part, no such axis, or parts that do not fit.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = live("x", TensorSpec([4, 8], "float32"))
        >>> concat([narrow(x, 0, 0, 3), narrow(x, 0, 3, 4)]) == x
        True
        >>> concat([x, live("y", TensorSpec([4, 9], "float32"))])
        Traceback (most recent call last):
            ...
        funcmodel.errors.ShapeError: part 1 of a concat along axis 0: expected [any, 8] float32, found [4, 9] float32
    """
    given = tuple(parts)
    if not given:
        raise ShapeError("a concat needs at least one part", expected=1, found=0)
    shape, dtype = shape_of(given[0]), dtype_of(given[0])
    dim = _axis(given[0], dim, len(shape))
    before, behind = shape[:dim], shape[dim + 1 :]
    empty = not shape[dim]
    for i, part in enumerate(given):
        other = shape_of(part)
        if dtype_of(part) is not dtype or other[:dim] != before or other[dim + 1 :] != behind:
            expected = ", ".join([*map(str, before), "any", *map(str, behind)])
            raise ShapeError(
                f"part {i} of a concat along axis {dim}: expected [{expected}] {dtype.name}, found {spec_of(part)!r}",
                expected=spec_of(given[0]),
                found=spec_of(part),
            )
        empty = empty or not other[dim]
    if empty:
        given = tuple([p for p in given if shape_of(p)[dim]]) or given[:1]
    return concatenated(given, dim)


def stack(parts: Iterable[Expr], dim: int = 0) -> Expr:
    """Parts joined along a new axis.

    Args:
        parts: at least one, of one spec.
        dim: where the new axis is in the result.

    Raises:
        ShapeError: no part, no such place, or parts that differ in shape or dtype.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = live("x", TensorSpec([4, 8], "float32"))
        >>> spec_of(stack([x, x], 1))
        [4, 2, 8] float32
        >>> stack([select(x, 1, i) for i in range(8)], 1) == x
        True
    """
    given = tuple(parts)
    if not given:
        raise ShapeError("a stack needs at least one part", expected=1, found=0)
    shape, dtype = shape_of(given[0]), dtype_of(given[0])
    for i, part in enumerate(given):
        if shape_of(part) != shape or dtype_of(part) is not dtype:
            raise ShapeError(
                f"part {i} of a stack: expected {spec_of(given[0])!r}, found {spec_of(part)!r}",
                expected=spec_of(given[0]),
                found=spec_of(part),
            )
    return stacked(given, _axis(given[0], dim, len(shape) + 1))


# -- the same elements otherwise ------------------------------------------------------------------------------------


def permute(of: Expr, dims: Sequence[int]) -> Expr:
    """The axes of `of` in another order.

    Args:
        of: the expression.
        dims: axis `i` of the result is axis `dims[i]` of `of`; every axis once.

    Raises:
        ShapeError: `dims` is no permutation of the axes.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> spec_of(permute(live("x", TensorSpec([2, 3, 4], "float32")), [2, 0, 1]))
        [4, 2, 3] float32
    """
    ndim = len(shape_of(of))
    order = tuple([_axis(of, d, ndim) for d in dims])
    if sorted(order) != list(range(ndim)):
        raise ShapeError(
            f"{list(dims)} is no order of the {ndim} axes of {spec_of(of)!r}", expected=ndim, found=tuple(dims)
        )
    return permuted(of, order)


def transpose(of: Expr, a: int = 0, b: int = 1) -> Expr:
    """Axes `a` and `b` exchanged.

    Raises:
        ShapeError: no such axis.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = live("x", TensorSpec([2, 3], "float32"))
        >>> transpose(transpose(x)) == x
        True
    """
    ndim = len(shape_of(of))
    order = list(range(ndim))
    a, b = _axis(of, a, ndim), _axis(of, b, ndim)
    order[a], order[b] = order[b], order[a]
    return permuted(of, tuple(order))


def reshape(of: Expr, shape: Sequence[int]) -> Expr:
    """The elements of `of` in row-major order under another shape.

    Args:
        of: the expression.
        shape: the new shape; one entry may be -1, which is then computed.

    Raises:
        ShapeError: the numbers of elements differ, or more than one entry is unknown.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = live("x", TensorSpec([6, 4], "float32"))
        >>> spec_of(reshape(x, [3, -1, 4]))
        [3, 2, 4] float32
        >>> index(reshape(x, [3, 2, 4]), [1]) == narrow(x, 0, 2, 4)
        True
    """
    numel, new = prod(shape_of(of)), [as_int(n) for n in shape]
    known = prod([n for n in new if n != -1])
    if new.count(-1) == 1 and known > 0 and numel % known == 0:
        new[new.index(-1)] = numel // known
    if min(new, default=0) < 0 or prod(new) != numel:
        raise ShapeError(
            f"{list(shape)} is no shape for the {numel} elements of {spec_of(of)!r}", expected=numel, found=tuple(shape)
        )
    return reshaped(of, tuple(new))


def cast(of: Expr, dtype: object) -> Expr:
    """The numbers of `of` in another dtype, converted as torch's `Tensor.to` does.

    Args:
        of: the expression.
        dtype: a `DType` or any of its spellings.

    Raises:
        ShapeError: from or to a dtype narrower than a byte, which torch does not convert.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = live("x", TensorSpec([2], "bfloat16"))
        >>> cast(cast(x, "float32"), "bfloat16") == x
        True
    """
    source, target = dtype_of(of), dtype_named(dtype)
    if source is not target and (source.bits < 8 or target.bits < 8):
        raise ShapeError(
            f"torch does not convert {source.name} to {target.name}; use call(...) with a function that does",
            expected=target,
            found=source,
        )
    return converted(of, target)


# -- all at once ----------------------------------------------------------------------------------------------------


def rebuilt(expr: Expr) -> Expr:
    """`expr` built again from its leaves up, hence checked and in normal form whatever it was before.

    Raises:
        ShapeError: its parts do not fit.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> x = live("x", TensorSpec([4, 8], "float32"))
        >>> rebuilt(node.Index(node.Permute(x, (1, 0)), ((0, 8), (1, 3)))) == permute(narrow(x, 0, 1, 3), [1, 0])
        True
    """
    match expr:
        case Read() | Live() | Noise():
            whole_bytes(expr.spec)
            return expr
        case Full(spec, value):
            return full(spec, value)
        case node.Index(of, at):
            return _sliced_exactly(rebuilt(of), at)
        case node.Concat(parts, dim):
            return concat([rebuilt(p) for p in parts], dim)
        case node.Stack(parts, dim):
            return stack([rebuilt(p) for p in parts], dim)
        case node.Permute(of, dims):
            return permute(rebuilt(of), dims)
        case node.Take(of, dim, indices):
            return take(rebuilt(of), indices, dim)
        case node.Reshape(of, shape):
            return reshape(rebuilt(of), shape)
        case node.Cast(of, dtype):
            return cast(rebuilt(of), dtype)
        case node.Call(_, args, spec):
            whole_bytes(spec)
            return evolve(expr, args=tuple([rebuilt(a) for a in args]))


def _sliced_exactly(of: Expr, at: At) -> Expr:
    """As `index`, without its leniency: a plan that was written by hand or read from a file must mean what it says."""
    shape = shape_of(of)
    fits = [0 <= a < n if isinstance(a, int) else 0 <= a[0] <= a[1] <= n for a, n in zip(at, shape, strict=False)]
    if len(at) != len(shape) or not all(fits):
        raise ShapeError(f"slice {list(at)} of {spec_of(of)!r} does not lie within it", expected=shape, found=at)
    return sliced(of, at)
