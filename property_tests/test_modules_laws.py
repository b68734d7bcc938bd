"""Laws of the adapter: what a module says about itself, and what loading does and does not do to it."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from funcmodel.bind import recording
from funcmodel.bind.assign import assign
from funcmodel.bind.inspect import live_tensors, module_spec
from funcmodel.bind.skeleton import skeleton
from funcmodel.errors import FuncmodelError
from funcmodel.plan.loading import plan_load
from funcmodel.records.actions import Assign
from funcmodel.records.devices import CPU
from funcmodel.records.expressions import Call, Live
from funcmodel.records.plans import LoadPlan, StateDictPlan
from funcmodel.run.tensors import tensor_spec
from property_tests.strategies.modules import (
    FEATURES,
    Recipe,
    Stateful,
    built,
    fingerprint,
    recipes,
    scrambled,
    tensor_state,
)


def live_plan(tensors: dict[str, torch.Tensor]) -> StateDictPlan:
    return StateDictPlan({key: Live(key, tensor_spec(tensor)) for key, tensor in tensors.items()})


def load(module: nn.Module, tensors: dict[str, torch.Tensor], commit: Any = "swap") -> nn.Module:
    plan = plan_load(module_spec(module), live_plan(tensors))
    return assign(plan, module, commit=commit, live=tensors)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(one, other)


# -- the strategies themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.__name__)
def test_every_feature_builds_and_torch_can_load_it(feature: Any) -> None:
    """load_state_dict(build(f), state_dict(build(f))) finds no missing and no unexpected key."""
    recipe = Recipe(((feature, ()), (feature, ("a", "b"))))
    source = scrambled(built(recipe), 1)
    result = built(recipe).load_state_dict(source.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys


@given(recipes())
def test_a_recipe_builds_the_same_module_twice(recipe: Recipe) -> None:
    """build(r) ~ build(r), and scrambling changes every leaf that has elements enough to tell."""
    one, two = built(recipe), built(recipe)
    assert list(one.state_dict()) == list(two.state_dict())
    assert all(same_bits(a, b) for a, b in zip(live_tensors(one).values(), live_tensors(two).values(), strict=True))


# -- inspection -------------------------------------------------------------------------------------------------------


@given(recipes())
def test_the_walk_sees_what_state_dict_sees(recipe: Recipe) -> None:
    """keys(persistent leaves) + opaque = keys(state_dict), in order; tied and non-persistent as torch has them."""
    module = built(recipe)
    spec = module_spec(module)
    state = module.state_dict(keep_vars=True)
    assert [k for k, p in spec.params.items() if p.persistent] == [
        k for k, v in state.items() if isinstance(v, torch.Tensor)
    ]
    assert set(spec.opaque) == {k for k, v in state.items() if not isinstance(v, torch.Tensor)}
    tensors = live_tensors(module)
    assert list(tensors) == list(spec.params)
    every = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    assert every.keys() == {k for k, p in spec.params.items() if p.kind != "extra_state"}
    for key, leaf in spec.params.items():
        assert leaf.spec == tensor_spec(tensors[key])
        assert leaf.requires_grad == tensors[key].requires_grad
    assert set(spec.modules) == {name for name, _ in module.named_modules(remove_duplicate=False)}


@given(recipes())
def test_alias_classes_and_views_are_those_of_memory(recipe: Recipe) -> None:
    """Leaves i and j share an element iff they are tied, or views into one base (oracle: writing through one)."""
    module = built(recipe)
    spec = module_spec(module)
    tensors = {k: t for k, t in live_tensors(module).items() if spec.params[k].kind != "extra_state" and t.numel()}
    group = {key: g.keys[0] for g in spec.tied for key in g.keys}
    root = {key: spec.views[key].of if key in spec.views else group.get(key, key) for key in tensors}
    root = {key: group.get(name, name) for key, name in root.items()}
    for key, tensor in tensors.items():
        before = {k: t.detach().clone() for k, t in tensors.items()}
        with torch.no_grad():
            flipped = ~tensor if tensor.dtype is torch.bool else (tensor.to(torch.complex64) + 1).to(tensor.dtype)
            tensor.data.copy_(flipped)
        changed = {k for k, t in tensors.items() if not same_bits(t, before[k])}
        with torch.no_grad():
            tensor.data.copy_(before[key])
        assert all(root[k] == root[key] for k in changed)
        exact = {k for k in tensors if group.get(k, k) == group.get(key, key)}
        assert exact <= changed | {key}
        if key not in spec.views:
            assert changed | {key} == {k for k in tensors if root[k] == root[key]}
    for key, view in spec.views.items():
        base = tensors[view.of].detach()
        part = base.as_strided(tensors[key].shape, view.stride, base.storage_offset() + view.offset)
        assert part.data_ptr() == tensors[key].data_ptr()
        assert same_bits(part, tensors[key])


# -- skeletons --------------------------------------------------------------------------------------------------------


@given(recipes(), st.integers(0, 3), st.sampled_from([1, 1 << 20]))
def test_a_skeleton_has_the_plain_module_s_structure(recipe: Recipe, seed: int, size: int) -> None:
    """spec(skeleton(f)) = spec(f()) up to devices, deterministic buffers ~; whatever is written down, not computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "PENDING_FROM", size)
        bare = skeleton(recipe, seed=seed)
    plain = built(recipe)
    one, two = module_spec(plain), module_spec(bare)
    assert list(one.params) == list(two.params)
    assert one.tied == two.tied
    assert one.views == two.views
    assert one.modules == two.modules
    for key, leaf in two.params.items():
        assert (leaf.spec, leaf.kind, leaf.persistent, leaf.requires_grad) == (
            *(one.params[key].spec, one.params[key].kind, one.params[key].persistent, one.params[key].requires_grad),
        )
    tensors = live_tensors(plain)
    again = live_tensors(skeleton(recipe, seed=seed))
    for key, tensor in live_tensors(bare).items():
        leaf = two.params[key]
        if leaf.kind == "buffer" and not tensor.is_meta:
            assert same_bits(tensor, again[key])
            assert leaf.random_seed in (None, seed)
            if leaf.random_seed is None and key not in two.views and not isinstance(tensor, nn.Parameter):
                assert same_bits(tensor, tensors[key])


