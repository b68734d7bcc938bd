"""Tensor parallelism as a transform: each rank's part of every tensor, so that a rank reads its own bytes only."""

from collections.abc import Mapping
from typing import TypeAlias

from funcmodel.core import build
from funcmodel.core.shapes import shape_of, spec_of
from funcmodel.core.templates import Matcher, template
from funcmodel.errors import PlanError, ShapeError
from funcmodel.plan.companions import companions
from funcmodel.plan.transforms import Transform, refuse_unused
from funcmodel.records.expressions import Expr
from funcmodel.records.mesh import Layout, LayoutMap, Shard
from funcmodel.records.plans import StateDictPlan

Layouts: TypeAlias = LayoutMap | Mapping[str, Layout | Shard | int]

_AXIS = "tp"


def chunk(n: int, parts: int, i: int) -> tuple[int, int]:
    """Start and stop of part `i` of `n` elements cut into `parts`, as `torch.chunk` cuts.

    Each part has ceil(n / parts) elements, the last that has any may be short, and those behind it are empty.

    Args:
        n: elements along the axis.
        parts: number of parts, at least 1.
        i: which part, from 0.

    Raises:
        PlanError: there is no such part.

    Example:
        >>> [chunk(10, 4, i) for i in range(4)], [chunk(5, 4, i) for i in range(4)]
        ([(0, 3), (3, 6), (6, 9), (9, 10)], [(0, 2), (2, 4), (4, 5), (5, 5)])
    """
    if n < 0 or parts < 1 or not 0 <= i < parts:
        raise PlanError(f"no part {i} of {n} elements in {parts} parts; parts are numbered 0...{parts - 1}")
    size = -(-n // parts)
    return min(n, size * i), min(n, size * i + size)


def tp_slice(layout: Layouts, *, rank: int, world_size: int) -> Transform:
    """The part of every tensor that one rank of a tensor-parallel group holds.

    A key takes the layout of the first template that matches it; a key that none matches is held whole by every rank.
    The parts of all ranks, joined along the axis, are the tensor.

    Args:
        layout: template -> the axis to cut: an int, a `Shard` (with `sizes` where parts are uneven on purpose), or a
            `Layout` whose one mesh axis is named "tp". `Layout()` says that a key stays whole.
        rank: 0...world_size - 1.
        world_size: number of ranks.

    Returns:
        A transform; keys and order stay. It commutes with `cast`.

    Raises:
        TemplateError: a text is no template.
        PlanError: no such rank; a layout with other mesh axes, memberships or a flat split, which need the whole mesh
            and belong to `for_rank`; (by the transform) a template matches no key; a quantized weight is cut while no
            layout says what happens to its scale.
        ShapeError: (by the transform) no such axis, or `sizes` that do not add up; field `key`.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> plan = StateDictPlan({k: build.live(k, TensorSpec([8, 6], "float32")) for k in ("up", "down", "norm")})
        >>> part = tp_slice({"up": 0, "down": 1}, rank=1, world_size=4)(plan)
        >>> [(key, spec_of(expr).shape) for key, expr in part.items()]
        [('up', (2, 6)), ('down', (8, 2)), ('norm', (8, 6))]
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise PlanError(f"no rank {rank} among {world_size}; ranks are 0...{world_size - 1}", rank=rank)
    entries = layout.entries if isinstance(layout, LayoutMap) else layout
    parsed = tuple(map(template, entries))
    shards = tuple(_shard(text, value) for text, value in entries.items())
    for text, shard in zip(entries, shards, strict=True):
        if shard is not None and shard.sizes is not None and len(shard.sizes) != world_size:
            raise PlanError(
                f"the layout of {text!r} has {len(shard.sizes)} sizes for {world_size} ranks", template=text
            )
    matcher = Matcher(parsed)

    def transform(plan: StateDictPlan) -> StateDictPlan:
        unused = set(range(len(parsed)))
        laid: set[str] = set()
        part = dict(plan.items())
        for key, expr in plan.items():
            found = matcher.values(key)
            if not found:
                continue
            laid.add(key)
            if unused:
                unused.difference_update(position for position, _ in found)
            shard = shards[found[0][0]]
            if shard is not None:
                part[key] = _cut(key, expr, shard, rank, world_size)
        refuse_unused((parsed[position] for position in sorted(unused)), plan)
        _check_companions(plan, part, laid)
        return StateDictPlan(part)

    return transform


def _shard(text: str, value: Layout | Shard | int) -> Shard | None:
    """The one cut that a layout makes over tensor-parallel ranks, or None where it makes none."""
    if isinstance(value, Shard):
        return value
    if not isinstance(value, Layout):
        return Shard(value)
    axes = [axis for axis, _ in value.order]
    if value.only or value.flat is not None or any(axis != _AXIS for axis in axes):
        raise PlanError(
            f"the layout of {text!r} names more than the axis {_AXIS!r} ({value}); tp_slice knows one axis, "
            f"a layout over a mesh is for for_rank(layout, mesh, rank)",
            template=text,
            layout=value,
        )
    if len(axes) > 1:
        raise PlanError(
            f"the layout of {text!r} cuts {len(axes)} times over {_AXIS!r}; a rank has one coordinate on it, "
            f"so most elements would be on no rank",
            template=text,
            layout=value,
        )
    return value.order[0][1] if value.order else None


def _cut(key: str, expr: Expr, shard: Shard, rank: int, world_size: int) -> Expr:
    shape = shape_of(expr)
    dim = shard.dim + len(shape) if shard.dim < 0 else shard.dim
    if not 0 <= dim < len(shape):
        raise ShapeError(
            f"{key!r} is {list(shape)} and has no axis {shard.dim} to cut; give it another layout",
            key=key,
            expected=shard.dim,
            found=spec_of(expr),
        )
    if shard.sizes is None:
        start, stop = chunk(shape[dim], world_size, rank)
    else:
        start = sum(shard.sizes[:rank])
        stop = start + shard.sizes[rank]
        if sum(shard.sizes) != shape[dim] or min(shard.sizes) < 0:
            raise ShapeError(
                f"{key!r} is {list(shape)}; the sizes {shard.sizes} do not add up to axis {dim}",
                key=key,
                expected=shape[dim],
                found=shard.sizes,
            )
    return build.narrow(expr, dim, start, stop)


def _check_companions(plan: StateDictPlan, part: Mapping[str, Expr], laid: set[str]) -> None:
    for weight, others in companions(plan.entries).items():
        group = (weight, *others)
        if all(part[key] is plan[key] for key in group):
            continue
        # A scale of one element serves every part; any other needs a layout of its own, if only Layout().
        open_ = tuple(key for key in group if key not in laid and spec_of(plan[key]).numel > 1)
        if open_:
            raise PlanError(
                f"the quantized weight {weight!r} is cut and no layout says how {', '.join(open_)} goes with it; "
                f"give it the axis to cut, or Layout() to keep it whole",
                keys=group,
            )
