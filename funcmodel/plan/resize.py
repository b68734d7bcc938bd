"""Rows of embeddings and heads: grow or shrink one key of a plan, and the same key of a module's spec."""

from collections.abc import Callable
from hashlib import blake2b
from math import inf, isfinite
from typing import Literal, TypeAlias

from attrs import evolve, frozen

from funcmodel.core import build
from funcmodel.core.shapes import spec_of
from funcmodel.errors import PlanError, ShapeError
from funcmodel.plan.transforms import Transform, refuse_quantized, replaced, require
from funcmodel.records.dtypes import DType
from funcmodel.records.expressions import Expr
from funcmodel.records.module import ModuleSpec
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec


@frozen(kw_only=True)
class Normal:
    """New rows drawn from a normal distribution; what is drawn depends on key, first new row and seed, on nothing else.

    Example:
        >>> Normal(std=0.02)
        Normal(mean=0.0, std=0.02, seed=0)
    """

    mean: float = 0.0
    std: float = 1.0
    seed: int = 0


RowFill: TypeAlias = bool | int | float | complex | Normal | Literal["mean"]


def row_seed(key: str, row: int, seed: int) -> int:
    """The seed of rows appended to `key` from `row` on: 63 bits of BLAKE2b.

    The row takes part so that growing twice does not draw the same rows twice.

    Example:
        >>> row_seed("embed", 10, 0) == row_seed("embed", 10, 0), row_seed("embed", 10, 0) == row_seed("head", 10, 0)
        (True, False)
    """
    text = f"{seed}:{row}:{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big") >> 1


def resize_rows(key: str, rows: int, *, fill: RowFill | None = None) -> Transform:
    """Grows or shrinks axis 0 of one key to `rows`. The old rows that stay are what they were, bit for bit.

    Args:
        key: a key of the plan, no template. A tied twin that the plan also holds is a key of its own (`dedupe` first).
        rows: rows [rows, ...] of the result.
        fill: what new rows hold, needed to grow: a number, a `Normal`, or "mean" for the mean of the old rows.

    Returns:
        A transform; other keys stay.

    Raises:
        ValueError: `rows` is negative.
        PlanError: (by the transform) there is no such key; it grows and `fill` is not given or does not fit its dtype;
            it is a quantized weight or its scale.
        ShapeError: (by the transform) the key has no axis 0.

    Example:
        >>> plan = StateDictPlan({"embed": build.live("embed", TensorSpec([10, 4], "float32"))})
        >>> grown = resize_rows("embed", 12, fill=0.0)(plan)
        >>> spec_of(grown["embed"]), resize_rows("embed", 10)(grown) == plan
        ([12, 4] float32, True)
    """
    if rows < 0:
        raise ValueError(f"rows cannot be negative: {rows}")

    def transform(plan: StateDictPlan) -> StateDictPlan:
        require(key, plan)
        expr = plan[key]
        spec = spec_of(expr)
        _require_rows(key, spec)
        old = spec.shape[0]
        if rows == old:
            return plan
        refuse_quantized(plan, (key,), "resize")
        if rows < old:
            return replaced(plan, {key: build.narrow(expr, 0, 0, rows)})
        new = _rows(key, expr, TensorSpec((rows - old, *spec.shape[1:]), spec.dtype), fill, old)
        return replaced(plan, {key: build.concat((expr, new), 0)})

    return transform


def _require_rows(key: str, spec: TensorSpec) -> None:
    if not spec.shape:
        raise ShapeError(f"{key!r} is a scalar and has no rows to resize", key=key, expected=1, found=spec)


def _rows(key: str, old: Expr, spec: TensorSpec, fill: RowFill | None, start: int) -> Expr:
    """Expression of the new rows."""
    if fill is None:
        raise PlanError(
            f"{key!r} grows from {start} to {start + spec.shape[0]} rows; say what the new ones hold with "
            f"fill=0.0, fill=Normal(std=...) or fill='mean'",
            keys=(key,),
        )
    if isinstance(fill, Normal):
        _require_float(key, spec, "Normal")
        return build.noise(spec, mean=fill.mean, std=fill.std, seed=row_seed(key, start, fill.seed))
    if isinstance(fill, str):
        if fill != "mean":
            raise PlanError(f"no such fill: {fill!r}; write a number, Normal(...) or 'mean'", keys=(key,))
        _require_float(key, spec, "the mean")
        if start == 0:
            raise PlanError(f"{key!r} has no rows to take the mean of", keys=(key,))
        return build.call("funcmodel.run.functions:mean_rows", (old,), spec, rows=spec.shape[0])
    if not _holds(spec.dtype, fill):
        raise PlanError(f"{key!r} is {spec.dtype} and cannot hold {fill!r}", keys=(key,), dtype=spec.dtype, found=fill)
    return build.full(spec, fill)


def _require_float(key: str, spec: TensorSpec, what: str) -> None:
    if spec.dtype.kind != "float" or spec.dtype.pack > 1:
        raise PlanError(f"{key!r} is {spec.dtype}; {what} needs floating rows, give a number", keys=(key,))


def _holds(dtype: DType, value: bool | int | float | complex) -> bool:
    """Whether a number fits a dtype without a change of kind and without leaving its range."""
    if dtype.kind == "bool" or isinstance(value, bool):
        return dtype.kind == "bool" and isinstance(value, bool)
    if isinstance(value, complex):
        return dtype.kind == "complex"
    if dtype.kind == "int":
        low = -(2**dtype.precision) if dtype.signed else 0
        return isinstance(value, int) and low <= value < 2**dtype.precision
    return (dtype.signed or value > 0) and (not isfinite(value) or abs(value) <= dtype.largest < inf)


def resized(key: str, rows: int) -> Callable[[ModuleSpec], ModuleSpec]:
    """The same resizing of a module's spec: the leaf `key` and every leaf tied to it have `rows` rows.

    Args:
        key: a leaf of the module.
        rows: rows [rows, ...] of the result.

    Returns:
        A function of a `ModuleSpec`.

    Raises:
        ValueError: `rows` is negative.
        PlanError: (by the function) there is no such leaf, or it shares its storage with a leaf of another shape.
        ShapeError: (by the function) the leaf has no axis 0.

    Example:
        >>> from funcmodel.records.module import ParamSpec
        >>> leaf = ParamSpec(spec=TensorSpec([10, 4], "float32"))
        >>> resized("embed", 12)(ModuleSpec(name="Net", params={"embed": leaf})).params["embed"].spec
        [12, 4] float32
    """
    if rows < 0:
        raise ValueError(f"rows cannot be negative: {rows}")

    def function(spec: ModuleSpec) -> ModuleSpec:
        require(key, spec.params)
        members = {key}.union(*(group.keys for group in spec.tied if key in group.keys))
        shared = tuple(name for name, view in spec.views.items() if name in members or view.of in members)
        if shared:
            raise PlanError(
                f"{key!r} shares storage with a leaf of another shape ({', '.join(shared)}); resize the owner by hand",
                keys=(key, *shared),
            )
        params = dict(spec.params.items())
        for name in members:
            old = params[name].spec
            _require_rows(name, old)
            params[name] = evolve(params[name], spec=TensorSpec((rows, *old.shape[1:]), old.dtype))
        return evolve(spec, params=params)

    return function
