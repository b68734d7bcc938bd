"""`initialize`: exactly the missing leaves, beside the module, by generators of their own."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from funcmodel.bind.initialize import initialize
from funcmodel.bind.skeleton import skeleton
from funcmodel.errors import PlanError
from funcmodel.records.actions import Initialize
from funcmodel.records.devices import CPU
from funcmodel.records.tensors import TensorSpec


def action(keys: tuple[str, ...], how: str | None = "reset_parameters", module: str = "", seed: int = 0) -> Initialize:
    return Initialize(module, keys, how, seed, CPU)


def scaled_normal(key: str, spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(spec.shape, generator=generator) * len(key)


def wrong_shape(key: str, spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(7)


def no_tensor(key: str, spec: TensorSpec, generator: torch.Generator) -> float:
    return 0.0


@pytest.mark.parametrize("size", [4, 1024])
def test_only_the_keys_asked_for_whatever_else_is_missing(size: int) -> None:
    net = nn.Linear(size, size)
    alone, both = initialize(net, action(("bias",))), initialize(net, action(("weight", "bias")))
    assert list(alone) == ["bias"]
    assert list(both) == ["weight", "bias"]
    assert torch.equal(alone["bias"], both["bias"])
    bound = 1 / math.sqrt(size)
    assert 0.9 * bound < float(both["weight"].abs().max()) <= bound
    assert float(alone["bias"].std()) > 0


def test_the_seed_and_the_key_decide() -> None:
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    a, b = (initialize(net, action((f"{n}.weight",), module=n))[f"{n}.weight"] for n in "ab")
    other = initialize(net, action(("a.weight",), module="a", seed=1))["a.weight"]
    assert not torch.equal(a, b)
    assert not torch.equal(a, other)


def test_a_skeleton_gives_the_same_values_as_the_module() -> None:
    keys = tuple(nn.LSTM(3, 4)._parameters)
    one, two = initialize(nn.LSTM(3, 4), action(keys)), initialize(skeleton(nn.LSTM, 3, 4), action(keys))
    assert all(torch.equal(one[key], two[key]) for key in keys)


def test_module_and_process_are_left_alone() -> None:
    net = nn.BatchNorm1d(3)
    with torch.no_grad():
        net.weight.fill_(5.0)
        net.running_mean.fill_(6.0)
    before, state = {k: (id(v), v.clone()) for k, v in net.state_dict(keep_vars=True).items()}, torch.get_rng_state()
    fresh = initialize(net, action(("weight", "running_mean")))
    assert fresh["weight"].tolist() == [1.0] * 3
    assert fresh["running_mean"].tolist() == [0.0] * 3
    assert all(
        id(v) == before[k][0] and torch.equal(v, before[k][1]) for k, v in net.state_dict(keep_vars=True).items()
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() is torch.float32


class Root(nn.Module):
    """Initializes the way that transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.full((3,), 9.0))
        self.std = 4.0

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.fill_(self.std)
        if isinstance(module, Root):
            module.scale.data.fill_(0.25)


def test_init_weights_of_the_root() -> None:
    net = Root()
    assert initialize(net, action(("head.weight",), "_init_weights", "head"))["head.weight"].tolist() == [[4.0] * 2] * 2
    assert initialize(net, action(("scale",), "_init_weights"))["scale"].tolist() == [0.25] * 3
    assert net.scale.tolist() == [9.0] * 3


def test_what_the_initializer_leaves_out_is_refused_by_name() -> None:
    with pytest.raises(PlanError) as caught:
        initialize(Root(), action(("head.bias",), "_init_weights", "head"))
    assert caught.value.keys == ("head.bias",)


class Partial(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.child = nn.Linear(2, 2)
        self.cached = torch.zeros(4, 4)
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            match self.how:
                case "part":
                    self.weight[0].fill_(1.0)
                case "scaled":
                    self.weight.mul_(2.0)
                case "outside":
                    self.weight.fill_(1.0)
                    self.cached.fill_(1.0)
                case "children":
                    self.weight.fill_(1.0)
                    self.child.reset_parameters()
                case "constant":
                    self.weight.copy_(self.table.expand(4, 4))
                case "raises":
                    torch.randn(3)
                    raise LookupError


@pytest.mark.parametrize("how", ["part", "scaled", "outside"])
def test_memory_that_was_never_written_passes_for_no_value(how: str) -> None:
    net = Partial(how)
    with pytest.raises(PlanError) as caught:
        initialize(net, action(("weight",)))
    assert caught.value.keys == ("weight",)
    assert float(net.cached.sum()) == 0.0


def test_children_keep_their_values_and_constants_can_be_read() -> None:
    net = Partial("children")
    before = net.child.weight.detach().clone()
    assert initialize(net, action(("weight",)))["weight"].min() == 1.0
    assert torch.equal(net.child.weight, before)
    assert initialize(Partial("constant"), action(("weight",)))["weight"][0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_an_error_of_the_initializer_leaves_the_process_alone() -> None:
    net, state = Partial("raises"), torch.get_rng_state()
    with pytest.raises(LookupError):
        initialize(net, action(("weight",)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_function_gets_key_spec_and_a_generator_of_its_own() -> None:
    net = nn.Linear(2, 2)
    how = f"{__name__}:scaled_normal"
    one, two = (initialize(net, action(keys, how)) for keys in [("weight",), ("bias", "weight")])
    assert torch.equal(one["weight"], two["weight"])


@pytest.mark.parametrize("name", ["wrong_shape", "no_tensor", "absent"])
def test_a_function_that_gives_something_else_is_refused(name: str) -> None:
    with pytest.raises(PlanError) as caught:
        initialize(nn.Linear(2, 2), action(("weight",), f"{__name__}:{name}"))
    assert caught.value.keys == ("weight",)


def test_constructor_keeps_what_is_there() -> None:
    net = nn.Linear(2, 2)
    kept = initialize(net, action(("weight",), "constructor"))["weight"]
    assert torch.equal(kept, net.weight)
    assert kept.data_ptr() != net.weight.data_ptr()


@pytest.mark.parametrize(
    ("module", "act"),
    [
        (skeleton(nn.Linear, 2, 2), action(("weight",), "constructor")),
        (nn.Linear(2, 2), action(("weight",), None)),
        (nn.Linear(2, 2), action(("weight",), "_init_weights")),
        (nn.ParameterList([nn.Parameter(torch.ones(1))]), action(("0",))),
        (nn.Linear(2, 2), action(("a.weight",), module="a")),
        (nn.Linear(2, 2), action(("other",))),
    ],
    ids=["meta", "nothing", "no root method", "no reset", "no submodule", "no leaf"],
)
def test_what_cannot_be_drawn_is_refused(module: Any, act: Initialize) -> None:
    with pytest.raises(PlanError) as caught:
        initialize(module, act)
    assert caught.value.keys == act.keys