# -- loading ----------------------------------------------------------------------------------------------------------


@given(recipes(), st.sampled_from(["swap", "in_place"]), st.integers(1, 9))
def test_law_37_loading_does_what_load_state_dict_does(recipe: Recipe, commit: Any, seed: int) -> None:
    """load(m, s) ~ m.load_state_dict(s); objects, classes and requires_grad are those of before."""
    tensors = tensor_state(scrambled(built(recipe), seed))
    oracle = built(recipe)
    oracle.load_state_dict(tensors, strict=False)
    module = built(recipe)
    before = {key: id(tensor) for key, tensor in live_tensors(module).items()}
    flags = {key: tensor.requires_grad for key, tensor in live_tensors(module).items()}
    load(module, tensors, commit)
    states = {key for key, leaf in module_spec(module).params.items() if leaf.kind == "extra_state"}
    for key, tensor in live_tensors(module).items():
        assert same_bits(tensor, live_tensors(oracle)[key])
        assert key in states or id(tensor) == before[key]
        assert tensor.requires_grad == flags[key]
    assert module_spec(module).tied == module_spec(oracle).tied
    assert module_spec(module).views == module_spec(oracle).views


@given(recipes(), st.integers(1, 9))
def test_law_35_ties_are_ties_after_loading_a_skeleton(recipe: Recipe, seed: int) -> None:
    """After apply to a skeleton: m.a.weight is m.b.weight for every tie, values ~ load_state_dict, nothing on meta."""
    tensors = tensor_state(scrambled(built(recipe), seed))
    oracle = built(recipe)
    oracle.load_state_dict(tensors, strict=False)
    module = load(skeleton(recipe), tensors)
    spec = module_spec(module)
    found = live_tensors(module)
    for group in spec.tied:
        if group.by == "identity":
            assert len({id(found[key]) for key in group.keys}) == 1
    assert spec.tied == module_spec(oracle).tied
    for key, tensor in found.items():
        assert not tensor.is_meta
        assert spec.params[key].random_seed is not None or same_bits(tensor, live_tensors(oracle)[key])


