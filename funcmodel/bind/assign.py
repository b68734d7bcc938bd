"""The interpreter of a `LoadPlan`: everything that can fail first, then one commit, whole or undone."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Literal, TypeAlias

import torch
from torch import nn

from funcmodel.bind.commit import Commit
from funcmodel.bind.initialize import initialize
from funcmodel.bind.inspect import PARAMETER
from funcmodel.bind.skeleton import forget_draws
from funcmodel.bind.target import Target, resolved, same_device
from funcmodel.core.build import index
from funcmodel.core.limits import check_choice
from funcmodel.core.shapes import spec_of
from funcmodel.errors import ActionError, DigestError, PlanError, StalePlanError, TieConflictError
from funcmodel.plan.routing import Wanted, routed
from funcmodel.records.actions import Assign
from funcmodel.records.devices import Device
from funcmodel.records.expressions import Expr
from funcmodel.records.plans import LoadPlan
from funcmodel.records.routes import Memory, Routing
from funcmodel.run.checks import LiveTensors
from funcmodel.run.evaluate import evaluate, fill_routed, how_to_look, materialize_routed, stored_files, stream
from funcmodel.run.files import Digest, Hashed
from funcmodel.run.formats import FORMATS, Format
from funcmodel.run.tensors import tensor_spec, torch_device

Values: TypeAlias = dict[str, torch.Tensor]

_COMPARED: Final = 16 << 20  # bytes of a tensor that are compared at a time


def assign(
    plan: LoadPlan,
    module: nn.Module,
    *,
    commit: Literal["swap", "in_place"] = "swap",
    live: LiveTensors | None = None,
    formats: tuple[Format, ...] = FORMATS,
    preflight: Literal["headers", "read"] = "headers",
    digest: Literal["ignore", "check"] = "ignore",
) -> nn.Module:
    """Carry a plan out on a module.

    Every Parameter and buffer object survives, with its class, attributes and `requires_grad` (an integer tensor
    requires none), so ties and whatever else holds the objects keep working; its storage is a new one under "swap", the
    old one under "in_place". Leaves on meta have no storage to keep and receive a new one in both modes.

    Args:
        plan: the plan; one without routes takes those that `probed` gives.
        module: the module it was planned for; changed in place.
        commit: "swap" builds every tensor beside the module and then moves pointers: after any error, also an
            interrupt, the module is bit for bit what it was. "in_place" writes into the existing storage and needs
            little memory beside it.
        live: tensors for the `Live` leaves of the plan; copied, never kept.
        formats: the formats that files may have.
        preflight: "read" reads every byte once before the first one is overwritten; matters "in_place" only.
        digest: "check" hashes every stored tensor of which the plan reads anything, and compares it with the digest
            that is recorded of it, before the module is touched, in both modes.

    Returns:
        The same module.

    Raises:
        StalePlanError: the module or a file is not what was planned.
        PlanError: a leaf would stay without a value, or cannot be filled in place.
        TieConflictError: leaves that are one tensor would get two values.
        DigestError: a stored tensor is not what was recorded, or nothing is recorded of it; the module is untouched.
        CheckpointError: a file cannot be read.
        ActionError: writing in place failed; `torn` names what may hold part of its new value. An interrupt, or another
            exception that is to end the program, keeps its type and has the same attributes `done` and `torn`.

    Example:
        >>> from funcmodel.bind.inspect import module_spec
        >>> from funcmodel.core.build import full
        >>> from funcmodel.plan.loading import plan_load
        >>> net = nn.Linear(2, 1, bias=False)
        >>> plan = plan_load(module_spec(net), {"weight": full(module_spec(net).params["weight"].spec, 3.0)})
        >>> assign(plan, net).weight.tolist()
        [[3.0, 3.0]]
    """
    check_choice("commit", commit, ("swap", "in_place"))
    check_choice("preflight", preflight, ("headers", "read"))
    routes = plan.routing or probed(plan, commit=commit, formats=formats).routing
    assert routes is not None
    if commit == "in_place":
        _require_existing(routes)
    target = resolved(plan, module)
    read = _Reader(live, formats, Hashed() if digest == "check" else digest, routes)
    with _ordinary():
        beside = _drawn(target, module)
    if commit == "swap":
        with _ordinary():
            _swap(target, read, beside)
    else:
        _in_place(target, read, beside, preflight)
    for key in (*target.assigned, *beside):
        position = target.at[key]
        if target.leaves.roles[position] is not PARAMETER:
            forget_draws(target.leaves.owners[position], target.leaves.names[position])
    return module


def probed(
    plan: LoadPlan,
    *,
    commit: Literal["swap", "in_place"] = "swap",
    memory: Memory = "own",
    route: Wanted = None,
    formats: tuple[Format, ...] = FORMATS,
) -> LoadPlan:
    """A load plan with the routes that suit this machine and the files as they are now; looks at them, and reads none.

    Args:
        plan: from `plan_load`.
        commit: as it will be given to `apply`.
        memory: as in `routing`.
        route: as in `routing`.
        formats: the formats that files may have.

    Raises:
        PlanError: a route is asked for that a key cannot take, or a template matches nothing.

    Example:
        >>> from funcmodel.bind.inspect import module_spec
        >>> from funcmodel.core.build import full
        >>> from funcmodel.plan.loading import plan_load
        >>> net = nn.Linear(2, 1, bias=False)
        >>> plan = plan_load(module_spec(net), {"weight": full(module_spec(net).params["weight"].spec, 3.0)})
        >>> dict(probed(plan).routing.routes)
        {'weight': 'transform'}
    """
    from funcmodel.run.machine import machine

    exprs = [action.expr for action in plan.actions if type(action) is Assign]
    found = machine(stored_files(exprs), formats=formats, **how_to_look(exprs, memory, route))
    return routed(plan, found, commit=commit, memory=memory, route=route)


def _require_existing(routes: Routing) -> None:
    keys = tuple(key for key, route in routes.routes.items() if route in ("map", "slab"))
    if keys:
        raise PlanError(
            f"{keys[0]!r} and {len(keys) - 1} more are routed into fresh memory; "
            "route the plan with commit='in_place', or apply it with commit='swap'",
            keys=keys,
        )


class _Reader:
    """What evaluating expressions needs besides them."""

    def __init__(self, live: LiveTensors | None, formats: tuple[Format, ...], digest: Digest, routes: Routing) -> None:
        self.live = live
        self.formats = formats
        self.digest = digest
        self.routes = routes

    def values(self, target: Target, keys: Iterable[str]) -> Values:
        """The planned tensors of `keys`, each on its device."""
        known: dict[Device, torch.device] = {}
        exprs: dict[str, Expr] = {}
        homes: dict[str, torch.device] = {}
        last: Device | None = None
        for key in keys:
            action = target.assigned.get(key) or target.states[key]
            exprs[key] = action.expr
            if action.device is not last:  # 20,000 keys name the same record
                last = action.device
                where = known.setdefault(last, torch_device(last))
            homes[key] = where
        if not exprs:
            return {}
        on = homes if len(known) > 1 else where
        return materialize_routed(exprs, self.routes, on, self.live, self.formats, self.digest)

    def agree(self, expr: Expr, other: Expr | torch.Tensor) -> bool:
        """Whether both are the same tensor, bit for bit; a part of each is held at a time."""
        spec = spec_of(expr)
        if spec != (tensor_spec(other) if isinstance(other, torch.Tensor) else spec_of(other)):
            return False
        if spec.ndim < 2 or not spec.numel:
            return _equal(self._part(expr, ()), self._part(other, ()))
        rows = max(1, _COMPARED * spec.shape[0] // spec.nbytes)
        return all(
            _equal(self._part(expr, at), self._part(other, at))
            for start in range(0, spec.shape[0], rows)
            for at in [((start, min(start + rows, spec.shape[0])),)]
        )

    def _part(self, whole: Expr | torch.Tensor, at: tuple[tuple[int, int], ...]) -> torch.Tensor:
        if isinstance(whole, torch.Tensor):
            return whole.detach()[at[0][0] : at[0][1]].cpu() if at else whole.detach().cpu()
        return evaluate(index(whole, at) if at else whole, self.live, formats=self.formats, digest=self.digest)


def _ordinary() -> AbstractContextManager[object]:
    """New tensors are ordinary ones: a module that is loaded in inference mode is to be trained afterwards."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(one, other)


