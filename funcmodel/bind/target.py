"""A plan against the module as it is now: which object gets which value, and what stands in the way."""

from typing import Any

import torch
from attrs import define, field
from torch import nn

from funcmodel.bind.inspect import PARAMETER, Leaves, aliases, walk
from funcmodel.core.shapes import spec_of
from funcmodel.errors import PlanError, StalePlanError
from funcmodel.records.actions import Assign, Initialize, Move, Offload, Tie
from funcmodel.records.devices import Device
from funcmodel.records.expressions import Expr, Read
from funcmodel.records.module import TiedGroup, ViewSpec
from funcmodel.records.plans import LoadPlan
from funcmodel.run.tensors import tensor_spec, torch_device


@define(eq=False)
class Target:
    """What a plan asks of a module, resolved to objects.

    Attributes:
        leaves: the module as it is now.
        at: key to position among the leaves.
        assigned: key to action, for parameters and buffers.
        states: key to action, for tensors of extra state.
        drawn: initializations to run.
        moved: key to the device that a leaf goes to with the value it has.
        offloaded: key to expression, for leaves that stay on disk.
        retied: key to the key whose object it becomes, where they are different objects now.
        rivals: `(key, to, expr)`: what the source holds for a tied key must equal what its twin receives.
        twins: key that receives a value to keys of other objects that cover the same elements.
        views: key to what it is a view of.
    """

    leaves: Leaves
    at: dict[str, int]
    assigned: dict[str, Assign] = field(factory=dict)
    states: dict[str, Assign] = field(factory=dict)
    drawn: list[Initialize] = field(factory=list)
    moved: dict[str, torch.device] = field(factory=dict)
    offloaded: dict[str, Expr] = field(factory=dict)
    retied: dict[str, str] = field(factory=dict)
    rivals: list[tuple[str, str, Expr]] = field(factory=list)
    twins: dict[str, tuple[str, ...]] = field(factory=dict)
    views: dict[str, ViewSpec] = field(factory=dict)

    def tensor(self, key: str) -> torch.Tensor:
        """The leaf under a key."""
        found = self.leaves.tensors[self.at[key]]
        assert found is not None
        return found

    def slot(self, key: str) -> tuple[dict[str, Any], str]:
        """The dictionary that holds the leaf, and its name there."""
        position = self.at[key]
        owner, name = self.leaves.owners[position], self.leaves.names[position]
        return owner._parameters if name in owner._parameters else owner._buffers, name


def resolved(plan: LoadPlan, module: nn.Module) -> Target:
    """What `plan` asks of `module`.

    Raises:
        StalePlanError: the module has other keys, shapes or ties than it had when it was planned.
        PlanError: a leaf would stay without a value, or nothing is known that could draw one.
    """
    leaves = walk(module)
    target = Target(leaves, {key: position for position, key in enumerate(leaves.keys)})
    claims: dict[int, str] = {}
    ties: list[Tie] = []
    unplaced: set[int] = set()
    assigned, at, tensors, roles = target.assigned, target.at, leaves.tensors, leaves.roles
    for action in plan.actions:
        if type(action) is Assign:
            # The plain case, first and in place: there may be 100,000 of them.
            key, expr = action.key, action.expr
            position = at.get(key)
            tensor = None if position is None else tensors[position]
            if (
                type(expr) is Read
                and position is not None
                and tensor is not None
                and roles[position] is PARAMETER
                and tensor.shape == expr.spec.shape
                and claims.setdefault(id(tensor), key) is key
            ):
                assigned[key] = action
            else:
                _assign(action, target, claims)
            continue
        match action:
            case Initialize():
                _initialize(action, target, claims)
            case Move(key, device):
                _keep(key, device, target, claims)
            case Tie():
                ties.append(action)
            case Offload(key, expr):
                unplaced.add(id(_leaf(key, target)))
                target.offloaded[key] = expr
    _tie(ties, target, claims, unplaced)
    _require_values(module, target, claims, unplaced)
    return target


def _leaf(key: str, target: Target) -> torch.Tensor:
    position = target.at.get(key)
    tensor = None if position is None else target.leaves.tensors[position]
    if tensor is None:
        raise StalePlanError(f"the module has no leaf {key!r}, which the plan names; plan again", keys=(key,))
    return tensor


