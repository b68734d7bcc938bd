"""Laws of `plan_load` and `checked`. Oracle of law 48: torch's `load_state_dict` on a module built from the spec."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from funcmodel.core.shapes import spec_of
from funcmodel.errors import KeyMismatchError, PlacementError, PlanError
from funcmodel.plan.loading import checked, plan_load
from funcmodel.plan.origins import origins
from funcmodel.plan.queries import cost, footprint, num_parameters
from funcmodel.records.actions import Assign, Initialize, Move, Offload, Tie
from funcmodel.records.devices import CPU, Device
from funcmodel.records.expressions import Expr, FileRef, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import ModuleSpec, ParamSpec, SubmoduleSpec, TiedGroup
from funcmodel.records.plans import LoadPlan, StateDictPlan
from funcmodel.records.reports import LoadPolicy, LoadReport
from funcmodel.records.tensors import TensorSpec
from property_tests.strategies.specs import Case, cases, fitting_cases, module_specs

plain_specs = module_specs(odd=False)
LENIENT = LoadPolicy(missing="init", unexpected="ignore", mismatched="init")


def acted_on(plan: LoadPlan) -> list[str]:
    return [key for a in plan.actions for key in (a.keys if isinstance(a, Initialize) else (a.key,))]


def refusal(plan: LoadPlan, policy: LoadPolicy) -> PlanError | None:
    try:
        checked(plan, policy)
    except PlanError as error:
        return error
    return None


def built(spec: ModuleSpec) -> nn.Module:
    """A module with the leaves of `spec`, ties included."""
    modules = {"": nn.Module()}
    for name in spec.modules:
        if name:
            above, _, last = name.rpartition(".")
            modules[name] = nn.Module()
            modules[above].add_module(last, modules[name])
    shared: dict[str, torch.Tensor] = {}
    groups = {key: group for group in spec.tied for key in group.keys}
    for key, leaf in spec.params.items():
        above, _, last = key.rpartition(".")
        group = groups.get(key)
        first = group.keys[0] if group else key
        tensor = shared.setdefault(first, torch.zeros(leaf.spec.shape, dtype=getattr(torch, leaf.spec.dtype.name)))
        if leaf.kind == "buffer":
            modules[above].register_buffer(last, tensor, persistent=leaf.persistent)
        elif group is None or group.by == "storage":
            modules[above].register_parameter(last, nn.Parameter(tensor.detach(), leaf.requires_grad))
        else:
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, leaf.requires_grad)
            shared[first] = parameter
            modules[above].register_parameter(last, parameter)
    return modules[""]


# -- law 48 --------------------------------------------------------------------------------------------------------


@given(cases(plain_specs, mismatches=False))
def test_law_48_the_report_says_what_load_state_dict_says(case: Case) -> None:
    """`report = load_state_dict(strict=False)` for equal shapes, a key whose twin is there not being missing."""
    held = {
        k: torch.zeros(spec_of(e).shape, dtype=getattr(torch, spec_of(e).dtype.name)) for k, e in case.source.items()
    }
    said = built(case.spec).load_state_dict(held, strict=False)
    report = plan_load(case.spec, case.source).report
    twins = {key: group.keys for group in case.spec.tied for key in group.keys}
    missing = {key for key in said.missing_keys if not any(twin in held for twin in twins.get(key, ()))}
    assert set(report.missing_keys) == missing
    assert set(report.unexpected_keys) == set(said.unexpected_keys)
    assert report.mismatched_keys == ()
    assert [key for key in case.spec.params if key in missing] == list(report.missing_keys)
    assert [key for key in case.source if key in said.unexpected_keys] == list(report.unexpected_keys)


@given(cases())
def test_the_report_names_exactly_what_is_wrong(case: Case) -> None:
    """`report` of a source that lacks, adds and bends given keys = those keys."""
    report = plan_load(case.spec, case.source).report
    assert set(report.missing_keys) == set(case.missing)
    assert set(report.unexpected_keys) == set(case.unexpected)
    assert {m.key for m in report.mismatched_keys} == set(case.mismatched)
    for mismatch in report.mismatched_keys:
        assert mismatch.expected == case.spec.params[mismatch.key].spec
        assert mismatch.found == spec_of(case.source[mismatch.key])


# -- law 34 --------------------------------------------------------------------------------------------------------


@given(fitting_cases())
def test_law_34_any_one_key_of_a_group_is_enough(case: Case) -> None:
    """`plan_load(spec, source - (group - key)).report` is empty for every key of every group."""
    entries = dict(case.source)
    for group in case.spec.tied:
        saved = [key for key in group.keys if case.spec.params[key].persistent]
        expr = next((entries[key] for key in saved if key in entries), None)
        for key in saved:
            assert expr is not None
            source = {k: e for k, e in entries.items() if k not in group.keys} | {key: expr}
            plan = plan_load(case.spec, source)
            report = plan.report
            assert not report.missing_keys
            assert not report.unexpected_keys
            assert not report.mismatched_keys
            assert not report.initialized_keys
            assert {a.key: a.expr for a in plan.actions if isinstance(a, Assign)}[group.keys[0]] == expr
            assert {a.key: a.to for a in plan.actions if isinstance(a, Tie)}.items() >= dict.fromkeys(
                group.keys[1:], group.keys[0]
            ).items()


# -- origins are total ---------------------------------------------------------------------------------------------


@given(cases(), st.integers())
def test_every_leaf_has_exactly_one_action(case: Case, seed: int) -> None:
    """`sorted(keys of actions) = sorted(spec.params - meta_keys)`; actions name the seed and a concrete device."""
    plan = plan_load(case.spec, case.source, seed=seed)
    assert sorted(acted_on(plan)) == sorted(set(case.spec.params) - set(plan.report.meta_keys))
    order = {Initialize: 0, Assign: 1, Offload: 1, Move: 2, Tie: 3}
    ranks = [order[type(action)] for action in plan.actions]
    assert ranks == sorted(ranks)
    assert {a.seed for a in plan.actions if isinstance(a, Initialize)} <= {seed}
    assert all(not isinstance(a, Tie) and a.device.type != "meta" for a in plan.actions if hasattr(a, "device"))


@given(cases())
def test_origins_are_total(case: Case) -> None:
    """`keys(origins(spec, plan)) = params + opaque`, or a `PlanError` that names the leaves without one."""
    plan = plan_load(case.spec, case.source)
    without = {key for a in plan.actions if isinstance(a, Initialize) and a.how is None for key in a.keys}
    without |= set(plan.report.meta_keys)
    if without:
        with pytest.raises(PlanError) as caught:
            origins(case.spec, plan)
        assert set(caught.value.keys) == without
        return
    found = origins(case.spec, plan)
    tied = {key for group in case.spec.tied for key in group.keys}
    assert list(found) == [*case.spec.params, *case.spec.opaque]
    for key, origin in found.items():
        leaf = case.spec.params.get(key)
        if leaf is not None and not leaf.persistent and key not in tied:
            assert origin.kind in ("constructor", "random")
            assert (origin.kind == "random") == (leaf.random_seed is not None)


# -- checked -------------------------------------------------------------------------------------------------------


@given(cases(), st.sampled_from([LoadPolicy(), LENIENT]))
def test_checked_changes_nothing(case: Case, policy: LoadPolicy) -> None:
    """`checked(plan, policy) is plan`, or it raises and names what it refused."""
    plan = plan_load(case.spec, case.source)
    again = plan_load(case.spec, case.source)
    error = refusal(plan, policy)
    assert checked(plan, policy) is plan if error is None else error.keys
    assert plan == again


@given(cases())
def test_a_plan_passes_strictly_only_if_nothing_was_found(case: Case) -> None:
    """`checked(plan)` raises `KeyMismatchError` iff a key is missing, unexpected or mismatched."""
    error = refusal(plan_load(case.spec, case.source), LoadPolicy())
    wrong = {*case.missing, *case.unexpected, *case.mismatched}
    assert isinstance(error, KeyMismatchError) == bool(wrong)
    assert error is None or set(error.keys) == wrong or set(error.keys) <= set(case.spec.params)


@given(cases())
def test_waivers_of_every_finding_are_a_lenient_policy(case: Case) -> None:
    """`checked(plan, allow=findings)` and `checked(plan, missing="init", ...)` agree; each waiver is needed."""
    plan = plan_load(case.spec, case.source)
    literal = [f"missing:{k}" for k in case.missing] + [f"unexpected:{k}" for k in case.unexpected]
    literal += [f"mismatched:{k}" for k in case.mismatched]

    waived, lenient = refusal(plan, LoadPolicy(allow=literal)), refusal(plan, LENIENT)
    assert (type(waived), waived and waived.keys) == (type(lenient), lenient and lenient.keys)
    for waiver in literal:
        with pytest.raises(KeyMismatchError):
            checked(plan, LoadPolicy(allow=[w for w in literal if w != waiver]))


# -- dtypes and places ---------------------------------------------------------------------------------------------


@given(fitting_cases(plain_specs), st.sampled_from(["bfloat16", "float64", "int64"]))
def test_dtype_module_gives_every_leaf_its_dtype_or_reports_a_change_of_kind(case: Case, dtype: str) -> None:
    """`spec_of(assigned).dtype = module's` unless the kinds differ; `file` leaves every expression as it is."""
    bent = {key: evolve(leaf, spec=TensorSpec(leaf.spec.shape, dtype)) for key, leaf in case.spec.params.items()}
    spec = evolve(case.spec, params=bent)
    kinds = {c.key for c in plan_load(spec, case.source, dtype="module").report.dtype_changes if c.loss == "kind"}
    for action in plan_load(spec, case.source, dtype="module").actions:
        if isinstance(action, Assign):
            same = spec_of(action.expr) == spec.params[action.key].spec
            assert same or kinds & {action.key, *(k for g in spec.tied if action.key in g.keys for k in g.keys)}
    for action in plan_load(spec, case.source, dtype="file").actions:
        if isinstance(action, Assign):
            assert action.expr in case.source.values()


@given(fitting_cases(), st.data())
def test_the_most_specific_entry_decides(case: Case, data: st.DataObject) -> None:
    """`device(key)` = the entry of the first of key, parent, grandparent, ..., "" that has one."""
    names = sorted({*case.spec.modules, *case.spec.params} - {""})
    some = data.draw(st.dictionaries(st.sampled_from(names), st.integers(0, 3), max_size=4)) if names else {}
    entries = {"": "cpu", **some}
    canonical = {key: group.keys[0] for group in case.spec.tied for key in group.keys}

    def place(key: str) -> Device:
        while key not in entries:
            key = key.rpartition(".")[0]
        return CPU if entries[key] == "cpu" else Device("cuda", int(entries[key]))

    parted = [group.keys for group in case.spec.tied if len({place(key) for key in group.keys}) > 1]
    if parted:
        with pytest.raises(PlacementError) as caught:
            plan_load(case.spec, case.source, device_map=entries)
        assert caught.value.keys == parted[0]
        return
    for action in plan_load(case.spec, case.source, device_map=entries).actions:
        if not isinstance(action, Tie | Offload):
            for key in action.keys if isinstance(action, Initialize) else (action.key,):
                assert action.device == place(canonical.get(key, key))


# -- queries -------------------------------------------------------------------------------------------------------


@given(plain_specs)
def test_parameters_are_counted_as_torch_counts_them(spec: ModuleSpec) -> None:
    """`num_parameters(spec) = sum(p.numel() for p in module.parameters())`, storage twins counted once as well."""
    module = built(spec)
    once = {id(p) if 0 in p.shape else p.data_ptr(): p for p in module.parameters()}
    empty = {i: p for i, p in once.items() if p.numel()}
    assert num_parameters(spec) == sum(p.numel() for p in empty.values())
    assert num_parameters(spec, which="trainable") == sum(p.numel() for p in empty.values() if p.requires_grad)
    buffers = {b.data_ptr(): b for b in module.buffers() if b.numel()}
    tensors = [*empty.values(), *buffers.values()]
    assert footprint(spec) == sum(t.numel() * t.element_size() for t in tensors)


@given(fitting_cases(module_specs(odd=False, devices=st.just(None))))
def test_what_is_held_is_what_the_module_takes(case: Case) -> None:
    """`sum(cost(plan).held) = footprint(spec)` where the dtypes are the module's; on meta nothing is replaced."""
    plan = plan_load(case.spec, case.source)
    if not plan.report.meta_keys:
        assert sum(cost(plan).held.values()) == footprint(case.spec)
    assert set(plan.replaced) <= {CPU}


