"""Modules without weights: names, shapes, ties and real buffers, and no memory for parameters."""

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from funcmodel.bind.commit import exchange, inherit
from funcmodel.bind.modes import recording
from funcmodel.bind.recording import Recorder

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)

# Which buffers `skeleton` drew, by submodule: nothing may be written on modules or tensors, and the function returns
# the module alone. Entries go when their module goes.
_DRAWN: Final[WeakKeyDictionary[nn.Module, Mapping[str, int]]] = WeakKeyDictionary()


def drawn_buffers(module: nn.Module) -> Mapping[str, int]:
    """Own buffers of `module` whose value `skeleton` drew at random, with its seed."""
    return _DRAWN.get(module, MappingProxyType({}))


def forget_draws(module: nn.Module, name: str) -> None:
    """Own buffer `name` of `module` has another value now than the one that `skeleton` drew."""
    drawn = _DRAWN.get(module)
    if drawn is not None and name in drawn:
        _DRAWN[module] = MappingProxyType({key: seed for key, seed in drawn.items() if key != name})


def skeleton(factory: Callable[..., M], /, *args: Any, seed: int = 0, **kwargs: Any) -> M:
    """Run a constructor without the memory and the time that its parameters take.

    Parameters come back on meta, under every name and alias that they have, with class, attributes and
    `requires_grad`. Buffers are real: every deterministic one equals that of a plain construction bit for bit, also
    where it is computed from a weight. A parameter that shares part of its storage with another leaf stays real, since
    meta tensors cannot say that they overlap.

    The constructor runs on the CPU of the calling thread; nothing is patched, and the global generator, default dtype
    and default device are left alone. Extra memory is that of the buffers, at most 1 MiB per parameter, 64 MiB, and
    whatever the constructor itself reads back from a parameter.

    Args:
        factory: a class or function that returns a module.
        *args: its arguments.
        seed: seed of what the constructor draws at random; has no effect on parameters.
        **kwargs: its keyword arguments.

    Returns:
        The module.

    Raises:
        TypeError: the factory returned no module.

    Example:
        >>> net = skeleton(nn.BatchNorm1d, 4)
        >>> net.weight.device.type, net.running_var.tolist()
        ('meta', [1.0, 1.0, 1.0, 1.0])
    """
    with recording(seed) as recorder:
        module = factory(*args, **kwargs)
    if not isinstance(module, nn.Module):
        raise TypeError(f"skeleton needs a factory of modules; {factory!r} returned {type(module).__name__}")
    _remember_draws(module, recorder, seed)
    for parameter in _own_storage(module):
        _to_meta(parameter)
    recorder.realize_all()
    return module


def _remember_draws(module: nn.Module, recorder: Recorder, seed: int) -> None:
    for child in module.modules():
        drawn = {name: seed for name, b in child._buffers.items() if b is not None and recorder.is_random(b)}
        if drawn:
            _DRAWN[child] = MappingProxyType(drawn)


def _own_storage(module: nn.Module) -> list[nn.Parameter]:
    """The parameters on the CPU whose storage no other leaf shares, each object once."""
    leaves = {id(t): t for child in module.modules() for t in _leaves(child) if _is_plain(t)}
    owners = Counter(t.untyped_storage()._cdata for t in leaves.values())
    return [t for t in leaves.values() if isinstance(t, nn.Parameter) and owners[t.untyped_storage()._cdata] == 1]


def _leaves(module: nn.Module) -> list[torch.Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and not is_lazy(tensor)
        and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    )


def _to_meta(parameter: nn.Parameter) -> None:
    """Give the object a tensor without data: who holds it, for example an LSTM's list of weights, still does."""
    meta = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
    if parameter.requires_grad:
        inherit(parameter, meta)
    exchange(parameter, meta)
