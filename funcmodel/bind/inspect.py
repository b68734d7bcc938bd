"""A module as a record: one linear walk over its dictionaries, ties by identity first and by storage second."""

from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from funcmodel.bind.overlaps import Overlaps, overlaps
from funcmodel.bind.skeleton import drawn_buffers
from funcmodel.errors import PlanError
from funcmodel.records.devices import device
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import ModuleSpec, ParamKind, ParamSpec, SubmoduleSpec, Traits
from funcmodel.run.tensors import tensor_spec


class Role(NamedTuple):
    """What a leaf is to its module."""

    kind: ParamKind
    persistent: bool


PARAMETER: Final = Role("parameter", True)
_BUFFER: Final = Role("buffer", True)
_PASSING_BUFFER: Final = Role("buffer", False)
_EXTRA_STATE: Final = Role("extra_state", True)
_EXTRA_NAME: Final = "_extra_state"
_EAGER: Final = (nn.Parameter, torch.Tensor)
_DEEPEST: Final = 900  # nested modules; more is a module that contains itself, or more than torch's own walks take


class Leaves(NamedTuple):
    """Every leaf under every name, in the order of `state_dict()`: equally long columns, since there may be 100,000.

    Attributes:
        keys: dotted names.
        tensors: None for extra state that is no tensor.
        owners: the submodule that keeps the leaf.
        names: the leaf's name there.
        roles: kind, and whether the state dict holds it.
        modules: every submodule under every name, the root under "".
    """

    keys: list[str]
    tensors: list[torch.Tensor | None]
    owners: list[nn.Module]
    names: list[str]
    roles: list[Role]
    modules: dict[str, nn.Module]


def walk(module: nn.Module) -> Leaves:
    """What a module holds.

    Raises:
        PlanError: the module contains itself.
    """
    leaves = Leaves([], [], [], [], [], {})
    keys, tensors, owners, names, roles, modules = leaves
    base = nn.Module.get_extra_state

    # No function that calls itself: it would hold the leaves, and with them all memory, until a garbage collection.
    waiting = [(module, "", 0)]
    while waiting:
        current, prefix, depth = waiting.pop()
        if depth > _DEEPEST:
            raise PlanError(f"{type(module).__name__} contains itself, or nests deeper than {_DEEPEST} modules")
        modules[prefix[:-1]] = current
        if current._parameters:
            for name, parameter in current._parameters.items():
                if parameter is not None:
                    keys.append(prefix + name)
                    tensors.append(parameter)
                    owners.append(current)
                    names.append(name)
                    roles.append(PARAMETER)
        if current._buffers:
            passing = current._non_persistent_buffers_set
            for name, buffer in current._buffers.items():
                if buffer is not None:
                    keys.append(prefix + name)
                    tensors.append(buffer)
                    owners.append(current)
                    names.append(name)
                    roles.append(_PASSING_BUFFER if name in passing else _BUFFER)
        if type(current).get_extra_state is not base:
            state = current.get_extra_state()
            keys.append(prefix + _EXTRA_NAME)
            tensors.append(state if isinstance(state, torch.Tensor) else None)
            owners.append(current)
            names.append(_EXTRA_NAME)
            roles.append(_EXTRA_STATE)
        if current._modules:
            inner = [(m, f"{prefix}{name}.", depth + 1) for name, m in current._modules.items() if m is not None]
            inner.reverse()
            waiting += inner
    return leaves


def live_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, buffer (non-persistent ones too) and tensor of extra state, under every name.

    Example:
        >>> list(live_tensors(nn.BatchNorm1d(2, affine=False)))
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    leaves = walk(module)
    return {key: tensor for key, tensor in zip(leaves.keys, leaves.tensors, strict=True) if tensor is not None}


def aliases(leaves: Leaves) -> Overlaps:
    """Which of the leaves are one tensor, and which lie inside another.

    Raises:
        PlanError: two leaves share elements and neither holds the other, or they have different dtypes.
    """
    tensors = leaves.tensors
    if _EXTRA_STATE in leaves.roles:
        tensors = [None if role is _EXTRA_STATE else t for t, role in zip(tensors, leaves.roles, strict=True)]
    return overlaps(leaves.keys, tensors)


