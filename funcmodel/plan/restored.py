"""`restored`: the way back from a plan to the tensors it was read from, derived from the leaves of the plan.

Nothing is recorded while rules are applied. The leaves say which box of which stored tensor every key holds; turning
each expression around gives each box as a function of its key, and the boxes of one stored tensor are put together.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Final, Literal, TypeAlias, assert_never

from funcmodel.core import build
from funcmodel.core.casts import loss
from funcmodel.core.shapes import dtype_of, shape_of, spec_of
from funcmodel.errors import RuleError
from funcmodel.plan.tiling import Span, Tiles, axis_of, put_together, volume, whole
from funcmodel.plan.transforms import Transform
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
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec

_RUNS: Final = 1 << 16

Rounding: TypeAlias = Literal["raise", "cast"]
# What is still to be turned around: the part of this expression at this place has this value.
Task: TypeAlias = tuple[Expr, At, Expr]
# A stored tensor that is known at once: its value, and the keys that hold it.
Whole: TypeAlias = tuple[Read, Expr, tuple[str, ...]]


def restored(plan: StateDictPlan, *, rounding: Rounding = "raise") -> Transform:
    """The transform that takes the keys of `plan` back to the names, shapes and dtypes they were read from.

    Use it to save a model under the names it was loaded from: `pipe(live_plan(spec), restored(loaded))`.

    Args:
        plan: what was loaded. Every stored tensor that it touches must be in it whole, and no part of it twice.
        rounding: what to do where the plan casts with a loss: "raise", or "cast" back to the stored dtype, which does
            not bring the lost bits back.

    Returns:
        A transform for plans with the keys and shapes of `plan`. Its result has one key per stored tensor, in the
        order in which `plan` first reads them. On a plan that rules made it gives the plan that was scanned. Keys
        that hold one stored tensor whole, as the ties of a `.bin` do, are restored each under its own name while one of
        them has the stored name. Otherwise they must still be one tensor, which gets the stored name; what its others
        were called is not in the plan.

    Raises:
        RuleError: a part of a stored tensor is in no key, or in two; two stored tensors have one name; or an
            expression has no inverse (a constant, noise, a call, a cast with a loss). By the transform: keys are
            missing or unknown, or have another shape, or a dtype that lost bits; or what was one stored tensor has
            become several. Field `keys`, and `name` for a stored tensor.

    Example:
        >>> from funcmodel.records.expressions import FileRef
        >>> x = Read(FileRef("a.safetensors", "safetensors", 40, "00"), "qk", TensorSpec([4], "float32"), 24)
        >>> mine = StateDictPlan({"q": build.index(x, [(0, 2)]), "k": build.index(x, [(2, 4)])})
        >>> restored(mine)(mine) == StateDictPlan({"qk": x})
        True
    """
    specs = {key: spec_of(expr) for key, expr in plan.items()}
    # A dry run: what can go wrong with the plan itself is found here and not when saving.
    _restore(plan, plan, rounding)

    def transform(other: StateDictPlan) -> StateDictPlan:
        return StateDictPlan(_restore(plan, _fitting(specs, other, rounding), rounding))

    return transform


def _fitting(specs: Mapping[str, TensorSpec], other: StateDictPlan, rounding: Rounding) -> Mapping[str, Expr]:
    """The values of `other`, in the dtypes of the plan that was loaded."""
    missing = tuple(key for key in specs if key not in other)
    unknown = tuple(key for key in other if key not in specs)
    if missing or unknown:
        raise RuleError(
            f"the keys are not those that were loaded: missing {list(missing[:8])}, unknown {list(unknown[:8])}; "
            f"keep, dedupe or spread them first",
            keys=(*missing, *unknown),
            missing=missing,
            unknown=unknown,
        )
    values: dict[str, Expr] = {}
    for key, expected in specs.items():
        value = other[key]
        found = spec_of(value)
        if found is not expected and found != expected:
            if found.shape != expected.shape or not (
                rounding == "cast" or loss(expected.dtype, found.dtype) == "exact"
            ):
                raise RuleError(
                    f"{key!r} is {found}, but was loaded as {expected}; the stored tensor cannot be made from it",
                    keys=(key,),
                    expected=expected,
                    found=found,
                )
            value = build.cast(value, expected.dtype)
        values[key] = value
    return values


# -- taking apart ----------------------------------------------------------------------------------------------------


def _restore(plan: StateDictPlan, values: Mapping[str, Expr], rounding: Rounding) -> dict[str, Expr]:
    """Stored name -> its expression over `values`, for every stored tensor that the plan reads."""
    # Most stored tensors are one key, or one part of one; those need no tiles.
    stored: dict[str, Tiles | Whole] = {}
    # By how many reshapes lie below: the outer ones are finished first, since they give pieces of the inner ones.
    reshaped: defaultdict[int, dict[Reshape, Tiles]] = defaultdict(dict)

    def place(expr: Read, value: Expr, keys: tuple[str, ...]) -> None:
        """A stored tensor that is in `keys` whole."""
        name = expr.name
        if keys[0] != name and len(keys) == 1 and plan.get(name) == plan[keys[0]]:
            alone = prod(shape_of(plan[name])) == prod(expr.spec.shape)
            name = keys[0] if alone else name  # the same under another name, and neither was renamed
        held = stored.get(name)
        if held is None:
            stored[name] = (expr, value, keys)
        elif not (isinstance(held, tuple) and held[:2] == (expr, value)):
            _tiles(stored, name, expr, keys).add(whole(expr.spec.shape), value, keys)

    def sort_out(keys: tuple[str, ...], task: Task) -> None:
        tasks = [task]
        while tasks:
            expr, at, value = tasks.pop()
            if isinstance(expr, Read):
                if at == whole(expr.spec.shape):
                    place(expr, value, keys)
                else:
                    _tiles(stored, expr.name, expr, keys).add(at, value, keys)
            elif isinstance(expr, Reshape):
                reshaped[_reshapes(expr)].setdefault(expr, Tiles(expr)).add(at, value, keys)
            else:
                tasks += reversed(list(_turned(expr, at, value, keys, rounding)))

    for key, expr in plan.items():
        if type(expr) is Read:
            place(expr, values[key], (key,))
        else:
            sort_out((key,), (expr, whole(shape_of(expr)), values[key]))
    while reshaped:
        for tiles in reshaped.pop(max(reshaped)).values():
            for keys, task in _unshaped(tiles):
                sort_out(keys, task)
    return {name: held[1] if isinstance(held, tuple) else put_together(held) for name, held in stored.items()}


def _tiles(stored: dict[str, Tiles | Whole], name: str, node: Read, keys: tuple[str, ...]) -> Tiles:
    """What is known of a stored tensor so far, for one more piece."""
    held = stored.get(name)
    if not isinstance(held, Tiles):
        tiles = stored[name] = Tiles(node if held is None else held[0])
        if held is not None:
            tiles.add(whole(node.spec.shape), held[1], held[2])
        held = tiles
    if held.node is not node and held.node != node:
        raise held.refusal(f"two stored tensors are called {name!r}", keys)
    return held


def _reshapes(expr: Expr) -> int:
    match expr:
        case Read() | Live() | Full() | Noise():
            return 0
        case Reshape(of):
            return 1 + _reshapes(of)
        case Index(of) | Permute(of) | Cast(of) | Take(of):
            return _reshapes(of)
        case Concat(parts) | Stack(parts) | Call(args=parts):
            return max(map(_reshapes, parts), default=0)
        case _:
            assert_never(expr)


def _turned(expr: Expr, at: At, value: Expr, keys: tuple[str, ...], rounding: Rounding) -> Iterator[Task]:
    """What `value`, the part of `expr` at `at`, says of the parts of `expr`."""
    match expr:
        case Index(of, outer):
            yield of, _composed(outer, at), value
        case Permute(of, dims):
            inner: list[int | Span] = [0] * len(dims)
            for axis, dim in enumerate(dims):
                inner[dim] = at[axis]
            kept = [dim for axis, dim in enumerate(dims) if isinstance(at[axis], tuple)]
            yield of, tuple(inner), build.permute(value, [kept.index(dim) for dim in sorted(kept)])
        case Cast(of, to):
            source = dtype_of(of)
            if rounding == "raise" and loss(source, to) != "exact":
                raise RuleError(
                    f"{', '.join(keys)} was cast from {source} to {to}, which loses bits; save under new names, or say "
                    f"restored(plan, rounding='cast')",
                    keys=keys,
                    expected=source,
                    found=to,
                )
            yield of, at, build.cast(value, source)
        case Concat(parts, dim):
            yield from _unjoined(parts, dim, at, value)
        case Stack(parts, dim):
            here, rest, axis = at[dim], (*at[:dim], *at[dim + 1 :]), axis_of(at, dim)
            if isinstance(here, int):
                yield parts[here], rest, value
            else:
                for number in range(*here):
                    yield parts[number], rest, build.select(value, axis, number - here[0])
        case Take(of, dim, indices):
            yield from _untaken(of, dim, indices, at, value)
        case Full() | Noise() | Live() | Call():
            raise RuleError(
                f"{', '.join(keys)} holds a {type(expr).__name__}, which was read from no file; leave it out first",
                keys=keys,
            )
        case Read() | Reshape():
            raise AssertionError("these are gathered, not turned around")
        case _:
            assert_never(expr)


def _unjoined(parts: Sequence[Expr], dim: int, at: At, value: Expr) -> Iterator[Task]:
    here, axis = at[dim], axis_of(at, dim)
    cuts = pairwise(accumulate([shape_of(part)[dim] for part in parts], initial=0))
    for part, (first, last) in zip(parts, cuts, strict=True):
        if isinstance(here, int):
            if first <= here < last:
                yield part, (*at[:dim], here - first, *at[dim + 1 :]), value
            continue
        start, stop = max(here[0], first), min(here[1], last)
        if start < stop:
            inner = (*at[:dim], (start - first, stop - first), *at[dim + 1 :])
            yield part, inner, build.narrow(value, axis, start - here[0], stop - here[0])


def _untaken(of: Expr, dim: int, indices: tuple[int, ...], at: At, value: Expr) -> Iterator[Task]:
    """Rows in some order are runs of rows in ascending order."""
    here, axis = at[dim], axis_of(at, dim)
    if isinstance(here, int):
        yield of, (*at[:dim], indices[here], *at[dim + 1 :]), value
        return
    rows = indices[here[0] : here[1]]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    breaks = [n for n in range(1, len(order)) if rows[order[n]] != rows[order[n - 1]] + 1]
    for start, stop in pairwise((0, *breaks, len(order))):
        if start < stop:
            span = (rows[order[start]], rows[order[stop - 1]] + 1)
            yield of, (*at[:dim], span, *at[dim + 1 :]), build.take(value, order[start:stop], axis)


def _composed(outer: At, inner: At) -> At:
    """`inner`, a place in what `outer` selects, as a place in the whole."""
    rest = iter(inner)
    composed: list[int | Span] = []
    for span in outer:
        if isinstance(span, int):
            composed.append(span)
            continue
        here = next(rest)
        start = span[0]
        composed.append(start + here if isinstance(here, int) else (start + here[0], start + here[1]))
    return tuple(composed)


# -- reshapes --------------------------------------------------------------------------------------------------------


def _unshaped(tiles: Tiles) -> Iterator[tuple[tuple[str, ...], Task]]:
    """What the pieces of a reshape say of the tensor that was reshaped."""
    node = tiles.node
    assert isinstance(node, Reshape)
    inner = shape_of(node.of)
    if tiles.volume >= prod(node.shape):
        keys = tuple(dict.fromkeys(key for some in tiles.keys for key in some))
        yield keys, (node.of, whole(inner), build.reshape(put_together(tiles), inner))
        return
    # The rest of the tensor is elsewhere, perhaps under another reshape: what is here, run by run of elements.
    for keys, (at, value) in zip(tiles.keys, tiles.pieces, strict=True):
        runs = _runs(node.shape, at)
        if len(runs) > _RUNS:
            raise tiles.refusal(
                f"parts of it are reshaped differently, in {len(runs)} runs; at most {_RUNS} are handled"
            )
        flat = build.reshape(value, (-1,))
        done = 0
        for start, stop in runs:
            for box in _boxes(inner, start, stop):
                size = volume(box)
                part = build.reshape(build.narrow(flat, 0, done, done + size), [b - a for a, b in box])
                yield keys, (node.of, box, part)
                done += size


def _runs(shape: tuple[int, ...], at: At) -> list[Span]:
    """The elements of a box, as runs of neighbors in row-major order.

    They come in the order of the box, so that they are also runs of the value of the box.
    """
    runs, stride = [(0, 1)], 1
    for length, span in zip(reversed(shape), reversed(at), strict=True):
        first, last = (span, span + 1) if isinstance(span, int) else span
        if len(runs) == 1 and runs[0] == (0, stride):
            runs = [(first * stride, last * stride)]
        else:
            runs = [(n * stride + start, n * stride + stop) for n in range(first, last) for start, stop in runs]
        stride *= length
    return runs


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Span, ...]]:
    """Boxes that hold the elements `start` to `stop` in row-major order: the end of a row, whole rows, its start."""
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    while start < stop:
        first = start // row
        if start % row == 0 and stop - start >= row:
            last = stop // row
            yield ((first, last), *((0, length) for length in shape[1:]))
        else:
            last = first + 1
            for box in _boxes(shape[1:], start - first * row, min(stop - first * row, row)):
                yield ((first, last), *box)
        start = last * row
