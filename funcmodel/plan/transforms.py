"""Transforms: functions from one state dict plan to another. Any two compose, left to right with `pipe`."""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Final, TypeAlias, get_args

from funcmodel.core import build
from funcmodel.core.shapes import spec_of
from funcmodel.core.templates import Matcher, Template, template
from funcmodel.errors import KeyMismatchError, PlanError, ShapeError
from funcmodel.plan.companions import check_whole, companions
from funcmodel.records.expressions import Expr
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.reports import LoadReport

Transform: TypeAlias = Callable[[StateDictPlan], StateDictPlan]

_NODES: Final = get_args(Expr)


def near(text: str, keys: Iterable[str]) -> tuple[str, ...]:
    """The keys, at most three, that look most like `text`; for messages.

    Example:
        >>> near("layers.0.atn.weight", ["layers.0.attn.weight", "lm_head.weight"])
        ('layers.0.attn.weight',)
    """
    wanted = set(text.split("."))
    pool = list(keys)
    if len(pool) > 1000:
        # Close matching is slow, so of many keys only those with the most segments in common take part.
        pool = sorted(pool, key=lambda key: -len(wanted.intersection(key.split("."))))[:200]
    return tuple(get_close_matches(text, pool, n=3, cutoff=0.7))


def require(key: str, keys: Collection[str]) -> None:
    """Refuses a key that is not among `keys`.

    Raises:
        PlanError: it is not; fields `keys` and `near`.
    """
    if key not in keys:
        close = near(key, keys)
        raise PlanError(
            f"no key {key!r} among {len(keys)}" + (f"; near: {', '.join(close)}" if close else ""),
            keys=(key,),
            near=close,
        )


def everything(parsed: Template) -> bool:
    """Whether a template matches every key, as "{*key}" does.

    Example:
        >>> everything(template("{*key}")), everything(template("model.{*key}"))
        (True, False)
    """
    return parsed.star == 0 and len(parsed.segments) == 1


def refuse_unused(unused: Iterable[Template], plan: Collection[str]) -> None:
    """Refuses templates that matched nothing; the template of everything may.

    Raises:
        PlanError: there is one; fields `templates` and `near`.
    """
    texts = tuple(parsed.text for parsed in unused if not everything(parsed))
    if texts:
        close = near(texts[0], plan)
        raise PlanError(
            f"no key of {len(plan)} matches {', '.join(map(repr, texts))}"
            + (f"; near: {', '.join(close)}" if close else ""),
            templates=texts,
            near=close,
        )


def matching(templates: Sequence[Template], plan: StateDictPlan) -> set[str]:
    """The keys that match at least one template.

    Raises:
        PlanError: a template matches no key.
    """
    if any(map(everything, templates)) and len(templates) == 1:
        return set(plan)
    unused = set(range(len(templates)))
    found: set[str] = set()
    values = Matcher(templates).values
    for key in plan:
        matches = values(key)
        if matches:
            found.add(key)
            if unused:
                unused.difference_update(position for position, _ in matches)
    refuse_unused((templates[position] for position in sorted(unused)), plan)
    return found


def replaced(plan: StateDictPlan, changed: Mapping[str, Expr]) -> StateDictPlan:
    """The plan with other expressions for some of its keys, in the same order."""
    return StateDictPlan(dict(plan.items()) | dict(changed)) if changed else plan


def refuse_quantized(plan: StateDictPlan, changed: Collection[str], verb: str) -> None:
    """Refuses to change a quantized weight, or its scale, on its own.

    Raises:
        PlanError: a changed key belongs to such a group; `keys` is the group.
    """
    if not changed:
        return
    for weight, others in companions(plan.entries).items():
        group = (weight, *others)
        if any(key in changed for key in group):
            raise PlanError(
                f"cannot {verb} {weight!r}: it is quantized, its numbers mean nothing without {', '.join(others)}; "
                f"leave the group out, or dequantize it first",
                keys=group,
            )