# -- law 32 --------------------------------------------------------------------------------------------------------


class Counting(Mapping[str, Expr]):
    """A source that counts how often it is asked."""

    def __init__(self, entries: dict[str, Expr]) -> None:
        self.entries = entries
        self.asked = 0

    def __getitem__(self, key: str) -> Expr:
        self.asked += 1
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        for key in self.entries:
            self.asked += 1
            yield key

    def __len__(self) -> int:
        return len(self.entries)


def blocks(count: int, *, flaw: str) -> tuple[ModuleSpec, dict[str, Expr]]:
    """A deep module of `count` blocks with a tie in each, and a source with a flaw."""
    file = FileRef("m.safetensors", "safetensors", 1 << 40, "")
    leaf = ParamSpec(spec=TensorSpec([2, 2], "float32"))
    names = [f"top.a.{i}.b.{i % 7}.{word}" for i in range(count) for word in ("weight", "bias", "twin")]
    tied = tuple(TiedGroup((f"top.a.{i}.b.{i % 7}.weight", f"top.a.{i}.b.{i % 7}.twin")) for i in range(count))
    modules = {name.rpartition(".")[0]: SubmoduleSpec("Block", "reset_parameters") for name in names}
    spec = ModuleSpec(name="Net", params=dict.fromkeys(names, leaf), modules=FrozenMap(modules), tied=tied)
    held = [name for name in names if not name.endswith(".twin")]
    prefix = "x." if flaw == "prefix" else ""
    source: dict[str, Expr] = {prefix + name: Read(file, name, leaf.spec, 0) for name in held}
    if flaw == "missing":
        source = {name: expr for name, expr in source.items() if not name.endswith(".bias")}
    if flaw == "unexpected":
        source |= {f"{name}.more": expr for name, expr in source.items()}
    return spec, source