def _drawn(target: Target, module: nn.Module) -> Values:
    """What initializers draw, on its device. They run before anything is loaded."""
    return {
        key: value.to(torch_device(action.device))
        for action in target.drawn
        for key, value in initialize(module, action).items()
    }


# -- swap ------------------------------------------------------------------------------------------------------------


def _swap(target: Target, read: _Reader, beside: Values) -> None:
    values = read.values(target, target.assigned)
    values.update(beside)
    for key, device in target.moved.items():
        values[key] = target.tensor(key).detach().to(device)
    _require_agreement(target, read, values)
    _commit(target, read, values).make()


def _require_agreement(target: Target, read: _Reader, received: Mapping[str, Expr | torch.Tensor]) -> None:
    """Refuse a source that holds, for a tied key, something else than its twin receives.

    Raises:
        TieConflictError: it does.
    """
    if not target.rivals:
        return
    by_object = {id(target.tensor(key)): value for key, value in (*received.items(), *target.offloaded.items())}
    for key, to, expr in target.rivals:
        tensor = target.tensor(to)
        if not read.agree(expr, by_object.get(id(tensor), tensor)):
            raise _conflict(to, key)


def _commit(target: Target, read: _Reader, values: Values) -> Commit:
    """The changes that give every leaf its value."""
    commit = Commit()
    viewed = _rebased(target, values) if target.views else {}
    add, tensors, at, twins = commit.add, target.leaves.tensors, target.at, target.twins
    for key, value in values.items():
        if viewed and key in viewed:
            continue
        tensor = tensors[at[key]]
        assert tensor is not None
        add(tensor, value)
        if twins and key in twins:
            for twin in twins[key]:
                add(target.tensor(twin), value.detach())
    seen: set[int] = set()
    for key, value in viewed.items():
        tensor = target.tensor(key)
        if id(tensor) not in seen:
            seen.add(id(tensor))
            commit.add(tensor, value)
    for key, to in target.retied.items():
        commit.retie(*target.slot(key), target.tensor(to))
    for key, value in read.values(target, target.states).items():
        commit.restate(target.leaves.owners[target.at[key]], value)
    return commit