def keep(*templates: str) -> Transform:
    """Keeps the keys that match at least one of `templates`, in order.

    Args:
        templates: at least one must match a key each; a typing error is not an empty checkpoint.

    Returns:
        A transform. `keep(*t)(plan)` and `drop(*t)(plan)` partition `plan`.

    Raises:
        TemplateError: a text is no template.
        PlanError: (by the transform) a template matches no key, with near misses; or a quantized weight would be
            parted from its scale.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> spec = TensorSpec([2], "float32")
        >>> plan = StateDictPlan({k: build.live(k, spec) for k in ("enc.w", "enc.b", "head.w")})
        >>> list(keep("enc.{*p}")(plan)), list(drop("enc.{*p}")(plan))
        (['enc.w', 'enc.b'], ['head.w'])
    """
    parsed = tuple(map(template, templates))

    def transform(plan: StateDictPlan) -> StateDictPlan:
        found = matching(parsed, plan)
        kept = StateDictPlan({key: expr for key, expr in plan.items() if key in found})
        check_whole(plan.entries, found, what="keep")
        return kept

    return transform


def drop(*templates: str) -> Transform:
    """Leaves out the keys that match at least one of `templates`; what `keep` keeps.

    Args:
        templates: each must match a key.

    Returns:
        A transform.

    Raises:
        TemplateError: a text is no template.
        PlanError: (by the transform) a template matches no key, with near misses; or a quantized weight would be
            parted from its scale.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> spec = TensorSpec([2], "float32")
        >>> plan = StateDictPlan({k: build.live(k, spec) for k in ("w", "rotary.inv_freq")})
        >>> list(drop("{*p}.inv_freq")(plan))
        ['w']
    """
    parsed = tuple(map(template, templates))

    def transform(plan: StateDictPlan) -> StateDictPlan:
        found = matching(parsed, plan)
        kept = StateDictPlan({key: expr for key, expr in plan.items() if key not in found})
        check_whole(plan.entries, found, what="drop")
        return kept

    return transform


def at(template_text: str, fn: Callable[[str, Expr], Expr]) -> Transform:
    """Replaces each expression whose key matches by `fn(key, expression)`.

    Args:
        template_text: must match a key.
        fn: a pure function that builds its result with `funcmodel.expr`.

    Returns:
        A transform; keys and order stay.

    Raises:
        TemplateError: not a template.
        PlanError: (by the transform) nothing matches, or `fn` returns something else than an expression.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> plan = StateDictPlan({"fc.weight": build.live("fc.weight", TensorSpec([4, 8], "float32"))})
        >>> turned = at("{*p}.weight", lambda key, expr: build.transpose(expr))(plan)
        >>> spec_of(turned["fc.weight"])
        [8, 4] float32
    """
    parsed = template(template_text)

    def transform(plan: StateDictPlan) -> StateDictPlan:
        found = matching((parsed,), plan)
        changed = {key: fn(key, expr) for key, expr in plan.items() if key in found}
        wrong = tuple(key for key, expr in changed.items() if not isinstance(expr, _NODES))
        if wrong:
            raise PlanError(
                f"the function for {template_text!r} must return an expression, found {type(changed[wrong[0]])} "
                f"for {wrong[0]!r}; build one with funcmodel.expr",
                keys=wrong,
            )
        return replaced(plan, changed)

    return transform


def overlay(other: StateDictPlan) -> Transform:
    """The union of a plan and `other`; where both hold a key, `other` counts.

    Args:
        other: what is laid over. Keys that are new come after those of the plan, in their order.

    Returns:
        A transform. Overlaying is associative and the empty plan is its identity.

    Raises:
        PlanError: (by the transform) a quantized weight would be replaced and its old scale kept, or the reverse.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> a, b, c = (build.live(name, TensorSpec([2], "float32")) for name in "abc")
        >>> both = overlay(StateDictPlan({"y": b, "z": c}))(StateDictPlan({"x": a, "y": a}))
        >>> [(key, expr.key) for key, expr in both.items()]
        [('x', 'a'), ('y', 'b'), ('z', 'c')]
    """

    def transform(plan: StateDictPlan) -> StateDictPlan:
        union = StateDictPlan(dict(plan.items()) | dict(other.items()))
        for weight, others in companions(union.entries).items():
            group = (weight, *others)
            stale = [key for key in group if key in plan and key not in other]
            if stale and any(key in plan and key in other and plan[key] != other[key] for key in group):
                raise PlanError(
                    f"overlay replaces part of the quantized weight {weight!r} and keeps the old {', '.join(stale)}; "
                    f"overlay the whole group, or drop the old one first",
                    keys=group,
                )
        return union

    return transform


