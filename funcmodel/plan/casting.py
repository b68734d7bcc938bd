"""Dtypes of a whole plan: `cast` by template, `like` a module, and what the casts of a plan can lose."""

from collections.abc import Mapping
from typing import Final, assert_never

from funcmodel.core import build
from funcmodel.core.casts import loss
from funcmodel.core.shapes import dtype_of, spec_of
from funcmodel.core.templates import template
from funcmodel.errors import KeyMismatchError, PlanError, ShapeError
from funcmodel.plan.prefixes import hint
from funcmodel.plan.transforms import Transform, everything, matching, refuse_quantized, replaced
from funcmodel.records.dtypes import DType
from funcmodel.records.dtypes import dtype as as_dtype
from funcmodel.records.expressions import (
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
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import ModuleSpec
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.reports import LoadReport, Loss, Mismatch

_LEAVES: Final = frozenset({Read, Live, Full, Noise})
_WORSE: Final[tuple[Loss, ...]] = ("exact", "rounding", "range", "kind")


def cast(dtype: object, *, where: str = "{*key}") -> Transform:
    """Casts the keys that match `where` and hold numbers of the same kind as `dtype`.

    A float becomes another float, an int another int; a key of another kind stays as it is, so `cast("bfloat16")` of a
    whole checkpoint leaves integer buffers alone. A change of kind happens only where `where` names one key literally.

    Args:
        dtype: the target, in any spelling.
        where: a template; it must match a key, and one of the right kind (except that a cast of everything to a
            floating type may find nothing to do).

    Returns:
        A transform; `casts` shows what it costs.

    Raises:
        ValueError: the dtype is unknown.
        TemplateError: `where` is no template.
        PlanError: (by the transform) nothing matches, nothing that matches has the right kind, or a quantized weight
            or its scale would be cast.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> ids, w = (build.live(k, TensorSpec([2], d)) for k, d in (("ids", "int64"), ("w", "float32")))
        >>> plan = cast("bfloat16")(StateDictPlan({"ids": ids, "w": w}))
        >>> [dtype_of(expr) for expr in plan.values()], dict(casts(plan))
        ([int64, bfloat16], {'w': 'rounding'})
    """
    target = as_dtype(dtype)
    parsed = template(where)
    by_name = not parsed.fields

    def transform(plan: StateDictPlan) -> StateDictPlan:
        found = matching((parsed,), plan)
        changed: dict[str, Expr] = {}
        fitting = bool(not plan or (everything(parsed) and target.kind == "float"))
        for key, expr in plan.items():
            if key in found:
                held = dtype_of(expr)
                if by_name or held.kind == target.kind:
                    fitting = True
                    if held is not target:
                        changed[key] = build.cast(expr, target)
        if not fitting:
            raise PlanError(
                f"of {len(found)} keys that match {where!r} none holds numbers of kind {target.kind}, as {target} is; "
                f"a change of kind needs the literal name of its key",
                keys=tuple(key for key in plan if key in found),
                dtype=target,
            )
        refuse_quantized(plan, changed, f"cast to {target}")
        return replaced(plan, changed)

    return transform


def casts(plan: Mapping[str, Expr]) -> FrozenMap[str, Loss]:
    """What the casts in a plan can lose, per key that has a cast: the worst of "exact", "rounding", "range", "kind".

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> weight = build.live("w", TensorSpec([2], "float32"))
        >>> dict(casts({"half": build.cast(weight, "float16"), "same": weight}))
        {'half': 'range'}
    """
    found = ((key, _worst(expr)) for key, expr in plan.items() if type(expr) not in _LEAVES)
    return FrozenMap((key, worst) for key, worst in found if worst is not None)


def _worst(expr: Expr) -> Loss | None:
    worst = -1
    pending: list[Expr] = [expr]
    while pending:
        match pending.pop():
            case Read() | Live() | Full() | Noise():
                pass
            case Cast(of=of, dtype=target):
                worst = max(worst, _WORSE.index(loss(dtype_of(of), target)))
                pending.append(of)
            case Index(of=of) | Permute(of=of) | Take(of=of) | Reshape(of=of):
                pending.append(of)
            case Concat(parts=parts) | Stack(parts=parts) | Call(args=parts):
                pending.extend(parts)
            case other:
                assert_never(other)
    return None if worst < 0 else _WORSE[worst]


def like(spec: ModuleSpec) -> Transform:
    """Casts and orders a plan to match a module: the plan's keys, in module order, with the module's dtypes.

    Keys that the plan lacks stay lacking. Tensors of extra state are the module's own business and are not cast.

    Args:
        spec: the module; its persistent leaves are what a plan may hold.

    Returns:
        A transform; it is idempotent.

    Raises:
        KeyMismatchError: (by the transform) the plan has keys that the module has not; `report` has the missing too.
        ShapeError: (by the transform) shapes differ; `mismatched` lists all, `key`, `expected`, `found` the first.
        PlanError: (by the transform) a cast would change the kind of number, or touch a quantized weight.

    Example:
        >>> from funcmodel.records.module import ParamSpec
        >>> from funcmodel.records.tensors import TensorSpec
        >>> net = ModuleSpec(name="Net", params={k: ParamSpec(spec=TensorSpec([2], "bfloat16")) for k in ("w", "b")})
        >>> plan = StateDictPlan({k: build.live(k, TensorSpec([2], "float32")) for k in ("b", "w")})
        >>> [(key, dtype_of(expr)) for key, expr in like(net)(plan).items()]
        [('w', bfloat16), ('b', bfloat16)]
    """
    wanted = {key: leaf for key, leaf in spec.params.items() if leaf.persistent}

    def transform(plan: StateDictPlan) -> StateDictPlan:
        unexpected = tuple(key for key in plan if key not in wanted)
        if unexpected:
            raise _unexpected(spec, plan, unexpected)
        entries: dict[str, Expr] = {}
        mismatched: list[Mismatch] = []
        changed: dict[str, tuple[DType, DType]] = {}
        for key, leaf in wanted.items():
            if key not in plan:
                continue
            expr = entries[key] = plan[key]
            found = spec_of(expr)
            if found == leaf.spec or leaf.kind == "extra_state":
                continue
            if found.shape != leaf.spec.shape:
                mismatched.append(Mismatch(key, leaf.spec, found))
            else:
                changed[key] = (found.dtype, leaf.spec.dtype)
                entries[key] = build.cast(expr, leaf.spec.dtype)
        _refuse_shapes(spec, mismatched)
        kinds = tuple(key for key, (found_dtype, target) in changed.items() if found_dtype.kind != target.kind)
        if kinds:
            found_dtype, target = changed[kinds[0]]
            raise PlanError(
                f"{kinds[0]!r} holds {found_dtype} and {spec.name} wants {target}: a change of kind is never made "
                f"silently ({len(kinds)} such); plan it by name with cast({target.name!r}, where={kinds[0]!r})",
                keys=kinds,
            )
        refuse_quantized(plan, changed, "cast")
        return StateDictPlan(entries)

    return transform


def _unexpected(spec: ModuleSpec, plan: StateDictPlan, unexpected: tuple[str, ...]) -> KeyMismatchError:
    twins = {key: group.keys for group in spec.tied for key in group.keys}
    missing = tuple(
        key
        for key, leaf in spec.params.items()
        if leaf.persistent and not any(twin in plan for twin in twins.get(key, (key,)))
    )
    fix = hint(spec, plan)
    return KeyMismatchError(
        f"{spec.name} has no {', '.join(unexpected[:5])} ({len(unexpected)} unexpected, {len(missing)} missing); "
        + (f"try {fix}" if fix else "leave them out with drop(...) or rename them with convert(...)"),
        keys=unexpected,
        report=LoadReport(missing_keys=missing, unexpected_keys=unexpected),
        hints=(fix,) if fix else (),
    )


def _refuse_shapes(spec: ModuleSpec, mismatched: list[Mismatch]) -> None:
    if mismatched:
        first = mismatched[0]
        raise ShapeError(
            f"{first.key!r} of {spec.name} is {first.expected}, found {first.found} ({len(mismatched)} such); "
            f"resize_rows, take or drop them first",
            key=first.key,
            expected=first.expected,
            found=first.found,
            mismatched=tuple(mismatched),
        )
