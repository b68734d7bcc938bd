"""Drawing exactly the missing leaves again, beside the module, by the module's own initializer or a function."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import nn

from funcmodel.bind.modes import recording
from funcmodel.bind.pending import tensors_in
from funcmodel.bind.recording import FrozenWriteError, derived_seed
from funcmodel.errors import PlanError
from funcmodel.records.actions import Initialize
from funcmodel.run.checks import function
from funcmodel.run.tensors import tensor_spec

# What fresh memory is filled with, once each: a leaf that comes out different was not written, or read what it was.
_FILLINGS: Final = (0xA5, 0x5A)


def initialize(module: nn.Module, action: Initialize) -> dict[str, torch.Tensor]:
    """Fresh values of exactly `action.keys`, on the CPU; the module is not touched.

    An initializer of the module runs on a shallow copy of the submodule, whose own leaves are fresh memory and whose
    children's are on meta. What it draws comes from generators seeded by the key and `action.seed`, so a value depends
    neither on what else is missing nor on the global generator. It runs twice, over different memory: so nothing that
    was never written can pass for a value.

    Args:
        module: the root module.
        action: what to draw, and how.

    Returns:
        Key to tensor, in the order of `action.keys`.

    Raises:
        PlanError: nothing is known that could draw the keys; the initializer leaves one of them unwritten, or makes
            it from a leaf that has no value yet, or writes outside the submodule; or a function returned something
            else than a tensor of the leaf's shape and dtype.

    Example:
        >>> from funcmodel.records.devices import CPU
        >>> action = Initialize("", ("bias",), "reset_parameters", 0, CPU)
        >>> first, second = (initialize(nn.Linear(3, 2), action)["bias"] for _ in range(2))
        >>> torch.equal(first, second)
        True
    """
    owner = submodule(module, action)
    match action.how:
        case None:
            raise PlanError(
                f"nothing is known that could draw {', '.join(action.keys)}; pass init={{template: function}}",
                keys=action.keys,
            )
        case "constructor":
            return {key: _kept(owner, key, action) for key in action.keys}
        case "reset_parameters":
            return _by_method(owner, action, _reset)
        case "_init_weights":
            return _by_method(owner, action, lambda copied: _root_method(module, action)(copied))
        case how:
            return {key: _called(how, key, leaf(owner, key, action), action.seed) for key in action.keys}


def submodule(module: nn.Module, action: Initialize) -> nn.Module:
    """The submodule whose leaves an action draws.

    Raises:
        PlanError: the module has no such submodule.
    """
    current: nn.Module | None = module
    for name in action.module.split(".") if action.module else ():
        current = current._modules.get(name) if current is not None else None
    if current is None:
        raise PlanError(f"{type(module).__name__} has no submodule {action.module!r}", keys=action.keys)
    return current


def leaf(owner: nn.Module, key: str, action: Initialize) -> torch.Tensor:
    """The leaf of `owner` that the whole module calls `key`."""
    prefix = f"{action.module}." if action.module else ""
    name = key.removeprefix(prefix)
    found = next((leaves[name] for leaves in (owner._parameters, owner._buffers) if name in leaves), None)
    if not key.startswith(prefix) or found is None:
        raise PlanError(f"{key!r} is no leaf of the submodule {action.module!r}", keys=(key,))
    return found


def _kept(owner: nn.Module, key: str, action: Initialize) -> torch.Tensor:
    tensor = leaf(owner, key, action)
    if tensor.is_meta:
        raise PlanError(f"{key!r} is on meta: its constructor left no value to keep", keys=(key,))
    return tensor.detach().cpu().clone()


def _called(how: str, key: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    expected = tensor_spec(like)
    generator = torch.Generator().manual_seed(derived_seed(seed, key))
    with torch.no_grad():
        result = function(key, how)(key, expected, generator)
    if not isinstance(result, torch.Tensor) or result.is_meta or tensor_spec(result) != expected:
        found = tensor_spec(result) if isinstance(result, torch.Tensor) else type(result).__name__
        raise PlanError(
            f"{how} was asked for {key!r} as {expected!r} and returned {found!r}",
            keys=(key,),
            expected=expected,
            found=found,
        )
    return result.detach().cpu().clone()


# -- the module's own initializers -----------------------------------------------------------------------------------


def _reset(copied: nn.Module) -> None:
    copied.reset_parameters()  # type: ignore[operator]


def _root_method(module: nn.Module, action: Initialize) -> Callable[[nn.Module], Any]:
    method = getattr(module, "_init_weights", None)
    if not callable(method):
        raise PlanError(f"{type(module).__name__} has no _init_weights to draw {action.keys} with", keys=action.keys)
    found: Callable[[nn.Module], Any] = method
    return found


def _by_method(owner: nn.Module, action: Initialize, method: Callable[[nn.Module], Any]) -> dict[str, torch.Tensor]:
    if action.how == "reset_parameters" and not callable(getattr(owner, "reset_parameters", None)):
        raise PlanError(f"{type(owner).__name__} has no reset_parameters to draw {action.keys} with", keys=action.keys)
    for key in action.keys:
        leaf(owner, key, action)
    first, second = (_drawn(owner, action, method, filling) for filling in _FILLINGS)
    for key, value in first.items():
        if not torch.equal(_bytes(value), _bytes(second[key])):
            raise PlanError(
                f"{action.how} of {type(owner).__name__} does not write all of {key!r}, or makes it from a leaf that "
                "has no value yet; pass init={template: function}",
                keys=(key,),
            )
    return first


def _drawn(
    owner: nn.Module, action: Initialize, method: Callable[[nn.Module], Any], filling: int
) -> dict[str, torch.Tensor]:
    prefix = f"{action.module}." if action.module else ""
    fresh = {id(t): _fresh(t, n in owner._non_persistent_buffers_set) for n, t in _own(owner)}
    labels = {fresh[id(t)].untyped_storage()._cdata: prefix + name for name, t in _own(owner)}
    with torch.no_grad(), recording(action.seed, labels=labels, frozen=_storages(owner, prefix)) as recorder:
        for name, tensor in _own(owner):
            if name not in owner._non_persistent_buffers_set or tensor.is_meta:
                recorder.adopt(fresh[id(tensor)], filling)
        try:
            method(_copied(owner, fresh))
        except FrozenWriteError as error:
            raise PlanError(
                f"{action.how} of {type(owner).__name__} writes to {error.key!r}, outside what is to be drawn; "
                "pass init={template: function}",
                keys=action.keys,
            ) from None
    values = {key: fresh[id(leaf(owner, key, action))] for key in action.keys}
    recorder.realize(values.values())
    return {key: value.detach() for key, value in values.items()}


def _own(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for leaves in (module._parameters, module._buffers):
        for name, tensor in leaves.items():
            if tensor is not None:
                yield name, tensor


def _fresh(tensor: torch.Tensor, passing: bool) -> torch.Tensor:
    """Memory for a leaf; a buffer that no state dict holds is the constructor's and keeps its value."""
    if passing and not tensor.is_meta:
        value = tensor.detach().cpu().clone()
    else:
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return _like(tensor, value)


