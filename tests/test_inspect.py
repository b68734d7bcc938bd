"""`module_spec`: what a module holds, under every name, as a record."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from funcmodel.bind.inspect import class_traits, live_tensors, module_spec
from funcmodel.errors import PlanError
from funcmodel.records.devices import CPU
from funcmodel.records.module import SubmoduleSpec, TiedGroup, Traits, ViewSpec
from funcmodel.records.tensors import TensorSpec


def test_leaves_stand_in_the_order_of_the_state_dict() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1, bias=False))
    spec = module_spec(net)
    assert list(spec.params) == list(net.state_dict())
    assert spec.params["1.running_mean"].kind == "buffer"
    assert not spec.params["1.running_mean"].requires_grad
    assert spec.params["0.weight"].spec == TensorSpec([3, 2, 1], "float32")
    assert spec.params["0.weight"].device == CPU
    assert spec.name == "Sequential"


def test_meta_has_no_device_and_ties_only_objects() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        net.append(nn.Linear(2, 2, bias=False))
        net[2].weight = net[0].weight
        net[1].weight.data = net[0].weight.data
    spec = module_spec(net)
    assert {leaf.device for leaf in spec.params.values()} == {None}
    assert spec.tied == (TiedGroup(("0.weight", "2.weight"), "identity"),)


def test_ties_by_identity_and_by_storage() -> None:
    net = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in "abcd"})
    net["c"].weight = net["a"].weight
    net["d"].weight = nn.Parameter(net["b"].weight.data)
    assert module_spec(net).tied == (
        TiedGroup(("a.weight", "c.weight"), "identity"),
        TiedGroup(("b.weight", "d.weight"), "storage"),
    )


def test_one_submodule_under_two_names_gives_both() -> None:
    shared = nn.Linear(2, 2)
    spec = module_spec(nn.ModuleDict({"x": shared, "y": nn.ModuleList([shared])}))
    assert list(spec.params) == ["x.weight", "x.bias", "y.0.weight", "y.0.bias"]
    assert [group.keys for group in spec.tied] == [("x.weight", "y.0.weight"), ("x.bias", "y.0.bias")]
    assert spec.modules["y.0"] == spec.modules["x"] == SubmoduleSpec("Linear", "reset_parameters")


def test_a_leaf_inside_another_is_a_view() -> None:
    net = nn.Module()
    net.table = nn.Parameter(torch.randn(4, 6))
    net.register_buffer("block", net.table.detach()[1:, 2:4].t(), persistent=False)
    spec = module_spec(net)
    assert not spec.params["block"].persistent
    assert spec.views == {"block": ViewSpec("table", (1, 6), 8)}


def test_leaves_that_interleave_are_independent() -> None:
    both = torch.randn(4, 6)
    net = nn.Module()
    net.left, net.right = nn.Parameter(both[:, :3]), nn.Parameter(both[:, 3:])
    spec = module_spec(net)
    assert (spec.views, spec.tied) == ({}, ())


@pytest.mark.parametrize(
    "pair",
    [
        lambda flat: (flat[:6], flat[4:]),
        lambda flat: (flat, flat[2:6].view(torch.int32)),
        lambda flat: (flat.view(2, 5)[:, :3], flat.view(2, 5)[:, 2:]),
    ],
    ids=["sticking out", "another dtype", "columns"],
)
def test_an_overlap_that_is_no_view_is_refused(pair: Any) -> None:
    net = nn.Module()
    for name, tensor in zip("ab", pair(torch.zeros(10)), strict=True):
        net.register_buffer(name, tensor)
    with pytest.raises(PlanError) as caught:
        module_spec(net)
    assert caught.value.keys == ("a", "b")


def test_parametrizations_and_lists_have_the_names_of_the_state_dict() -> None:
    net = nn.Module()
    net.normed = parametrizations.weight_norm(nn.Linear(3, 2))
    net.several = nn.ParameterList([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))])
    spec = module_spec(net)
    assert list(spec.params) == list(net.state_dict())
    assert "normed.parametrizations.weight.original0" in spec.params


def test_lazy_parameters_are_refused_by_name() -> None:
    with pytest.raises(PlanError) as caught:
        module_spec(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3), nn.LazyBatchNorm1d()))
    assert caught.value.keys[:2] == ("1.weight", "1.bias")


class Extra(nn.Module):
    def __init__(self, state: object) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


def test_extra_state_is_a_leaf_where_it_is_a_tensor_and_opaque_otherwise() -> None:
    spec = module_spec(nn.ModuleDict({"t": Extra(torch.ones(2)), "o": Extra({"steps": 1})}))
    assert spec.params["t._extra_state"].kind == "extra_state"
    assert list(spec.params) == ["t._extra_state"]
    assert spec.opaque == ("o._extra_state",)


def test_a_module_that_contains_itself_is_refused() -> None:
    net = nn.Module()
    net.inner = nn.Module()
    net.inner.__dict__["_modules"]["outer"] = net
    with pytest.raises(PlanError):
        module_spec(net)


class Renaming(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "kernel"] = self.weight if keep_vars else self.weight.detach()


def doubling(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    state[prefix + "weight"] = state[prefix + "weight"].detach() * 2


def test_a_state_dict_that_is_not_the_leaves_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        module_spec(nn.Sequential(Renaming(2, 2, bias=False)))
    assert set(caught.value.keys) == {"0.weight", "0.kernel"}
    hooked = nn.Linear(2, 2)
    hooked._register_state_dict_hook(doubling)
    with pytest.raises(PlanError) as caught:
        module_spec(hooked)
    assert caught.value.keys == ("weight",)


def test_a_hook_that_changes_nothing_is_fine() -> None:
    hooked = nn.Sequential(nn.Linear(2, 2), nn.utils.spectral_norm(nn.Linear(2, 2)))
    hooked._register_state_dict_hook(lambda module, state, prefix, metadata: None)
    assert list(module_spec(hooked).params) == list(hooked.state_dict())


class Model(nn.Module):
    base_model_prefix = "bert"
    _no_split_modules = {"B", "A"}
    _keys_to_ignore_on_load_missing = [r"position_ids", r"^head\.bias$", r"layers\.\d+\.bias"]
    _keys_to_ignore_on_load_unexpected = [r"^pooler\.", r"decoder\.weight"]
    _keep_in_fp32_modules = ["norm"]

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(1, 1), nn.Parameter(torch.ones(1))

    def _init_weights(self, module: nn.Module) -> None: ...


def test_traits_are_read_from_the_class_and_arguments_win() -> None:
    assert module_spec(Model()).traits == Traits(
        base_prefix="bert",
        no_split=("A", "B"),
        ignore_missing=("position_ids", "{*above}.position_ids", "head.bias"),
        ignore_unexpected=("pooler.{*rest}", "decoder.weight", "{*above}.decoder.weight"),
        keep_in_fp32=("norm",),
    )
    assert module_spec(Model(), traits=Traits(base_prefix="x")).traits == Traits(base_prefix="x")
    assert class_traits(nn.Linear) == Traits()


def test_how_a_submodule_initializes_itself() -> None:
    modules = module_spec(Model()).modules
    assert modules[""] == SubmoduleSpec("Model", "_init_weights")
    assert modules["a"] == SubmoduleSpec("Linear", "reset_parameters")
    plain = module_spec(nn.Sequential(nn.ReLU(), nn.ParameterList([nn.Parameter(torch.ones(1))]))).modules
    assert [plain[name].init for name in ("", "0", "1")] == [None, None, None]


def test_live_tensors_are_the_leaves_themselves() -> None:
    net = nn.BatchNorm1d(2)
    net.register_buffer("passing", torch.zeros(1), persistent=False)
    found = live_tensors(net)
    assert found["weight"] is net.weight
    assert found["passing"] is net.passing


def test_records_are_shared_between_equal_leaves() -> None:
    spec = module_spec(nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(100)]))
    assert len({id(leaf) for leaf in spec.params.values()}) == 1
