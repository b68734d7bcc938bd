"""Loading, as a plan: `plan_load` says what would happen to every leaf of a module, `checked` refuses what may not.

`plan_load` never refuses a checkpoint: what it finds ends up in the plan and its report. `checked` changes nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from funcmodel.core.build import cast
from funcmodel.core.casts import loss
from funcmodel.core.shapes import spec_of
from funcmodel.core.templates import Matcher
from funcmodel.errors import KeyMismatchError, PlanError
from funcmodel.plan.findings import Help, companions_in, help_for, mismatch_message, source_text
from funcmodel.plan.fresh import Initializer, chosen, drawn
from funcmodel.plan.homes import homes
from funcmodel.plan.ties import canonical
from funcmodel.records.actions import Assign, Initialize, LoadAction, Offload, Tie
from funcmodel.records.devices import Device, DeviceMap
from funcmodel.records.dtypes import DType
from funcmodel.records.expressions import Expr, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import ModuleSpec, ParamSpec
from funcmodel.records.plans import LoadPlan
from funcmodel.records.reports import DtypeChange, LoadPolicy, LoadReport, Mismatch


def plan_load(
    spec: ModuleSpec,
    source: Mapping[str, Expr],
    *,
    device_map: DeviceMap | Mapping[str, object] | object | None = None,
    init: Initializer | Mapping[str, Initializer] | None = None,
    seed: int = 0,
    dtype: Literal["file", "module"] = "file",
) -> LoadPlan:
    """What loading `source` into a module would do, leaf by leaf. It always plans; `checked` refuses.

    Ties are resolved: the canonical leaf is assigned from whichever of its names the source holds (its own, where there
    is a choice), the others are tied to it. What no source holds is drawn afresh or, for a buffer with a value, kept.

    Args:
        spec: the module.
        source: key -> expression, for example a `StateDictPlan`.
        device_map: where leaves go: a `DeviceMap`, a mapping of prefixes, or one device for everything. The longest
            prefix on a dot boundary wins, "" is the default. None: where the module's tensor is; meta goes to the CPU.
            On "disk" a leaf is offloaded.
        init: what draws missing leaves: a module-level function `(key, spec, generator) -> tensor` or its name
            "pkg.mod:function", "reset_parameters", "_init_weights" or "constructor" (keep the value), for all of them
            or by template (the first that matches). Where it says nothing, the submodule's own initializer does.
        seed: from which, with the key, every drawn leaf gets a seed of its own.
        dtype: "file" lets a leaf take the source's dtype, "module" plans a cast to the module's. A change of kind
            (float, int, bool, complex) is never cast.

    Returns:
        The plan: initializations, assignments, moves and ties, each in module order, and the report on them.

    Raises:
        PlacementError: a device map that leaves a leaf without a place, names nothing in the module, or separates ties.
        PlanError: `init` is no module-level function and no known name.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> from funcmodel.records.tensors import TensorSpec
        >>> weight = TensorSpec([2, 3], "float32")
        >>> net = ModuleSpec(name="Net", params={"w": ParamSpec(spec=weight), "b": ParamSpec(spec=weight)})
        >>> plan = plan_load(net, {"w": Live("w", weight)}, device_map="cuda:0")
        >>> plan, plan.actions[-1].device, plan.report.missing_keys
        (<LoadPlan: 2 actions, 1 missing>, cuda:0, ('b',))
    """
    if dtype not in ("file", "module"):
        raise PlanError(f"dtype must be 'file' or 'module', found {dtype!r}", found=dtype)
    held = dict(source.items())
    places = homes(spec, device_map)
    canonical(spec.tied)  # refuses a key in two groups
    match = _matched(spec, held, places, dtype)
    fresh = drawn(spec, match.fresh, places, chosen(init), seed)
    unexpected, ignored = _unexpected(spec, held)
    found = bool(match.missing or unexpected or match.mismatched)
    missing = tuple(match.missing)
    mismatched = tuple(match.mismatched)
    extra = help_for(spec, held, missing, unexpected, mismatched) if found else Help()
    report = LoadReport(
        missing_keys=missing,
        unexpected_keys=unexpected,
        mismatched_keys=mismatched,
        tied_keys=tuple((tie.key, tie.to) for tie in match.ties),
        initialized_keys=fresh.keys,
        skipped_keys=(*match.skipped, *ignored),
        dtype_changes=tuple(match.changes),
        meta_keys=fresh.meta,
        companion_keys=companions_in(spec, held, unexpected),
        hints=extra.hints,
        near_misses=extra.near_misses,
    )
    actions: tuple[LoadAction, ...] = (*fresh.draws, *match.assigns, *fresh.moves, *match.ties)
    text = source_text(held) if found else ""
    return LoadPlan(actions, report, spec.name, text, _replaced(spec, places, fresh.kept))


def _replaced(spec: ModuleSpec, places: dict[str, Device], kept: frozenset[str]) -> FrozenMap[Device, int]:
    """Bytes of present tensors that stay allocated until their successors take their place."""
    sizes: dict[Device, int] = {}
    twins = {key for group in spec.tied for key in group.keys[1:]}
    for key, leaf in spec.params.items():
        at = leaf.device
        if at is not None and key not in twins and key not in spec.views and (key not in kept or places[key] != at):
            sizes[at] = sizes.get(at, 0) + leaf.spec.nbytes
    return FrozenMap(sizes)


# -- leaves ----------------------------------------------------------------------------------------------------------


class _Match(NamedTuple):
    """What one walk over the module found; the lists grow during the walk and are frozen by the caller."""

    cast: bool
    changed: dict[tuple[DType, DType], DtypeChange]
    assigns: list[Assign | Offload]
    ties: list[Tie]
    fresh: list[str]
    missing: list[str]
    mismatched: list[Mismatch]
    skipped: list[str]
    changes: list[DtypeChange]


def _matched(spec: ModuleSpec, held: dict[str, Expr], places: dict[str, Device], dtype: str) -> _Match:
    match = _Match(dtype == "module", {}, [], [], [], [], [], [], [])
    tied = {key: group.keys for group in spec.tied for key in group.keys}
    saved = {key: tuple(k for k in keys if spec.params[k].persistent) for key, keys in tied.items() if key == keys[0]}
    ignorable = Matcher(spec.traits.ignore_missing) if spec.traits.ignore_missing else None
    assigns, get = match.assigns, held.get
    for key, leaf in spec.params.items():
        names, home = tied.get(key), places[key]
        own = get(key) if leaf.persistent else None
        # The plain case, first and in place: there may be 100,000 of them.
        if names is None and type(own) is Read and own.spec == leaf.spec and home.type != "disk":
            assigns.append(Assign(key, own, home))
            continue
        name = key
        if names is not None:
            if names[0] != key:
                continue
            if own is None:
                name = next((n for n in saved[key] if n in held), key)
                own = get(name) if name in saved[key] else None
        expr = None if own is None else _fitted(name, own, leaf, match)
        if own is None:
            _absent(saved.get(key, (key,) if leaf.persistent else ()), ignorable, match)
        if expr is None:
            match.fresh.append(key)
        elif home.type == "disk":
            assigns.append(Offload(key, expr, type(expr) is not Read))
        else:
            assigns.append(Assign(key, expr, home))
        if names is not None:
            match.ties.extend(_ties(spec, held, names, saved[key], name, match))
    if tied:
        # A group was dealt with where its first name stands.
        place = {key: at for at, key in enumerate(spec.params)}.__getitem__
        match.missing.sort(key=place)
        match.skipped.sort(key=place)
        match.ties.sort(key=lambda tie: place(tie.key))
        match.mismatched.sort(key=lambda mismatch: place(mismatch.key))
        match.changes.sort(key=lambda change: place(change.key))
    return match


def _absent(names: tuple[str, ...], ignorable: Matcher | None, match: _Match) -> None:
    for name in names:
        ignored = ignorable is not None and ignorable.first(name) is not None
        (match.skipped if ignored else match.missing).append(name)


def _fitted(name: str, expr: Expr, leaf: ParamSpec, match: _Match) -> Expr | None:
    """The expression as the leaf takes it, or None where the shape is another; findings go to `match`."""
    wanted = leaf.spec
    found = expr.spec if type(expr) is Read else spec_of(expr)
    if found is wanted or found == wanted or leaf.kind == "extra_state":
        return expr
    if found.shape != wanted.shape:
        match.mismatched.append(Mismatch(name, wanted, found))
        return None
    pair = found.dtype, wanted.dtype
    like = match.changed.get(pair)
    if like is None:
        # Whatever a cast to another kind may lose, it is never made silently, not even from int to a wider float.
        lost = loss(*pair) if pair[0].kind == pair[1].kind else "kind"
        like = match.changed[pair] = DtypeChange("", pair[1], pair[0], lost, match.cast and lost != "kind")
    match.changes.append(DtypeChange(name, like.expected, like.found, like.loss, like.cast))
    return cast(expr, wanted.dtype) if like.cast else expr


def _ties(
    spec: ModuleSpec,
    held: dict[str, Expr],
    names: tuple[str, ...],
    saved: tuple[str, ...],
    taken: str,
    match: _Match,
) -> Iterator[Tie]:
    """`names[1:]` tied to `names[0]`; what the source holds under names other than `taken` must have the same value."""
    rivals: dict[str, Expr | None] = {}
    for name in saved:
        expr = held.get(name)
        if expr is not None and name != taken:
            match.skipped.append(name)
            if expr != held[taken]:
                rivals[name] = _fitted(name, expr, spec.params[name], match)
    for name in names:
        if name != names[0]:
            yield Tie(name, names[0], rivals.get(name))


def _unexpected(spec: ModuleSpec, held: dict[str, Expr]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys of the source that nothing wants, and those that the class declares ignorable."""
    known = spec.params.keys()
    hidden = {key for key, leaf in spec.params.items() if not leaf.persistent}
    surplus = [key for key in held if key not in known or key in hidden]
    templates = spec.traits.ignore_unexpected
    if not surplus or not templates:
        return tuple(surplus), ()
    matches = Matcher(templates).first
    ignored = {key for key in surplus if matches(key) is not None}
    return tuple(k for k in surplus if k not in ignored), tuple(k for k in surplus if k in ignored)