def module_spec(module: nn.Module, *, traits: Traits | None = None) -> ModuleSpec:
    """A module as data; the module is read, never changed.

    Args:
        module: any module, real or on meta.
        traits: facts about the model; by default what its class declares in the attributes that transformers uses.

    Returns:
        Every leaf under every name it has, in the order of `state_dict()`, non-persistent buffers included. Leaves
        are tied where they are one object or cover the same elements; tensors on meta only where they are one object.

    Raises:
        PlanError: a lazy parameter has no shape yet; leaves overlap in a way that no view describes; or the module's
            `state_dict()` holds something else than its leaves under their names.

    Example:
        >>> spec = module_spec(nn.Linear(3, 2))
        >>> spec, spec.params["weight"].spec
        (<ModuleSpec Linear: 2 leaves, 1 modules, 0 tied>, [2, 3] float32)
    """
    leaves = walk(module)
    _check_lazy(module, leaves)
    submodules, hooked = _submodule_specs(module, leaves.modules)
    if hooked:
        _check_state_dict(module, leaves)
    shared = aliases(leaves)
    return ModuleSpec(
        name=type(module).__name__,
        params=FrozenMap(_param_specs(leaves)),
        modules=FrozenMap(submodules),
        tied=shared.tied,
        views=FrozenMap(shared.views),
        opaque=tuple(key for key, tensor in zip(leaves.keys, leaves.tensors, strict=True) if tensor is None),
        traits=traits if traits is not None else class_traits(type(module)),
    )


def _param_specs(leaves: Leaves) -> Iterator[tuple[str, ParamSpec]]:
    # Equal leaves share one record: a model has few shapes and many tensors.
    known: dict[Any, ParamSpec] = {}
    seed = None
    for key, tensor, owner, name, role in zip(
        leaves.keys, leaves.tensors, leaves.owners, leaves.names, leaves.roles, strict=True
    ):
        if tensor is None:
            continue
        if role is not PARAMETER:
            seed = drawn_buffers(owner).get(name)
        mark = (tensor.shape, tensor.dtype, role, tensor.device, tensor.requires_grad, seed)
        spec = known.get(mark)
        if spec is None:
            spec = known[mark] = ParamSpec(
                spec=tensor_spec(tensor),
                kind=role.kind,
                device=None if tensor.is_meta else device(tensor.device),
                persistent=role.persistent,
                requires_grad=tensor.requires_grad,
                random_seed=seed,
            )
        seed = None
        yield key, spec


def _submodule_specs(root: nn.Module, modules: dict[str, nn.Module]) -> tuple[dict[str, SubmoduleSpec], bool]:
    """The submodules, and whether one of them may write a state dict of its own."""
    rooted: Literal["_init_weights"] | None = "_init_weights" if _has_method(root, "_init_weights") else None
    known: dict[type[nn.Module], tuple[SubmoduleSpec, SubmoduleSpec]] = {}
    specs: dict[str, SubmoduleSpec] = {}
    hooked = False
    for name, module in modules.items():
        cls = type(module)
        both = known.get(cls)
        if both is None:
            own: Literal["reset_parameters"] | None = (
                "reset_parameters" if _has_method(module, "reset_parameters") else None
            )
            both = known[cls] = SubmoduleSpec(cls.__name__, None), SubmoduleSpec(cls.__name__, own or rooted)
            hooked = hooked or _writes_state(cls)
        if module._state_dict_hooks or module._state_dict_pre_hooks:
            hooked = True
        specs[name] = both[0]
        for leaves in (module._parameters, module._buffers):
            if leaves:
                for leaf in leaves.values():
                    if leaf is not None:
                        specs[name] = both[1]
                        break
    return specs, hooked


def _writes_state(cls: type[nn.Module]) -> bool:
    base = nn.Module
    return cls.state_dict is not base.state_dict or cls._save_to_state_dict is not base._save_to_state_dict