def take(key: str, indices: Sequence[int], *, dim: int = 0) -> Transform:
    """Keeps the rows `indices` of one key along `dim`, in that order.

    Args:
        key: a key of the plan, no template.
        indices: positions along `dim`.
        dim: the axis; negative counts from the last.

    Returns:
        A transform; other keys stay.

    Raises:
        PlanError: (by the transform) there is no such key, or it is a quantized weight or its scale.
        ShapeError: (by the transform) no such axis, or an index outside it.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> plan = StateDictPlan({"embed": build.live("embed", TensorSpec([10, 4], "float32"))})
        >>> spec_of(take("embed", [0, 7, 3])(plan)["embed"])
        [3, 4] float32
    """
    rows = tuple(indices)

    def transform(plan: StateDictPlan) -> StateDictPlan:
        require(key, plan)
        refuse_quantized(plan, (key,), "take rows of")
        return replaced(plan, {key: build.take(plan[key], rows, dim)})

    return transform


def combine(fn: str | Callable[..., object], *plans: StateDictPlan) -> StateDictPlan:
    """One plan from several with the same keys: `fn` of the tensors of each key.

    Args:
        fn: "mean", or a module-level function of as many tensors as there are plans, itself or as "pkg.mod:name"; its
            result has the shape and dtype of its arguments.
        plans: at least one. Keys, shapes and dtypes agree; the order is that of the first.

    Returns:
        A plan of `Call` nodes.

    Raises:
        PlanError: no plan; a function that cannot be named (a lambda, a closure, a partial, a method); "mean" of ints,
            bools or packed floats; quantized weights, whose numbers mean nothing without their scales.
        KeyMismatchError: keys differ; in `report`, missing and unexpected are seen from the first plan.
        ShapeError: a shape or dtype differs; fields `key`, `expected`, `found`.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> a, b = (StateDictPlan({"w": build.live(name, TensorSpec([2], "float32"))}) for name in "ab")
        >>> combine("mean", a, b)["w"].fn
        'funcmodel.run.functions:mean'
    """
    if not plans:
        raise PlanError("combine needs at least one plan")
    name = function_name(fn)
    first, *others = [dict(plan.items()) for plan in plans]
    for other in others:
        _require_same_keys(first, other)
    refuse_quantized(plans[0], first, "combine")
    entries: dict[str, Expr] = {}
    for key, expr in first.items():
        spec = spec_of(expr)
        args = [expr]
        for other in others:
            args.append(other[key])
            found = spec_of(args[-1])
            if found is not spec and found != spec:
                raise ShapeError(
                    f"{key!r} is {spec} in the first plan and {found} in another; cast or resize before combining",
                    key=key,
                    expected=spec,
                    found=found,
                )
        if name == _MEAN and (spec.dtype.kind not in ("float", "complex") or spec.dtype.pack > 1):
            raise PlanError(
                f"the mean of {key!r} has no place in {spec.dtype}; drop it from all plans and overlay the one to keep",
                keys=(key,),
            )
        entries[key] = build.call(name, args, spec)
    return StateDictPlan(entries)


def _require_same_keys(first: Mapping[str, Expr], other: Mapping[str, Expr]) -> None:
    if first.keys() == other.keys():
        return
    missing = tuple(key for key in first if key not in other)
    unexpected = tuple(key for key in other if key not in first)
    raise KeyMismatchError(
        f"a plan to combine has other keys than the first: missing {', '.join(missing[:5]) or 'none'} "
        f"({len(missing)}), unexpected {', '.join(unexpected[:5]) or 'none'} ({len(unexpected)})",
        keys=(*missing, *unexpected),
        report=LoadReport(missing_keys=missing, unexpected_keys=unexpected),
    )


_MEAN: Final = "funcmodel.run.functions:mean"


def function_name(fn: str | Callable[..., object]) -> str:
    """How a plan names a function: "pkg.mod:name".

    Raises:
        PlanError: no module-level function has that name, or the text is no such name.

    Example:
        >>> function_name("mean"), function_name(get_close_matches)
        ('funcmodel.run.functions:mean', 'difflib:get_close_matches')
    """
    if isinstance(fn, str):
        module, colon, name = ("", "", "") if fn == "mean" else fn.partition(":")
        if fn == "mean":
            return _MEAN
        if colon and name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
            return fn
        raise PlanError(f"not the name of a function: {fn!r}; write 'mean' or 'package.module:function'", function=fn)
    module, name = str(getattr(fn, "__module__", "")), str(getattr(fn, "__qualname__", ""))
    if getattr(sys.modules.get(module), name, None) is not fn:
        raise PlanError(
            f"{fn!r} cannot be named in a plan; a plan is data, so define the function at the top of a module",
            function=fn,
        )
    return f"{module}:{name}"