# -- refusing ----------------------------------------------------------------------------------------------------------


def checked(plan: LoadPlan, policy: LoadPolicy = LoadPolicy()) -> LoadPlan:
    """The same plan, unless the policy forbids something it found.

    Two things no policy allows: a source that shares no key with the module, and a change of kind (float, int, bool,
    complex) that the caller did not plan. An unexpected scale of a quantized weight needs a literal waiver.

    Args:
        plan: from `plan_load`.
        policy: what is allowed; nothing by default.

    Raises:
        KeyMismatchError: keys or shapes do not fit, or a waiver matched nothing; all findings at once, with hints.
        PlanError: a leaf would have no value, or a dtype changes against the policy; `keys` names them.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> from funcmodel.records.tensors import TensorSpec
        >>> weight = TensorSpec([2, 3], "float32")
        >>> net = ModuleSpec(name="Net", params={"w": ParamSpec(spec=weight)})
        >>> plan = plan_load(net, {"w": Live("w", weight), "x": Live("x", weight)})
        >>> checked(plan, LoadPolicy(allow=("unexpected:x",))) is plan
        True
        >>> checked(plan)
        Traceback (most recent call last):
        ...
        funcmodel.errors.KeyMismatchError: Net does not match its source (1 unexpected)
          unexpected  x
          hint        drop("x")
    """
    report = plan.report
    mismatched = tuple(m.key for m in report.mismatched_keys)
    refused, unused = _refused(policy, report, mismatched)
    overlap = len(mismatched) or any(isinstance(action, Assign | Offload) for action in plan.actions)
    empty = not overlap and bool(report.missing_keys or report.unexpected_keys or report.initialized_keys)
    if refused or unused or empty:
        keys = (*report.missing_keys, *report.unexpected_keys) if empty else refused
        raise KeyMismatchError(
            mismatch_message(plan, frozenset(keys), unused, overlap=not empty),
            report=report,
            hints=report.hints,
            unused=unused,
            keys=keys,
        )
    _require_values(plan)
    _require_dtypes(report.dtype_changes, policy)
    return plan