def _has_method(module: nn.Module, name: str) -> bool:
    return callable(getattr(type(module), name, None))


# -- what a walk cannot see ------------------------------------------------------------------------------------------


def _check_lazy(module: nn.Module, leaves: Leaves) -> None:
    lazy = tuple(
        key
        for key, tensor in zip(leaves.keys, leaves.tensors, strict=True)
        if type(tensor) not in _EAGER and tensor is not None and is_lazy(tensor)
    )
    if lazy:
        raise PlanError(
            f"{type(module).__name__} has leaves without a shape yet: {', '.join(lazy)}; "
            "run the module once on an example input, then plan",
            keys=lazy,
        )


def _check_state_dict(module: nn.Module, leaves: Leaves) -> None:
    """Where a class or a hook may have its own idea of the state dict, ask it, and refuse a different one."""
    asked = module.state_dict(keep_vars=True)
    seen = {
        key: (tensor, role)
        for key, tensor, role in zip(leaves.keys, leaves.tensors, leaves.roles, strict=True)
        if role.persistent
    }
    keys = dict.fromkeys((*asked, *seen))
    differing = tuple(k for k in keys if k not in asked or k not in seen or not _same(asked[k], *seen[k]))
    if differing:
        raise PlanError(
            f"state_dict() of {type(module).__name__} holds something else than the module's leaves under their "
            f"names: {', '.join(differing[:8])}{', ...' if len(differing) > 8 else ''}; a class or a hook in it "
            "rewrites the state dict: load and save the part below it, or remove the hook",
            keys=differing,
        )


def _same(asked: object, tensor: torch.Tensor | None, role: Role) -> bool:
    """Whether a state dict holds the leaf itself; extra state may be made anew at each call."""
    if tensor is None or not isinstance(asked, torch.Tensor):
        return tensor is None and not isinstance(asked, torch.Tensor)
    if role is _EXTRA_STATE:
        return asked.dtype == tensor.dtype and asked.shape == tensor.shape
    return asked is tensor or (asked.dtype == tensor.dtype and asked.is_set_to(tensor))


# -- what the class declares -----------------------------------------------------------------------------------------


def class_traits(cls: type) -> Traits:
    """The traits that a class declares in the attributes that transformers uses.

    Of its patterns only those are taken that say no more than a template can: plain text with escaped dots, anchored
    or not. Others are left out; pass `traits` instead.
    """
    prefix = getattr(cls, "base_model_prefix", "")
    return Traits(
        base_prefix=prefix if isinstance(prefix, str) else "",
        no_split=_texts(getattr(cls, "_no_split_modules", None)),
        ignore_missing=_templates(getattr(cls, "_keys_to_ignore_on_load_missing", None)),
        ignore_unexpected=_templates(getattr(cls, "_keys_to_ignore_on_load_unexpected", None)),
        keep_in_fp32=_texts(getattr(cls, "_keep_in_fp32_modules", None)),
    )


def _texts(value: object) -> tuple[str, ...]:
    match value:
        case str():
            return (value,)
        case list() | tuple():
            return tuple(v for v in value if isinstance(v, str))
        case set() | frozenset():
            return tuple(sorted(v for v in value if isinstance(v, str)))
        case _:
            return ()


def _templates(patterns: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(t for pattern in _texts(patterns) for t in _pattern_templates(pattern)))


def _pattern_templates(pattern: str) -> Iterator[str]:
    text = pattern.replace(r"\.", ".")
    start, end = text.startswith("^"), text.endswith("$")
    text = text.removeprefix("^").removesuffix("$")
    if not text or any(c in r"\*+?[](){}|^$" for c in text):
        return
    # A trailing dot asks for anything below; a leading one for anything above.
    below, above = text.endswith(".") and not end, text.startswith(".") and not start
    text = text.strip(".") + (".{*rest}" if below else "")
    if not above:
        yield text
    if not start and not below:
        yield "{*above}." + text
