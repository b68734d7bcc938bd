"""Bytes, parameters, costs and origins of plans."""

import pytest
from attrs import evolve

from funcmodel.core import build
from funcmodel.errors import PlanError
from funcmodel.plan.loading import plan_load
from funcmodel.plan.origins import origins
from funcmodel.plan.queries import cost, footprint, nbytes, num_parameters
from funcmodel.plan.saving import plan_save
from funcmodel.records.actions import Assign, Initialize, Offload, WriteShard
from funcmodel.records.devices import CPU, DISK, Device
from funcmodel.records.expressions import Call, Expr, FileRef, Full, Live, Noise, Read
from funcmodel.records.module import ModuleSpec, ParamSpec, SubmoduleSpec, TiedGroup, ViewSpec
from funcmodel.records.plans import LoadPlan, SavePlan, StateDictPlan
from funcmodel.records.reports import Cost, Origin
from funcmodel.records.routes import Routing
from funcmodel.records.tensors import TensorSpec

A, B = (FileRef(f"ckpt/{name}.safetensors", "safetensors", 1 << 20, "") for name in "ab")
W = TensorSpec([8, 4], "float32")
CUDA = Device("cuda", 0)


def stored(name: str, spec: TensorSpec = W, file: FileRef = A) -> Read:
    return Read(file, name, spec, 4096)


def module(**leaves: ParamSpec) -> ModuleSpec:
    return ModuleSpec(name="Net", params=leaves, modules={"": SubmoduleSpec("Net", "reset_parameters")})


# -- sizes ---------------------------------------------------------------------------------------------------------


def test_bytes_count_every_key_and_round_half_bytes_up() -> None:
    plan = StateDictPlan({"w": stored("w"), "v": stored("w"), "f4": Live("f4", TensorSpec([3], "F4"))})
    assert nbytes(plan) == 128 + 128 + 2
    assert num_parameters(plan) == 32 + 32 + 3


def test_parameters_count_ties_once_and_buffers_never() -> None:
    leaf, frozen = ParamSpec(spec=W), ParamSpec(spec=W, requires_grad=False)
    buffer = ParamSpec(spec=TensorSpec([4], "int64"), kind="buffer", persistent=False, device=CPU)
    extra = ParamSpec(spec=W, kind="extra_state", device=CPU)
    spec = ModuleSpec(
        name="Net",
        params={
            "a": leaf,
            "b": leaf,
            "c": frozen,
            "d": buffer,
            "e": extra,
            "part": ParamSpec(spec=TensorSpec([2], "float32")),
        },
        tied=(TiedGroup(("a", "b")),),
        views={"part": ViewSpec("c", (1,), 0)},
    )
    assert num_parameters(spec) == 64
    assert num_parameters(spec, which="trainable") == 32
    assert footprint(spec) == 2 * 128 + 32


def test_a_plan_does_not_know_what_is_trainable() -> None:
    with pytest.raises(PlanError):
        num_parameters(StateDictPlan(), which="trainable")


# -- cost ----------------------------------------------------------------------------------------------------------


def test_a_slice_costs_its_own_bytes() -> None:
    rows = build.narrow(stored("w"), 0, 2, 5)
    found = cost(StateDictPlan({"rows": rows, "v": stored("v", file=B), "z": Full(W, 0.0)}), on="cuda:0")
    assert found.read == {A.path: 3 * 4 * 4, B.path: 128}
    assert found.held == found.peak == {CUDA: 48 + 128 + 128}


def test_half_bytes_are_read_whole() -> None:
    assert cost(StateDictPlan({"w": Read(A, "w", TensorSpec([3, 2], "F4"), 0)})).read == {A.path: 3}


def test_what_is_computed_aside_is_on_top_of_what_stays() -> None:
    call = Call("torch:clone", (stored("w"), stored("v")), TensorSpec([2], "float32"))
    assert cost(StateDictPlan({"c": call})).peak == {CPU: 8 + 8 + 256}
    noise = Noise(TensorSpec([4], "bfloat16"), 0.0, 1.0, 0)
    assert cost(StateDictPlan({"n": noise}), on="cuda:0").peak == {CUDA: 8, CPU: 16}