def calls(work: Callable[[], object]) -> int:
    """How many functions `work` calls, Python's and C's."""
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("flaw", ["none", "missing", "unexpected", "prefix"])
@pytest.mark.parametrize("device_map", [None, {"": "cpu", "top.a": "cuda:0", "top.a.0": "cuda:1"}])
def test_law_32_planning_is_linear(flaw: str, device_map: object) -> None:
    """`work(2n) <= 2.1 work(n)`: look-ups in the source, and calls of any function (each record made is one)."""
    sizes = []
    for count in (150, 300):
        spec, entries = blocks(count, flaw=flaw)
        source = Counting(entries)

        def work(spec: ModuleSpec = spec, source: Counting = source) -> None:
            plan = plan_load(spec, source, device_map=device_map)
            assert (refusal(plan, LoadPolicy(missing="init")) is None) == (flaw in ("none", "missing"))

        sizes.append((calls(work), source.asked, len(entries)))
    (small, asked_small, _), (large, asked_large, held) = sizes
    assert large <= 2.1 * small
    assert asked_large <= 2.1 * asked_small
    assert asked_large <= 4 * held


# -- law 45 --------------------------------------------------------------------------------------------------------

EFFECTS = """
import random, sys
import funcmodel.plan.codec, funcmodel.plan.describe, funcmodel.plan.queries
from funcmodel.plan.loading import checked, plan_load
from funcmodel.plan.saving import plan_save
from funcmodel.plan.sharding import plan_shards
from funcmodel.plan.codec import from_json, to_json
from funcmodel.plan.describe import describe
from funcmodel.plan.diff import diff
from funcmodel.plan.origins import origins
from funcmodel.plan.queries import cost
from funcmodel.plan.origins import origins
from funcmodel.records.devices import CPU
from funcmodel.records.expressions import FileRef, Read
from funcmodel.records.module import ModuleSpec, ParamSpec, TiedGroup
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.reports import LoadPolicy
from funcmodel.records.tensors import TensorSpec
from funcmodel.errors import KeyMismatchError

def forbid(event, arguments):
    if event == "open" or event.startswith(("os.", "socket.", "shutil.", "subprocess.", "import")):
        raise SystemExit(f"effect: {event} {arguments}")

spec = TensorSpec([4, 2], "float32")
file = FileRef("ckpt/m.safetensors", "safetensors", 1 << 20, "")
leaves = {f"layers.{i}.w": ParamSpec(spec=spec, device=CPU) for i in range(9)}
leaves["tie"] = leaves["layers.0.w"]
leaves["gone"] = ParamSpec(spec=spec)
module = ModuleSpec(name="Net", params=leaves, tied=(TiedGroup(("layers.0.w", "tie")),))
source = {f"layers.{i}.w": Read(file, f"layers.{i}.w", spec, 4096 + 32 * i) for i in range(8)}
source["surplus"] = source["layers.0.w"]
init, device_map, sizes = {"gone": "pkg.mod:zeros", "{*k}": "reset_parameters"}, {"": "cpu"}, {"a": 3, "b": 9}
arguments = source, init, device_map, sizes
before = [dict(a) for a in arguments], random.getstate(), sorted(sys.modules)
sys.addaudithook(forbid)
plan = plan_load(module, source, device_map=device_map, init=init, dtype="module", seed=3)
policy = LoadPolicy(missing="init", unexpected="ignore")
checked(plan, policy)
try:
    checked(plan)
    raise SystemExit("not refused")
except KeyMismatchError as error:
    str(error)
saved = plan_save(StateDictPlan(source), max_shard_size=64)
plan_shards(sizes, 10)
for value in (plan, saved, module, StateDictPlan(source)):
    describe(value), from_json(to_json(value))
describe(diff(StateDictPlan(source), StateDictPlan())), cost(plan), cost(saved), origins(module, plan)
assert before == ([dict(a) for a in arguments], random.getstate(), sorted(sys.modules)), "something changed"
print("pure")
"""


