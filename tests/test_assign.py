"""`assign`: a plan on a module, all or nothing; objects survive, ties stay ties."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import funcmodel as fm
from funcmodel.bind.assign import assign
from funcmodel.bind.inspect import live_tensors, module_spec
from funcmodel.bind.skeleton import skeleton
from funcmodel.core.build import cast, concat, full, live
from funcmodel.errors import ActionError, PlanError, StalePlanError, TieConflictError
from funcmodel.plan.loading import plan_load
from funcmodel.records.actions import Assign, Initialize, Move, Offload, Tie
from funcmodel.records.devices import CPU
from funcmodel.records.expressions import Call, Expr
from funcmodel.records.plans import LoadPlan, StateDictPlan
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.scan import scan
from funcmodel.run.tensors import tensor_spec

MODES = pytest.mark.parametrize("commit", ["swap", "in_place"])


def of(tensors: dict[str, torch.Tensor]) -> StateDictPlan:
    return StateDictPlan({key: live(key, tensor_spec(tensor)) for key, tensor in tensors.items()})


def loaded(module: nn.Module, tensors: dict[str, torch.Tensor], commit: Any = "swap", **options: Any) -> nn.Module:
    return assign(plan_load(module_spec(module), of(tensors), **options), module, commit=commit, live=tensors)


def fulls(module: nn.Module, value: float = 2.0) -> dict[str, Expr]:
    return {key: full(leaf.spec, value) for key, leaf in module_spec(module).params.items()}


def assigns(entries: dict[str, Expr]) -> LoadPlan:
    return LoadPlan(tuple(Assign(key, expr, CPU) for key, expr in entries.items()))


def state(module: nn.Module) -> dict[str, tuple[int, int, torch.Tensor]]:
    return {k: (id(t), t.data_ptr(), t.detach().clone()) for k, t in live_tensors(module).items()}


def assert_untouched(module: nn.Module, before: dict[str, tuple[int, int, torch.Tensor]]) -> None:
    for key, tensor in live_tensors(module).items():
        assert (id(tensor), tensor.data_ptr()) == before[key][:2]
        assert torch.equal(tensor, before[key][2]) or tensor.is_meta


# -- what survives -----------------------------------------------------------------------------------------------------


@MODES
def test_objects_flags_and_gradients_survive(commit: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net[0].bias.requires_grad_(False)
    net[0].weight.grad = torch.ones(2, 2)
    net[0].weight.note = "kept"
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = {key: id(tensor) for key, tensor in live_tensors(net).items()}
    tensors = {key: torch.full_like(tensor, 3) for key, tensor in net.state_dict().items()}
    assert loaded(net, tensors, commit) is net
    found = live_tensors(net)
    assert {key: id(tensor) for key, tensor in found.items()} == before
    assert all(float(tensor.detach().flatten()[0]) == 3 for tensor in found.values())
    assert not net[0].bias.requires_grad
    assert net[0].weight.requires_grad
    assert net[0].weight.note == "kept"
    assert net[0].weight.grad.sum() == 4
    optimizer.step()
    assert net[0].weight.tolist() == [[2.0, 2.0]] * 2


def test_swap_gives_new_storage_and_in_place_keeps_it() -> None:
    for commit, same in (("swap", False), ("in_place", True)):
        net = nn.Linear(2, 2)
        pointer = net.weight.data_ptr()
        assign(assigns(fulls(net)), net, commit=commit)
        assert (net.weight.data_ptr() == pointer) is same


class Special(nn.Parameter):
    pass


def test_meta_parameters_keep_object_class_attributes_and_hooks() -> None:
    net = nn.Module()
    net.weight = Special(torch.empty(2, device="meta"))
    net.weight.note = "kept"
    net.weight.register_hook(lambda grad: grad * 10)
    calls: list[torch.Tensor] = []
    net.weight.register_post_accumulate_grad_hook(calls.append)
    weight = net.weight
    assign(assigns(fulls(net)), net)
    assert net.weight is weight
    assert type(weight) is Special
    assert weight.note == "kept"
    assert weight.tolist() == [2.0, 2.0]
    weight.sum().backward()
    assert weight.grad.tolist() == [10.0, 10.0]
    assert len(calls) == 1


def test_who_holds_the_parameters_sees_the_values() -> None:
    net = skeleton(nn.LSTM, 3, 4)
    reference = nn.LSTM(3, 4)
    loaded(net, reference.state_dict())
    x = torch.randn(5, 1, 3)
    assert torch.equal(net(x)[0], reference(x)[0])


# -- ties and views ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, by: str = "identity") -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight if by == "identity" else nn.Parameter(self.embed.weight.data)


@MODES
@pytest.mark.parametrize("by", ["identity", "storage"])
@pytest.mark.parametrize("key", ["embed.weight", "head.weight"])
def test_either_name_of_a_tie_is_enough(commit: Any, by: str, key: str) -> None:
    net = loaded(Tied(by), {key: torch.full((4, 3), 7.0)}, commit)
    assert (net.head.weight is net.embed.weight) is (by == "identity")
    assert net.head.weight.data_ptr() == net.embed.weight.data_ptr()
    assert float(net.head.weight.detach().min()) == 7.0


@MODES
@pytest.mark.parametrize("rows", [4, 3000])
def test_equal_values_under_both_names_are_fine_and_different_ones_are_refused(commit: Any, rows: int) -> None:
    class Large(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.embed.weight = self.head.weight = nn.Parameter(torch.zeros(rows, 2000))

    net = Large()
    value = torch.ones(rows, 2000)
    loaded(net, {"embed.weight": value, "head.weight": value.clone()}, commit)
    before, other = state(net), value.clone()
    other[-1, -1] = -1.0
    with pytest.raises(TieConflictError) as caught:
        loaded(net, {"embed.weight": value * 2, "head.weight": other * 2}, commit)
    assert caught.value.keys == ("embed.weight", "head.weight")
    assert_untouched(net, before)


def test_a_tie_to_a_leaf_that_stays_on_disk_is_checked_too() -> None:
    spec = TensorSpec([4, 3], "float32")
    for rival in (1.0, 2.0):
        net = skeleton(Tied)
        plan = LoadPlan(
            (Offload("embed.weight", full(spec, 1.0), True), Tie("head.weight", "embed.weight", full(spec, rival)))
        )
        if rival == 1.0:
            assert assign(plan, net).head.weight.is_meta
        else:
            with pytest.raises(TieConflictError):
                assign(plan, net)


def test_a_tie_that_the_module_lost_is_made() -> None:
    net = Tied()
    net.head.weight = nn.Parameter(torch.zeros(4, 3))
    plan = LoadPlan(
        (Assign("embed.weight", full(TensorSpec([4, 3], "float32"), 5.0), CPU), Tie("head.weight", "embed.weight"))
    )
    assign(plan, net)
    assert net.head.weight is net.embed.weight
    assert float(net.head.weight.detach().min()) == 5.0


class Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 4).t())
        self.register_buffer("row", self.table.detach()[1])
        self.register_buffer("corner", self.table.detach()[:2, :2], persistent=False)


@MODES
def test_views_follow_their_base(commit: Any) -> None:
    net, value = Viewed(), torch.arange(24.0).view(4, 6)
    loaded(net, {"table": value, "row": value[1].clone()}, commit)
    assert torch.equal(net.table, value)
    assert torch.equal(net.row, value[1])
    assert torch.equal(net.corner, value[:2, :2])
    with torch.no_grad():
        net.table.zero_()
    assert float(net.row.sum()) == float(net.corner.sum()) == 0.0


@MODES
def test_a_view_that_contradicts_its_base_is_refused(commit: Any) -> None:
    net = Viewed()
    before = state(net)
    with pytest.raises(TieConflictError) as caught:
        loaded(net, {"table": torch.ones(4, 6), "row": torch.zeros(6)}, commit)
    assert caught.value.keys == ("table", "row")
    assert_untouched(net, before)


@MODES
def test_a_view_alone_changes_its_part_of_the_base(commit: Any) -> None:
    net = Viewed()
    assign(LoadPlan((Assign("row", full(TensorSpec([6], "float32"), 4.0), CPU),)), net, commit=commit)
    assert net.table.detach()[1].tolist() == [4.0] * 6
    assert net.table.detach()[0].tolist() == [0.0] * 6
    assert net.corner.tolist() == [[0.0, 0.0], [4.0, 4.0]]


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [False, True])
def test_the_plan_s_dtype_is_taken_and_integers_require_no_gradient(bare: bool) -> None:
    net = skeleton(nn.Linear, 2, 2) if bare else nn.Linear(2, 2)
    weight = net.weight
    assign(
        assigns({"weight": full(TensorSpec([2, 2], "bfloat16"), 1.0), "bias": full(TensorSpec([2], "int8"), 3)}), net
    )
    assert net.weight is weight
    assert (net.weight.dtype, net.weight.requires_grad) == (torch.bfloat16, True)
    assert (net.bias.dtype, net.bias.requires_grad) == (torch.int8, False)
    assert isinstance(net.bias, nn.Parameter)


def test_in_place_refuses_another_dtype_and_takes_a_planned_cast() -> None:
    net = nn.Linear(2, 2, bias=False)
    value = full(TensorSpec([2, 2], "float64"), 1.5)
    with pytest.raises(PlanError) as caught:
        assign(assigns({"weight": value}), net, commit="in_place")
    assert caught.value.keys == ("weight",)
    assign(assigns({"weight": cast(value, "float32")}), net, commit="in_place")
    assert float(net.weight.detach().sum()) == 6.0


# -- what a plan may ask -----------------------------------------------------------------------------------------------


def test_initialize_move_and_constructor() -> None:
    net = nn.BatchNorm1d(2)
    net.register_buffer("passing", torch.arange(2.0), persistent=False)
    with torch.no_grad():
        net.weight.fill_(9.0)
    plan = LoadPlan(
        (
            Initialize("", ("weight", "bias"), "reset_parameters", 0, CPU),
            Initialize("", ("running_mean",), "constructor", 0, CPU),
            Move("passing", CPU),
        )
    )
    mean = net.running_mean
    assign(plan, net)
    assert net.weight.tolist() == [1.0, 1.0]
    assert net.running_mean is mean
    assert net.passing.tolist() == [0.0, 1.0]


def test_leaves_without_an_action_keep_what_they_are() -> None:
    net = nn.Linear(2, 2)
    before = state(net)
    assign(LoadPlan(()), net)
    assert_untouched(net, before)


class Stateful(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.weight, self.total, self.broken = nn.Parameter(torch.zeros(2)), torch.zeros(2), broken

    def get_extra_state(self) -> torch.Tensor:
        return self.total

    def set_extra_state(self, state: torch.Tensor) -> None:
        if self.broken:
            self.total.fill_(-1.0)
            self.torn = True
            self.broken = False
            raise OverflowError
        self.total = state


def test_extra_state_is_set() -> None:
    net = loaded(Stateful(), {"weight": torch.ones(2), "_extra_state": torch.full((5,), 3.0)})
    assert net.total.tolist() == [3.0] * 5


def test_after_an_error_in_set_extra_state_the_module_is_what_it_was() -> None:
    net = Stateful(broken=True)
    before, attributes = state(net), dict(vars(net))
    with pytest.raises(OverflowError):
        loaded(net, {"weight": torch.ones(2), "_extra_state": torch.ones(2)})
    assert_untouched(net, before)
    assert dict(vars(net)) == attributes
    assert net.total.tolist() == [0.0, 0.0]


@MODES
def test_live_tensors_are_copied(commit: Any) -> None:
    weight = torch.ones(2, 2)
    net = loaded(nn.Linear(2, 2, bias=False), {"weight": weight}, commit)
    weight.zero_()
    assert float(net.weight.detach().sum()) == 4.0


@MODES
def test_a_module_can_be_loaded_from_itself(commit: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tensors = live_tensors(net)
    first, second = (tensors[key].detach().clone() for key in ("0.weight", "1.weight"))
    swapped = StateDictPlan(
        {key: live(other, tensor_spec(first)) for key, other in (("0.weight", "1.weight"), ("1.weight", "0.weight"))}
    )
    assign(plan_load(module_spec(net), swapped), net, commit=commit, live=tensors)
    assert torch.equal(net[0].weight, second)
    assert torch.equal(net[1].weight, first)


def test_expressions_are_evaluated() -> None:
    net = nn.Linear(2, 3, bias=False)
    parts = {"a": torch.ones(1, 2), "b": torch.zeros(2, 2)}
    plan = plan_load(
        module_spec(net), StateDictPlan({"weight": concat([live(k, tensor_spec(v)) for k, v in parts.items()])})
    )
    assert assign(plan, net, live=parts).weight.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]


# -- files -------------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("rows", [2, 700])
def test_a_file_is_read_into_the_module(commit: Any, rows: int, tmp_path: Path) -> None:
    reference = nn.Sequential(nn.Linear(600, rows), nn.BatchNorm1d(rows))
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    for net in (nn.Sequential(nn.Linear(600, rows), nn.BatchNorm1d(rows)), skeleton(lambda: copy.deepcopy(reference))):
        assign(plan_load(module_spec(net), scan(tmp_path)), net, commit=commit, preflight="read")
        for key, tensor in reference.state_dict().items():
            assert torch.equal(net.state_dict()[key], tensor)


@MODES
def test_a_file_that_changed_is_a_stale_plan(commit: Any, tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    plan, before = plan_load(module_spec(net), scan(tmp_path)), state(net)
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(StalePlanError):
        assign(plan, net, commit=commit)
    assert_untouched(net, before)


def test_a_module_that_changed_under_a_plan_of_files_is_a_stale_plan(tmp_path: Path) -> None:
    apart = Tied()
    apart.head.weight = nn.Parameter(torch.zeros(4, 3))
    save_file(apart.state_dict(), tmp_path / "model.safetensors")
    plan = plan_load(module_spec(apart), scan(tmp_path))
    larger = Tied()
    larger.embed = nn.Embedding(5, 3)
    for net in (Tied("identity"), Tied("storage"), skeleton(Tied), larger):
        with pytest.raises(StalePlanError):
            assign(plan, net)


# -- refusals ----------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    "plan",
    [
        assigns({"other": full(TensorSpec([2], "float32"), 0.0)}),
        assigns({"bias": full(TensorSpec([3], "float32"), 0.0)}),
        LoadPlan((Move("other", CPU),)),
        LoadPlan((Tie("bias", "other"),)),
        LoadPlan((Tie("bias", "weight"),)),
    ],
    ids=["key", "shape", "moved", "tied", "tied shapes"],
)
def test_a_module_that_changed_is_a_stale_plan(commit: Any, plan: LoadPlan) -> None:
    net = nn.Linear(2, 2)
    before = state(net)
    with pytest.raises(StalePlanError):
        assign(plan, net, commit=commit)
    assert_untouched(net, before)


@pytest.mark.parametrize("by", ["identity", "storage"])
def test_leaves_tied_since_the_plan_was_made_are_a_stale_plan(by: str) -> None:
    net = Tied(by)
    with pytest.raises(StalePlanError) as caught:
        assign(assigns(fulls(net)), net)
    assert set(caught.value.keys) == {"embed.weight", "head.weight"}


def test_no_leaf_stays_on_meta_unless_the_plan_says_so() -> None:
    net = skeleton(nn.Linear, 2, 2)
    bias = Assign("bias", full(TensorSpec([2], "float32"), 1.0), CPU)
    with pytest.raises(PlanError) as caught:
        assign(LoadPlan((bias,)), net)
    assert caught.value.keys == ("weight",)
    assert net.bias.is_meta
    assign(LoadPlan((bias, Offload("weight", full(TensorSpec([2, 2], "float32"), 0.0), True))), net)
    assert net.weight.is_meta
    assert net.bias.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "action",
    [
        Move("weight", CPU),
        Initialize("", ("weight",), None, 0, CPU),
        Initialize("", ("weight",), "constructor", 0, CPU),
        Initialize("", ("weight",), "_init_weights", 0, CPU),
    ],
)
def test_what_has_no_value_is_refused(action: Any) -> None:
    net = skeleton(nn.Linear, 2, 2, bias=False)
    with pytest.raises(PlanError) as caught:
        assign(LoadPlan((action,)), net)
    assert caught.value.keys == ("weight",)
    assert net.weight.is_meta


def explode(*_: torch.Tensor) -> torch.Tensor:
    raise LookupError


@MODES
def test_an_error_before_the_first_write_leaves_the_module_alone(commit: Any) -> None:
    net = nn.Linear(2, 2)
    before = state(net)
    bias = TensorSpec([2], "float32")
    plan = assigns({"weight": full(TensorSpec([2, 2], "float32"), 9.0), "bias": Call(f"{__name__}:explode", (), bias)})
    with pytest.raises((LookupError, ActionError)):
        assign(plan, net, commit=commit)
    assert_untouched(net, before)


def test_in_place_says_what_was_done_when_the_end_fails() -> None:
    net = Stateful(broken=True)
    tensors = {"weight": torch.ones(2), "_extra_state": torch.ones(2)}
    with pytest.raises((ActionError, OverflowError)) as caught:
        loaded(net, tensors, "in_place")
    assert isinstance(caught.value, ActionError)
    assert caught.value.done == ("weight",)
    assert isinstance(caught.value.cause, OverflowError)


@pytest.mark.parametrize("cause", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_middle_says_the_same_and_stays_what_it_is(cause: type[BaseException]) -> None:
    net = nn.Linear(2, 2)
    bias = TensorSpec([2], "float32")
    part = full(TensorSpec([2, 2], "float32"), 9.0)
    plan = assigns(
        {"weight": part, "bias": Call(f"{__name__}:interrupted", (full(bias, float(cause is SystemExit)),), bias)}
    )
    with pytest.raises(cause) as caught:
        assign(plan, net, commit="in_place")
    assert caught.value.torn == ("weight", "bias")  # type: ignore[attr-defined]
    assert caught.value.done == ()  # type: ignore[attr-defined]
    assert caught.value.__notes__


def interrupted(which: torch.Tensor) -> torch.Tensor:
    raise SystemExit if which.any() else KeyboardInterrupt


def test_in_place_refuses_elements_that_share_memory() -> None:
    net = nn.Module()
    net.register_buffer("wide", torch.zeros(1).expand(4))
    with pytest.raises(PlanError):
        assign(assigns(fulls(net)), net, commit="in_place")
    assign(assigns(fulls(net)), net)
    assert net.wide.tolist() == [2.0] * 4


def test_copies_of_a_loaded_module_are_independent() -> None:
    net = loaded(skeleton(Tied), {"embed.weight": torch.ones(4, 3)})
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.embed.weight.zero_()
    assert twin.head.weight is twin.embed.weight
    assert float(net.head.weight.detach().sum()) == 12.0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tensors_go_to_their_device() -> None:
    for net in (nn.BatchNorm1d(3), skeleton(nn.BatchNorm1d, 3)):
        weight = net.weight
        loaded(net, nn.BatchNorm1d(3).state_dict(), device_map="cuda:0")
        assert net.weight is weight
        assert {t.device.type for t in live_tensors(net).values()} == {"cuda"}


@pytest.mark.parametrize("commit", ["swap", "in_place"])
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_what_is_loaded_in_inference_mode_can_be_trained(tmp_path, commit, where):
    fm.save(nn.Linear(3, 2), tmp_path)
    net = nn.Linear(3, 2, device=where)
    with torch.inference_mode():
        fm.load(net, tmp_path, commit=commit)
    net(torch.ones(1, 3, requires_grad=True)).sum().backward()
    assert net.weight.grad is not None