def _refused(
    policy: LoadPolicy, report: LoadReport, mismatched: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys that are not allowed, and waivers that matched nothing."""
    refused: list[str] = []
    unused: list[str] = []
    companions = frozenset(report.companion_keys)
    for kind, keys, default in (
        ("missing", report.missing_keys, policy.missing == "init"),
        ("unexpected", report.unexpected_keys, policy.unexpected == "ignore"),
        ("mismatched", mismatched, policy.mismatched == "init"),
    ):
        waivers = [w for w in policy.allow if w.kind == kind]
        if not waivers:
            refused += keys if not default else [key for key in keys if key in companions]
            continue
        find = Matcher(w.template for w in waivers)
        literal = [not parsed.fields for parsed in find.templates]
        used: set[int] = set()
        for key in keys:
            matches = [at for at, _ in find.values(key)]
            used.update(matches)
            allowed = any(literal[at] for at in matches) if key in companions else default or bool(matches)
            if not allowed:
                refused.append(key)
        unused += [f"{w.kind}:{w.template}" for at, w in enumerate(waivers) if at not in used]
    return tuple(refused), tuple(unused)


def _require_values(plan: LoadPlan) -> None:
    report = plan.report
    if report.meta_keys:
        raise PlanError(
            f"{plan.name}: {_some(report.meta_keys)} on meta, not in the state dict, so no checkpoint has a value; "
            "build the module with skeleton, or pass init={template: function}",
            keys=report.meta_keys,
        )
    if not report.initialized_keys:
        return
    keys = tuple(key for a in plan.actions if isinstance(a, Initialize) and a.how is None for key in a.keys)
    if keys:
        raise PlanError(
            f"{plan.name}: nothing is known that could draw {_some(keys)}; pass init={{template: function}}", keys=keys
        )


def _require_dtypes(changes: tuple[DtypeChange, ...], policy: LoadPolicy) -> None:
    refused = tuple(
        change
        for change in changes
        if change.loss == "kind" or policy.dtype == "error" or (policy.dtype == "module" and not change.cast)
    )
    if refused:
        first = refused[0]
        raise PlanError(
            f"dtype of {_some(c.key for c in refused)}: expected {first.expected}, found {first.found}; "
            "plan the cast (cast(dtype, where=...) on the source, or plan_load(..., dtype='module'))",
            keys=tuple(c.key for c in refused),
            changes=refused,
        )


def _some(keys: Iterable[str]) -> str:
    listed = tuple(keys)
    return listed[0] if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more"