def _rebased(target: Target, values: Values) -> Values:
    """Views over the new storage of what they are a view of. Bases in `values` get the strides that views count on."""
    by_object = {id(target.tensor(key)): key for key in values}
    viewed: Values = {}
    bases: dict[str, list[str]] = {}
    for key, view in target.views.items():
        bases.setdefault(view.of, []).append(key)
    for base_key, keys in bases.items():
        old = target.tensor(base_key)
        held = _name_of(base_key, target, by_object)
        inner = [key for key in keys if key in values]
        if held is None and not inner:
            continue
        new = values[held] if held is not None else old.detach()
        base = torch.empty_strided(old.shape, old.stride(), dtype=new.dtype, device=new.device)
        base.copy_(new)
        for key in keys:
            view = target.views[key]
            viewed[key] = base.as_strided(target.tensor(key).shape, view.stride, view.offset)
        if held is None:
            for key in inner:
                _write_part(key, viewed[key], values[key])
        for key in inner:
            part, value = viewed[key], values[key]
            if part.dtype != value.dtype or not _equal(part, value.to(part.device)):
                raise _conflict(base_key, key)
        if held is None:
            viewed[base_key] = base
        else:
            values[held] = base
    return viewed


def _name_of(key: str, target: Target, by_object: dict[int, str]) -> str | None:
    """The name under which the object `key`, or one with the same elements, receives a value."""
    found = by_object.get(id(target.tensor(key)))
    if found is None:
        names = set(by_object.values())
        found = next((name for name, twins in target.twins.items() if key in twins and name in names), None)
    return found


def _write_part(key: str, part: torch.Tensor, value: torch.Tensor) -> None:
    if part.dtype != value.dtype or part.device != value.device:
        raise PlanError(
            f"{key!r} is part of another leaf and cannot become {value.dtype} on {value.device} alone", keys=(key,)
        )
    part.copy_(value)


def _conflict(to: str, key: str) -> TieConflictError:
    return TieConflictError(
        f"{to!r} and {key!r} share their elements in the module and differ in the source; "
        "drop one of them from the source, or untie them in the module",
        keys=(to, key),
    )


