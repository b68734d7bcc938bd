"""Modules whose structure is hostile: ties of every kind, views, shared submodules, buffers outside the state dict.

A module is drawn as a recipe, so that one draw can be built several times, plainly or as a skeleton, with equal names.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

Feature = Callable[[nn.Module, nn.Module, str], None]


class Stateful(nn.Module):
    """Extra state that is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.state = torch.arange(3.0)

    def get_extra_state(self) -> torch.Tensor:
        return self.state

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.state = state.clone()


class Opaque(nn.Module):
    """Extra state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def _linear(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.add_module(name, nn.Linear(3, 2))


def _normed(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.add_module(name, nn.BatchNorm1d(3))


def _lstm(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.add_module(name, nn.LSTM(2, 2))


def _embedding_and_head(root: nn.Module, parent: nn.Module, name: str) -> None:
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    parent.add_module(name, embedding)
    root.add_module(f"{name}_head", head)


def _tied_by_storage(root: nn.Module, parent: nn.Module, name: str) -> None:
    first = nn.Linear(3, 3, bias=False)
    second = nn.Linear(3, 3, bias=False)
    second.weight = nn.Parameter(first.weight.data)
    root.add_module(f"{name}_first", first)
    parent.add_module(name, second)


def _tied_buffers(root: nn.Module, parent: nn.Module, name: str) -> None:
    shared = torch.randn(3)
    root.register_buffer(f"{name}_a", shared)
    parent.register_buffer(f"{name}_b", shared)


def _half_persistent(root: nn.Module, parent: nn.Module, name: str) -> None:
    shared = torch.randn(3)
    root.register_buffer(f"{name}_a", shared, persistent=False)
    parent.register_buffer(f"{name}_b", shared)


def _shared_module(root: nn.Module, parent: nn.Module, name: str) -> None:
    shared = nn.Linear(2, 2)
    root.add_module(f"{name}_again", shared)
    parent.add_module(name, shared)


def _passing_buffer(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.register_buffer(name, torch.linspace(0.0, 1.0, 5), persistent=False)


def _drawn_buffer(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.register_buffer(name, torch.randn(4))


def _empty(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.add_module(name, nn.Sequential(nn.ReLU(), nn.Identity()))


def _parameter_list(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.add_module(name, nn.ParameterList([nn.Parameter(torch.ones(n)) for n in (1, 2)]))


def _parameter_dict(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.add_module(name, nn.ParameterDict({"x": nn.Parameter(torch.zeros(2)), "y": nn.Parameter(torch.randn(1))}))


def _frozen(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.register_parameter(name, nn.Parameter(torch.randn(2, 2), requires_grad=False))


def _scalar(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.register_parameter(name, nn.Parameter(torch.tensor(2.5)))


def _no_elements(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.register_parameter(name, nn.Parameter(torch.empty(0, 3)))
    parent.register_buffer(f"{name}_b", torch.empty(0))


def _integers(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.register_buffer(name, torch.arange(4))
    parent.register_buffer(f"{name}_mask", torch.tensor([True, False]))
    parent.register_parameter(f"{name}_p", nn.Parameter(torch.arange(3, dtype=torch.int8), requires_grad=False))


def _halves(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.register_parameter(name, nn.Parameter(torch.randn(3).to(torch.bfloat16)))
    parent.register_buffer(f"{name}_f8", torch.randn(4).to(torch.float8_e4m3fn))
    parent.register_buffer(f"{name}_c", torch.randn(2, dtype=torch.complex64))


def _nothing(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.register_parameter(name, None)
    parent.register_buffer(f"{name}_b", None)


def _row_of_parameter(root: nn.Module, parent: nn.Module, name: str) -> None:
    table = nn.Parameter(torch.randn(4, 3))
    root.register_parameter(f"{name}_table", table)
    parent.register_buffer(name, table.detach()[1], persistent=True)


def _transposed_block(root: nn.Module, parent: nn.Module, name: str) -> None:
    table = torch.randn(4, 6)
    parent.register_buffer(name, table[1:, 2:5].t(), persistent=False)
    root.register_buffer(f"{name}_table", table)


def _strided_base(root: nn.Module, parent: nn.Module, name: str) -> None:
    table = torch.randn(4, 6).t()
    root.register_buffer(f"{name}_table", table)
    parent.register_buffer(name, table[2:4])


def _interleaved(root: nn.Module, parent: nn.Module, name: str) -> None:
    both = torch.randn(4, 6)
    root.register_parameter(f"{name}_left", nn.Parameter(both[:, :3]))
    parent.register_parameter(name, nn.Parameter(both[:, 3:]))


def _parameter_as_buffer(root: nn.Module, parent: nn.Module, name: str) -> None:
    weight = nn.Parameter(torch.randn(3))
    root.register_parameter(f"{name}_p", weight)
    parent.register_buffer(name, weight)


def _orthogonal(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.add_module(name, parametrizations.orthogonal(nn.Linear(3, 3)))


def _weight_norm(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.add_module(name, parametrizations.weight_norm(nn.Linear(3, 2)))


def _spectral_norm(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.add_module(name, parametrizations.spectral_norm(nn.Linear(3, 2)))


def _old_spectral_norm(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.add_module(name, nn.utils.spectral_norm(nn.Linear(3, 2)))


def _extra_tensor(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.add_module(name, Stateful())


def _extra_opaque(root: nn.Module, parent: nn.Module, name: str) -> None:
    parent.add_module(name, Opaque())


FEATURES: tuple[Feature, ...] = (
    *(_linear, _normed, _lstm, _embedding_and_head, _tied_by_storage, _tied_buffers, _half_persistent),
    *(_shared_module, _passing_buffer, _drawn_buffer, _empty, _parameter_list, _parameter_dict, _frozen, _scalar),
    *(_no_elements, _integers, _halves, _nothing, _row_of_parameter, _transposed_block, _strided_base),
    *(_interleaved, _parameter_as_buffer, _orthogonal, _weight_norm, _spectral_norm, _old_spectral_norm),
    *(_extra_tensor, _extra_opaque),
)
PLACES = ((), ("a",), ("a", "b"), ("blocks", "0"), ("blocks", "1"))


@frozen
class Recipe:
    """Features and the submodules they go to."""

    steps: tuple[tuple[Feature, tuple[str, ...]], ...]

    def __call__(self) -> nn.Module:
        """The module, drawn from the global generator as any constructor draws."""
        root = nn.Module()
        for position, (feature, path) in enumerate(self.steps):
            parent = root
            for name in path:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent.get_submodule(name)
            feature(root, parent, f"{feature.__name__.strip('_')}{position}")
        return root


def recipes(
    *, features: tuple[Feature, ...] = FEATURES, min_size: int = 0, max_size: int = 6
) -> st.SearchStrategy[Recipe]:
    """Recipes of up to `max_size` features."""
    step = st.tuples(st.sampled_from(features), st.sampled_from(PLACES))
    return st.lists(step, min_size=min_size, max_size=max_size).map(lambda steps: Recipe(tuple(steps)))


def built(recipe: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The module of a recipe, with the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipe()


def scrambled(module: nn.Module, seed: int) -> nn.Module:
    """The module with other values in every leaf, ties and views kept: what a training run would leave."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        data = tensor.detach()
        if data.dtype is torch.bool:
            data.copy_(torch.randint(0, 2, data.shape, generator=generator).bool())
        else:
            data.copy_(torch.randint(-99, 99, data.shape, generator=generator).to(data.dtype))
    for child in module.modules():
        if isinstance(child, Stateful):
            child.state = torch.randint(0, 9, (3,), generator=generator).float()
    return module


def tensor_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of `state_dict()`, each with memory of its own."""
    return {k: v.detach().clone() for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Everything that may not change when a load fails: objects, addresses, bits, flags."""
    found: dict[str, Any] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        for kind, leaves in (("p", child._parameters), ("b", child._buffers)):
            for name, tensor in leaves.items():
                found[f"{path}.{kind}.{name}"] = None if tensor is None else _state_of(tensor)
        if isinstance(child, Stateful):
            found[f"{path}.state"] = id(child.state), child.state.tolist()
        found[f"{path}.attributes"] = sorted(vars(child))
    return found


def _state_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    data = tensor.detach()
    bits = None if tensor.is_meta else bytes(data.contiguous().reshape(-1).view(torch.uint8).tolist())
    place = None if tensor.is_meta else tensor.data_ptr()
    facts = (type(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad, tensor.device)
    return id(tensor), place, bits, *facts, copy.copy(vars(tensor))
