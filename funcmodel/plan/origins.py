"""Where every leaf of a module comes from."""

from collections.abc import Iterator
from typing import assert_never

from funcmodel.core.lowering import has_call, leaves
from funcmodel.errors import PlanError
from funcmodel.records.actions import (
    Assign,
    Initialize,
    LoadAction,
    Move,
    Offload,
    Tie,
)
from funcmodel.records.expressions import Expr, Live, Noise, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import ModuleSpec
from funcmodel.records.plans import LoadPlan
from funcmodel.records.reports import Origin, OriginKind


def origins(spec: ModuleSpec, plan: LoadPlan) -> FrozenMap[str, Origin]:
    """Where every leaf of a module comes from: every parameter, every buffer (persistent or not), every extra state.

    Args:
        spec: the module.
        plan: from `plan_load` for this module.

    Raises:
        PlanError: a leaf has no origin, or two; `keys` names them.

    Example:
        >>> from funcmodel.records.devices import CPU
        >>> from funcmodel.records.module import ParamSpec
        >>> from funcmodel.records.tensors import TensorSpec
        >>> net = ModuleSpec(name="Net", params={"w": ParamSpec(spec=TensorSpec([2], "float32"))})
        >>> origins(net, LoadPlan((Assign("w", Live("w", TensorSpec([2], "float32")), CPU),)))["w"]
        Origin(kind='live', sources=('w',))
    """
    found: dict[str, Origin] = {}
    twice: list[str] = []
    for action in plan.actions:
        for key, origin in _origins(spec, action):
            if key in found:
                twice.append(key)
            found[key] = origin
    found.update((key, Origin("extra_state")) for key in spec.opaque)
    lost = [key for key in spec.params if key not in found]
    if lost or twice:
        keys = (*lost, *twice)
        raise PlanError(
            f"{spec.name}: {keys[0]!r} has {'no origin' if lost else 'two origins'} ({len(keys)} such leaves); "
            "plan_load the module that is to be loaded",
            keys=keys,
        )
    return FrozenMap({key: found[key] for key in (*spec.params, *spec.opaque)})


def _origins(spec: ModuleSpec, action: LoadAction) -> Iterator[tuple[str, Origin]]:
    match action:
        case Assign(key, expr) | Offload(key, expr):
            yield key, origin_of(expr)
        case Tie(key, to):
            yield key, Origin("alias", (to,))
        case Move(key):
            yield key, _constructed(spec, key)
        case Initialize(_, keys, how):
            for key in keys:
                if how == "constructor":
                    yield key, _constructed(spec, key)
                elif how is not None:
                    yield key, Origin("init", (how,))
        case _:
            assert_never(action)


def _constructed(spec: ModuleSpec, key: str) -> Origin:
    leaf = spec.params.get(key)
    seed = leaf.random_seed if leaf is not None else None
    return Origin("constructor") if seed is None else Origin("random", (str(seed),))


def origin_of(expr: Expr) -> Origin:
    """The origin of one expression: the most telling kind of leaf it has.

    Example:
        >>> from funcmodel.records.expressions import Full
        >>> from funcmodel.records.tensors import TensorSpec
        >>> origin_of(Full(TensorSpec([2], "float32"), 0.0))
        Origin(kind='constant', sources=())
    """
    if type(expr) is Read:
        return Origin("file", (f"{expr.file.path}:{expr.name}",))
    files: dict[str, None] = {}
    lives: dict[str, None] = {}
    kinds: set[type] = set()
    for leaf in leaves(expr):
        kinds.add(type(leaf))
        if isinstance(leaf, Read):
            files[f"{leaf.file.path}:{leaf.name}"] = None
        elif isinstance(leaf, Live):
            lives[leaf.key] = None
    kind: OriginKind
    if has_call(expr):
        kind = "computed"
    else:
        kind = "file" if files else "live" if lives else "noise" if Noise in kinds else "constant"
    return Origin(kind, (*files, *lives))