def test_law_45_planners_perform_no_effects() -> None:
    """Under an audit hook that raises on `open`, `os.*`, `socket.*` and imports, every `plan_*` gives its plan."""
    done = subprocess.run([sys.executable, "-c", EFFECTS], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "pure\n", "")


@given(cases())
def test_law_45_planners_leave_the_generators_and_the_arguments_alone(case: Case) -> None:
    """Global generators, default dtype, and the source are after `plan_load` what they were before."""
    source = dict(case.source)
    before = torch.random.get_rng_state(), random.getstate(), torch.get_default_dtype(), dict(source)
    refusal(plan_load(case.spec, source), LENIENT)
    after = torch.random.get_rng_state(), random.getstate(), torch.get_default_dtype(), dict(source)
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert list(source) == list(case.source)


# -- the strategies ------------------------------------------------------------------------------------------------


@given(fitting_cases())
def test_a_fitting_case_fits(case: Case) -> None:
    """The strategy keeps its word: nothing missing, unexpected or mismatched."""
    report = plan_load(case.spec, case.source).report
    assert evolve(report, tied_keys=(), skipped_keys=(), meta_keys=(), dtype_changes=()) == LoadReport()
    assert not case.held_back or case.spec.tied
    assert isinstance(case.source, StateDictPlan)