# -- in place --------------------------------------------------------------------------------------------------------


def _in_place(target: Target, read: _Reader, beside: Values, preflight: str) -> None:
    planned = {key: action.expr for key, action in target.assigned.items()} if target.rivals else {}
    _require_agreement(target, read, {**planned, **beside})
    fresh = [key for key in target.assigned if target.tensor(key).is_meta]
    doubled = _held_by_bases(target, read)
    exprs = {
        key: action.expr
        for key, action in target.assigned.items()
        if key not in doubled and not target.tensor(key).is_meta
    }
    with _ordinary():
        values = read.values(target, fresh)
    values.update((key, value) for key, value in beside.items() if target.tensor(key).is_meta)
    copied = {key: value for key, value in beside.items() if key not in values}
    into = {key: target.tensor(key) for key in (*exprs, *copied)}
    _require_in_place(target, exprs, into)
    commit = _commit(target, read, values)
    if preflight == "read":
        for _ in stream(exprs, live=read.live, formats=read.formats, digest=read.digest):
            pass
    _fill(exprs, into, read)
    try:
        with torch.no_grad():
            for key, value in copied.items():
                into[key].copy_(value)
        commit.make()
    except BaseException as error:
        _tell(error, done=tuple(exprs), torn=tuple(copied))
        raise


def _held_by_bases(target: Target, read: _Reader) -> set[str]:
    """Assigned keys that lie inside an assigned leaf, after a check that both would hold the same bytes there."""
    by_object = {id(target.tensor(key)): key for key in target.assigned} if target.views else {}
    held: set[str] = set()
    for key, view in target.views.items():
        base_key = _name_of(view.of, target, by_object)
        if key not in target.assigned or base_key is None:
            continue
        whole, part = (read.values(target, [name])[name] for name in (base_key, key))
        old = target.tensor(view.of)
        laid = torch.empty_strided(old.shape, old.stride(), dtype=whole.dtype).copy_(whole)
        inside = laid.as_strided(part.shape, view.stride, view.offset)
        if inside.dtype != part.dtype or not _equal(inside, part.cpu()):
            raise _conflict(base_key, key)
        held.add(key)
    return held


def _require_in_place(target: Target, exprs: Mapping[str, Expr], into: Values) -> None:
    """Refuse what existing storage cannot take: another dtype, another device.

    Raises:
        PlanError: it is asked to.
    """
    for key, expr in exprs.items():
        found, expected = tensor_spec(into[key]), spec_of(expr)
        if found.dtype is not expected.dtype:
            raise PlanError(
                f"{key!r} is {found.dtype} in the module and {expected.dtype} in the plan, which its storage cannot "
                "become; cast the source, load with LoadPolicy(dtype='module'), or use commit='swap'",
                keys=(key,),
                expected=expected,
                found=found,
            )
    leaving = tuple(target.moved) + tuple(
        key for key in exprs if not same_device(into[key].device, torch_device(target.assigned[key].device))
    )
    if leaving:
        raise PlanError(
            f"{', '.join(leaving[:8])} would change the device, which needs new storage; use commit='swap'",
            keys=leaving,
        )


def _fill(exprs: Mapping[str, Expr], into: Values, read: _Reader) -> None:
    try:
        fill_routed(exprs, read.routes, into, read.live, read.formats, read.digest)
    except (DigestError, PlanError, StalePlanError):
        # Raised before the first byte is written.
        raise
    except BaseException as error:
        _tell(error, done=(), torn=tuple(exprs))
        raise


def _tell(error: BaseException, *, done: tuple[str, ...], torn: tuple[str, ...]) -> None:
    """Say what a failed write in place left behind.

    By an `ActionError`; where the program is to end, by the same attributes and a note on what ends it.
    """
    some = ", ".join(torn[:8]) + (", ..." if len(torn) > 8 else "")
    message = f"writing in place failed; {len(done)} leaves hold their new value, these may hold part of it: {some}"
    if not isinstance(error, Exception):
        vars(error).update(done=done, torn=torn)
        error.add_note(message)
        return
    raise ActionError(f"{message} ({type(error).__name__}: {error})", done=done, torn=torn, cause=error) from error