def test_a_swap_holds_old_and_new_and_meta_pays_nothing() -> None:
    source: dict[str, Expr] = {"w": stored("w")}
    real, meta = (plan_load(module(w=ParamSpec(spec=W, device=where)), source) for where in (CPU, None))
    assert (cost(real).held, cost(real).peak) == ({CPU: 128}, {CPU: 256})
    assert (cost(meta).held, cost(meta).peak) == ({CPU: 128}, {CPU: 128})


def test_every_action_is_counted() -> None:
    tied = (TiedGroup(("a", "b")),)
    buffer = ParamSpec(spec=TensorSpec([4], "int64"), kind="buffer", persistent=False, device=CPU)
    leaves = {"a": ParamSpec(spec=W), "b": ParamSpec(spec=W), "new": ParamSpec(spec=W), "keep": buffer}
    spec = ModuleSpec(name="Net", params=leaves, modules={"": SubmoduleSpec("Net", "reset_parameters")}, tied=tied)
    plan = plan_load(spec, {"a": stored("a"), "b": stored("b", file=B)}, device_map="cuda:0")
    assert cost(plan) == Cost(
        read={A.path: 128, B.path: 128},
        held={CUDA: 128 + 128 + 32},
        peak={CUDA: 288, CPU: 32 + 128},
        cached=128 + 128,
    )


def test_on_disk_only_copies_count() -> None:
    plan = LoadPlan(
        (Offload("a", stored("a"), copy=False), Offload("b", build.cast(stored("b"), "float64"), copy=True))
    )
    assert (cost(plan).read, cost(plan).held, cost(plan).peak) == ({A.path: 128}, {DISK: 256}, {})


def test_a_save_states_what_it_writes_to_the_byte() -> None:
    plan = plan_save(StateDictPlan({key: stored(key) for key in "abcd"}), max_shard_size=256)
    found = cost(plan)
    assert found.read == {A.path: 512}
    assert found.peak == {}
    shards = [a.file for a in plan.actions if isinstance(a, WriteShard)]
    assert [found.written[file] for file in shards] == [4096 + 256] * 2
    assert found.cached == sum(found.read.values()) + sum(found.written.values())
    assert cost(SavePlan()) == Cost()


def test_arguments_of_a_call_wait_for_one_another() -> None:
    x = Live("x", W)
    inner = Call("torch:add", (x, x), W)
    assert cost(StateDictPlan({"a": inner})).peak == {CPU: (1 + 3) * W.nbytes}
    outer = Call("torch:add", (x, inner), W)
    assert cost(StateDictPlan({"a": outer})).peak == {CPU: (1 + 2 + 3) * W.nbytes}
    assert cost(StateDictPlan({"a": Call("torch:add", (inner, x), W)})).peak == {CPU: (1 + 1 + 3) * W.nbytes}