@given(recipes(), st.data())
def test_law_48_the_report_is_that_of_load_state_dict(recipe: Recipe, data: st.DataObject) -> None:
    """report(plan) = load_state_dict(strict=False) for equal shapes, ties resolved."""
    tensors = tensor_state(built(recipe))
    lost = data.draw(st.sets(st.sampled_from(sorted(tensors)))) if tensors else set()
    given_ = {key: tensor for key, tensor in tensors.items() if key not in lost}
    given_.update({name: torch.ones(1) for name in data.draw(st.sets(st.sampled_from(["x", "a.y", "blocks.0.z"])))})
    module = built(recipe)
    spec = module_spec(module)
    versioned = OrderedDict(given_)
    versioned._metadata = module.state_dict()._metadata  # without it, torch takes the file for one of 2017
    said = built(recipe).load_state_dict(versioned, strict=False)
    report = plan_load(spec, live_plan(given_)).report
    tied = {key: group.keys for group in spec.tied for key in group.keys}
    missing = {
        key
        for key in said.missing_keys
        if key not in spec.opaque and not any(name in given_ for name in tied.get(key, ()))
    }
    assert set(report.missing_keys) == missing
    assert set(report.unexpected_keys) == set(said.unexpected_keys)


@given(recipes(), st.integers(0, 3))
def test_law_51_nothing_writes_to_a_tensor_after_it_was_loaded(recipe: Recipe, seed: int) -> None:
    """Loaded tensors share no memory with the source, and their version does not move when another load fails."""
    tensors = tensor_state(scrambled(built(recipe), seed))
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    module = load(built(recipe), tensors)
    for tensor in live_tensors(module).values():
        if tensor.numel():
            tensor.data.zero_()
    assert all(same_bits(tensors[key], kept[key]) for key in tensors)


class InterruptedStateful(Stateful):
    """Fails, or is interrupted, after it has changed something."""

    failure: BaseException = KeyboardInterrupt()

    def set_extra_state(self, state: torch.Tensor) -> None:
        if self.armed:
            self.armed = False
            self.state.add_(1)
            self.weight_seen = True
            raise self.failure
        self.state.copy_(state)

    armed = True


def explode(*_: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError


@given(recipes(min_size=1), st.booleans(), st.sampled_from(["call", "state", "interrupt", "missing live"]))
def test_after_any_error_the_module_is_bit_and_object_identical(recipe: Recipe, bare: bool, how: str) -> None:
    """apply(plan, m) raises => m = m before: objects, addresses, bits, attributes."""

    def factory() -> nn.Module:
        module = recipe()
        module.add_module("last", InterruptedStateful())
        return module

    tensors = tensor_state(scrambled(built(factory), 1))
    module = skeleton(factory) if bare else built(factory)
    module.last.failure = KeyboardInterrupt() if how == "interrupt" else ZeroDivisionError()
    module.last.armed = how in ("state", "interrupt")
    plan = plan_load(module_spec(module), live_plan(tensors))
    if how == "call":
        spec = tensor_spec(tensors["last.weight"])
        bad = Assign("last.weight", Call(f"{__name__}:explode", (), spec), CPU)
        plan = LoadPlan(tuple(bad if getattr(a, "key", "") == "last.weight" else a for a in plan.actions), plan.report)
    if how == "missing live":
        del tensors["last.weight"]
    before = fingerprint(module)
    attributes = dict(vars(module.last))
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt, FuncmodelError)):
        assign(plan, module, live=tensors)
    attributes.pop("armed"), before.pop("last.attributes")
    after = fingerprint(module)
    after.pop("last.attributes")
    assert after == before
    assert {k: v for k, v in vars(module.last).items() if k != "armed"}.keys() == attributes.keys()