def _like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` as the kind of leaf that `tensor` is; attributes that mark the old one as loaded stay behind."""
    if isinstance(tensor, nn.Parameter):
        return torch.Tensor._make_subclass(type(tensor), value, tensor.requires_grad)
    return value


def _copied(module: nn.Module, fresh: dict[int, torch.Tensor]) -> nn.Module:
    """A shallow copy with `fresh` leaves; other leaves, those of children, become meta."""

    def replaced(tensor: torch.Tensor | None) -> Any:
        if tensor is None or id(tensor) in fresh:
            return None if tensor is None else fresh[id(tensor)]
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return fresh.setdefault(id(tensor), _like(tensor, meta))

    copied = module.__class__.__new__(module.__class__)
    copied.__dict__ = {k: copy.copy(v) if isinstance(v, (dict, list, set)) else v for k, v in module.__dict__.items()}
    copied._parameters = {name: replaced(tensor) for name, tensor in module._parameters.items()}
    copied._buffers = {name: replaced(tensor) for name, tensor in module._buffers.items()}
    copied._modules = {n: None if m is None else _copied(m, fresh) for n, m in module._modules.items()}
    return copied


def _storages(module: nn.Module, prefix: str) -> dict[int, str]:
    """The storages that belong to the module as it is, also those of tensors it keeps as plain attributes."""
    found: dict[int, str] = {}
    for path, child in module.named_modules(prefix=prefix.removesuffix(".")):
        held = (*_own(child), *((name, t) for name, v in vars(child).items() for t in tensors_in((v,))))
        for name, tensor in held:
            if tensor.layout is torch.strided and not tensor.is_meta:
                found[tensor.untyped_storage()._cdata] = f"{path}.{name}" if path else name
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