def test_what_is_read_past_the_cache_has_its_span_whoever_made_the_routes() -> None:
    plan = StateDictPlan({"a": stored("a")})
    routes = Routing(routes={"a": "read"}, direct=(A.path,), threads=3)
    assert cost(plan, routes=routes).buffers == 3 * (8 << 20)
    assert cost(plan, routes=evolve(routes, span=4096)).buffers == 3 * 4096
    assert cost(plan, routes=evolve(routes, direct=())).buffers == 0
    for wrong in ({"span": -1}, {"threads": 0}, {"buffers": -1}, {"buffer": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            evolve(routes, **wrong)


def test_a_save_from_a_gpu_states_what_it_pins() -> None:
    large, small = TensorSpec([4, 1024, 1024], "float32"), TensorSpec([100], "uint8")
    leaves = {"a": Live("a", large), "b": Live("b", small)}
    plan = plan_save(StateDictPlan(leaves | {"c": build.cast(Live("a", large), "bfloat16")}), max_shard_size=8 << 20)
    assert (cost(plan).pinned, cost(plan).peak) == (0, {CPU: 8 << 20})
    found = cost(plan, on="cuda:0")
    assert (found.pinned, found.buffers) == (16 << 20, 16 << 20)
    assert found.peak == {CPU: 8 << 20, CUDA: 16 << 20}
    few = cost(plan_save(StateDictPlan({"b": leaves["b"]})), on="cuda:0")
    assert (few.pinned, few.peak) == (200, {CUDA: 200})
    four = {f"{i}": Live(f"{i}", TensorSpec([400_000_000], "uint8")) for i in range(4)}
    many = cost(plan_save(StateDictPlan(four), max_shard_size=400_000_000), on="cuda:0")
    assert (many.pinned, many.peak) == (4 * (16 << 20), {CUDA: 4 * (16 << 20)})


def test_a_save_of_what_is_computed_writes_one_file_at_a_time() -> None:
    spec = TensorSpec([4096, 2048], "float32")
    stands = StateDictPlan({key: Read(FileRef("f", "safetensors", 1 << 30, ""), key, spec, 4096) for key in "abcd"})
    made = StateDictPlan({key: build.cast(expr, "float64") for key, expr in stands.items()})
    apart, changed = (cost(plan_save(plan, max_shard_size=spec.nbytes)) for plan in (stands, made))
    assert (apart.buffers, apart.peak) == (4 * (16 << 20), {})
    assert (changed.buffers, changed.peak) == ((16 << 20) + (64 << 20), {CPU: 2 * spec.nbytes})


# -- origins -------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Expr, Origin]] = {
    "file": (stored("w"), Origin("file", (f"{A.path}:w",))),
    "part": (build.narrow(stored("w"), 0, 0, 8), Origin("file", (f"{A.path}:w",))),
    "mixed": (
        build.concat([stored("w"), Noise(W, 0.0, 1.0, 0), stored("v")]),
        Origin("file", (f"{A.path}:w", f"{A.path}:v")),
    ),
    "live": (Live("x", W), Origin("live", ("x",))),
    "constant": (Full(W, 0.0), Origin("constant")),
    "noise": (Noise(W, 0.0, 1.0, 0), Origin("noise")),
    "computed": (Call("torch:clone", (stored("w"), Live("x", W)), W), Origin("computed", (f"{A.path}:w", "x"))),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_origin_of_an_expression_is_its_most_telling_leaf(name: str) -> None:
    expr, origin = KINDS[name]
    assert origins(module(w=ParamSpec(spec=W)), LoadPlan((Assign("w", expr, CPU),)))["w"] == origin


def test_every_leaf_has_an_origin() -> None:
    buffer = {"kind": "buffer", "device": CPU, "spec": W}
    leaves = {
        "w": ParamSpec(spec=W),
        "twin": ParamSpec(spec=W),
        "new": ParamSpec(spec=W),
        "mean": ParamSpec(**buffer),
        "rope": ParamSpec(**buffer, persistent=False),
        "drawn": ParamSpec(**buffer, persistent=False, random_seed=7),
    }
    spec = ModuleSpec(
        name="Net",
        params=leaves,
        modules={"": SubmoduleSpec("Net", "reset_parameters")},
        tied=(TiedGroup(("w", "twin")),),
        opaque=("_extra_state",),
    )
    assert origins(spec, plan_load(spec, {"twin": stored("t")})) == {
        "w": Origin("file", (f"{A.path}:t",)),
        "twin": Origin("alias", ("w",)),
        "new": Origin("init", ("reset_parameters",)),
        "mean": Origin("constructor"),
        "rope": Origin("constructor"),
        "drawn": Origin("random", ("7",)),
        "_extra_state": Origin("extra_state"),
    }


def test_a_leaf_without_an_origin_or_with_two_is_refused() -> None:
    spec = module(w=ParamSpec(spec=W), v=ParamSpec(spec=W))
    twice = Assign("w", stored("w"), CPU)
    for actions, keys in (((twice,), ("v",)), ((twice, twice, Assign("v", stored("v"), CPU)), ("w",))):
        with pytest.raises(PlanError) as caught:
            origins(spec, LoadPlan(actions))
        assert caught.value.keys == keys
    with pytest.raises(PlanError):
        origins(module(w=ParamSpec(spec=W)), LoadPlan((Initialize("", ("w",), None, 0, CPU),)))