def _claim(key: str, tensor: torch.Tensor, claims: dict[int, str]) -> None:
    other = claims.setdefault(id(tensor), key)
    if other is not key:
        raise StalePlanError(
            f"{key!r} and {other!r} are one tensor in the module and two in the plan; plan again", keys=(other, key)
        )


def _assign(action: Assign, target: Target, claims: dict[int, str]) -> None:
    key, expr = action.key, action.expr
    tensor = _leaf(key, target)
    if target.leaves.roles[target.at[key]].kind == "extra_state":
        target.states[key] = action
        return
    spec = expr.spec if type(expr) is Read else spec_of(expr)
    if tensor.shape != spec.shape and tensor_spec(tensor).shape != spec.shape:
        found = tensor_spec(tensor)
        raise StalePlanError(
            f"{key!r} has shape {list(found.shape)} in the module and {list(spec.shape)} in the plan; plan again",
            keys=(key,),
            expected=spec,
            found=found,
        )
    _claim(key, tensor, claims)
    target.assigned[key] = action


def _initialize(action: Initialize, target: Target, claims: dict[int, str]) -> None:
    for key in action.keys:
        if action.how == "constructor":
            _keep(key, action.device, target, claims)
        else:
            _claim(key, _leaf(key, target), claims)
    if action.how is None:
        raise PlanError(
            f"nothing is known that could draw {', '.join(action.keys)}; pass init={{template: function}}",
            keys=action.keys,
        )
    if action.how != "constructor":
        target.drawn.append(action)


def _keep(key: str, device: Device, target: Target, claims: dict[int, str]) -> None:
    tensor = _leaf(key, target)
    _claim(key, tensor, claims)
    if tensor.is_meta:
        raise PlanError(f"{key!r} is on meta: there is no value that it could keep", keys=(key,))
    where = torch_device(device)
    if not same_device(tensor.device, where):
        target.moved[key] = where


def same_device(found: torch.device, wanted: torch.device) -> bool:
    """Whether a tensor there is where it should be; a device without an index is any of its kind."""
    return found.type == wanted.type and wanted.index in (None, found.index)


# -- ties, views, holes ----------------------------------------------------------------------------------------------


def _tie(ties: list[Tie], target: Target, claims: dict[int, str], unplaced: set[int]) -> None:
    stored: dict[str, TiedGroup] = {}
    if any(tensor is not None and not tensor.is_meta for tensor in target.leaves.tensors):
        shared = aliases(target.leaves)
        target.views = shared.views
        stored = {key: group for group in shared.tied if group.by == "storage" for key in group.keys}
    for tie in ties:
        one, other = _leaf(tie.key, target), _leaf(tie.to, target)
        if tie.expr is not None:
            target.rivals.append((tie.key, tie.to, tie.expr))
        if id(other) in unplaced:
            unplaced.add(id(one))
        if one is other or (tie.key in stored and stored[tie.key] is stored.get(tie.to)):
            continue
        if one.shape != other.shape:
            raise StalePlanError(
                f"{tie.key!r} and {tie.to!r} cannot be tied: {list(one.shape)} and {list(other.shape)}; plan again",
                keys=(tie.to, tie.key),
            )
        _claim(tie.key, one, claims)
        target.retied[tie.key] = tie.to
    for group in dict.fromkeys(stored.values()):
        _twins(group, target, claims)


def _twins(group: TiedGroup, target: Target, claims: dict[int, str]) -> None:
    objects = {id(target.tensor(key)): key for key in reversed(group.keys)}
    taken = [claims[found] for found in objects if found in claims]
    if len(taken) > 1:
        raise StalePlanError(
            f"{' and '.join(map(repr, taken))} are one tensor in the module and two in the plan; plan again",
            keys=tuple(taken),
        )
    if taken:
        claimed = id(target.tensor(taken[0]))
        target.twins[taken[0]] = tuple(key for found, key in objects.items() if found != claimed)


def _require_values(module: nn.Module, target: Target, claims: dict[int, str], unplaced: set[int]) -> None:
    holes = tuple(
        key
        for key, tensor in zip(target.leaves.keys, target.leaves.tensors, strict=True)
        if tensor is not None and tensor.is_meta and id(tensor) not in claims and id(tensor) not in unplaced
    )
    if holes:
        raise PlanError(
            f"{type(module).__name__}: the plan leaves {', '.join(holes[:8])}{', ...' if len(holes) > 8 else ''} "
            "on meta; plan an action for every leaf",
            keys=holes,
        )
