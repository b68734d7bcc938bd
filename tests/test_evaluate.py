"""`materialize`, `stream`, `fill`, `evaluate`: what they promise beside the values themselves."""

import ctypes
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file

from funcmodel.core import build
from funcmodel.errors import ChangedError, PlanError, ShapeError, StalePlanError
from funcmodel.records.expressions import Call, Cast, Concat, Index, Live, Permute, Take
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.evaluate import evaluate, fill, materialize, stream
from funcmodel.run.scan import scan
from funcmodel.run.tensors import tensor_spec

MIB = 1 << 20


@pytest.fixture
def tensors():
    return {
        "q": torch.randn(6, 4),
        "k": torch.randn(2, 4),
        "v": torch.randn(2, 4),
        "norm": torch.randn(4),
        "step": torch.tensor(7),
    }


@pytest.fixture
def plan(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    return scan(tmp_path / "model.safetensors")


def test_materialize_gives_the_tensors_of_the_file_in_plan_order(plan, tensors):
    found = materialize(plan)
    assert list(found) == list(plan)
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert all(not t.is_inference() and not t.requires_grad and t.device.type == "cpu" for t in found.values())


def test_expressions_are_read_into_their_place(plan, tensors):
    qkv = build.concat([plan["q"], plan["k"], plan["v"]])
    wide = build.concat([build.transpose(plan["k"]), build.transpose(plan["v"])], dim=1)
    made = materialize(
        {
            "qkv": qkv,
            "wide": wide,
            "half": build.cast(qkv, "bfloat16"),
            "pruned": build.take(plan["q"], [5, 0, 0], dim=0),
            "grown": build.concat([plan["k"], build.full(TensorSpec([1, 4], "float32"), 2.0)]),
            "flat": build.reshape(qkv, [-1]),
            "turned": build.reshape(build.transpose(plan["q"]), [3, 8]),
        }
    )
    expected = torch.cat([tensors["q"], tensors["k"], tensors["v"]])
    assert torch.equal(made["qkv"], expected)
    assert torch.equal(made["wide"], torch.cat([tensors["k"].T, tensors["v"].T], 1))
    assert torch.equal(made["half"], expected.bfloat16())
    assert torch.equal(made["pruned"], tensors["q"][[5, 0, 0]])
    assert torch.equal(made["grown"], torch.cat([tensors["k"], torch.full((1, 4), 2.0)]))
    assert torch.equal(made["flat"], expected.flatten())
    assert torch.equal(made["turned"], tensors["q"].T.reshape(3, 8))


def test_casts_are_made_one_after_the_other(plan, tensors):
    whole = build.cast(build.cast(plan["q"], "int8"), "float16")
    rough = build.cast(build.cast(build.take(plan["q"], [4, 1]), "float16"), "float64")
    assert torch.equal(evaluate(whole), tensors["q"].to(torch.int8).to(torch.float16))
    assert torch.equal(evaluate(rough), tensors["q"][[4, 1]].to(torch.float16).to(torch.float64))
    live = build.cast(build.cast(build.live("x", TensorSpec([6, 4], "float32")), "int8"), "float16")
    assert torch.equal(evaluate(live, {"x": tensors["q"]}), tensors["q"].to(torch.int8).to(torch.float16))


def test_nodes_that_no_constructor_put_in_order_mean_the_same(plan, tensors):
    turned = Permute(plan["q"], (1, 0))
    made = materialize(
        {
            "take of permute": Take(turned, 0, (3, 0, 1)),
            "take of take": Take(Take(plan["q"], 0, (5, 4, 0)), 0, (2, 0)),
            "permute of take of permute": Permute(Take(turned, 1, (2, 2)), (1, 0)),
            "index of cast of permute": Index(Cast(turned, "float64"), ((1, 3), 4)),
            "permute of concat": Permute(Concat((plan["k"], plan["v"]), 0), (1, 0)),
        }
    )
    assert torch.equal(made["take of permute"], tensors["q"].T[[3, 0, 1]])
    assert torch.equal(made["take of take"], tensors["q"][[0, 5]])
    assert torch.equal(made["permute of take of permute"], tensors["q"][[2, 2]])
    assert torch.equal(made["index of cast of permute"], tensors["q"].T.double()[1:3, 4])
    assert torch.equal(made["permute of concat"], torch.cat([tensors["k"], tensors["v"]]).T)


def test_many_scattered_rows_and_columns(tmp_path):
    w = torch.arange(400 * 300, dtype=torch.int32).reshape(400, 300)
    save_file({"w": w}, tmp_path / "m.safetensors")
    read = scan(tmp_path / "m.safetensors")["w"]
    rows, columns = list(range(101, 399, 2)), [299, *range(3, 250, 3), 7, 7]
    assert torch.equal(evaluate(build.take(read, rows)), w[rows])
    assert torch.equal(evaluate(build.take(read, columns, 1)), w[:, columns])
    assert torch.equal(evaluate(build.take(build.take(read, rows), columns, 1)), w[rows][:, columns])
    live = {"w": w}
    leaf = build.live("w", tensor_spec(w))
    assert torch.equal(evaluate(build.take(build.take(leaf, rows), columns, 1), live), w[rows][:, columns])


def test_results_share_no_memory_with_live_tensors_or_with_each_other():
    x = torch.arange(4.0)
    leaf = build.live("x", TensorSpec([4], "float32"))
    found = materialize({"a": leaf, "b": leaf, "c": build.narrow(leaf, 0, 0, 2)}, live={"x": x})
    x.zero_()
    found["a"].add_(1)
    assert found["a"].tolist() == [1, 2, 3, 4]
    assert found["b"].tolist() == [0, 1, 2, 3]
    assert found["c"].tolist() == [0, 1]


def test_live_parameters_conjugates_and_negatives():
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    z = torch.randn(3, dtype=torch.complex64)
    live = {"p": parameter, "conj": z.conj(), "neg": torch.imag(z.conj())}
    assert live["conj"].is_conj()
    assert live["neg"].is_neg()
    specs = {"p": ([3, 2], "float32"), "conj": ([3], "complex64"), "neg": ([3], "float32")}
    plan = {key: build.live(key, TensorSpec(*spec)) for key, spec in specs.items()}
    plan["rows"] = build.take(plan["neg"], [2, 0])
    found = materialize(plan, live=live)
    assert all(torch.equal(found[key], live[key]) for key in live)
    assert torch.equal(found["rows"], live["neg"][[2, 0]])
    assert not found["p"].requires_grad


@pytest.mark.parametrize("given", [{}, {"x": torch.empty(4, device="meta")}, {"x": torch.eye(4).to_sparse()}])
def test_a_live_tensor_without_data_is_a_plan_error(given):
    with pytest.raises(PlanError) as caught:
        evaluate(build.live("x", TensorSpec([4], "float32")), given)
    assert "x" in caught.value.keys


def test_a_live_tensor_of_another_shape_is_stale():
    with pytest.raises(StalePlanError) as caught:
        evaluate(build.live("x", TensorSpec([4], "float32")), {"x": torch.ones(5)})
    assert (caught.value.expected, caught.value.found) == (
        TensorSpec([4], "float32"),
        TensorSpec([5], "float32"),
    )


def test_meta_is_no_destination(plan):
    with pytest.raises(PlanError):
        materialize(plan, device="meta")


def test_a_default_device_or_dtype_changes_nothing(plan, tensors):
    before = torch.get_default_dtype()
    made = {"noise": build.noise(TensorSpec([3], "float32"), seed=1), "half": build.cast(plan["q"], "float16")}
    expected = materialize({**plan, **made})
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = materialize({**plan, **made})
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(found["q"], tensors["q"])


# -- calls -------------------------------------------------------------------------------------------------------------


def doubled(tensor, *, times=1):
    return tensor * 2**times


def interrupting(tensor):
    raise KeyboardInterrupt


def on_meta(tensor):
    return tensor.to("meta")


HERE = __name__


def test_a_call_runs_a_function_and_its_declared_result_is_checked(plan, tensors):
    spec = TensorSpec([6, 4], "float32")
    made = evaluate(build.call(f"{HERE}:doubled", [plan["q"]], spec, times=3))
    assert torch.equal(made, tensors["q"] * 8)
    with pytest.raises(ShapeError) as caught:
        evaluate(build.call(f"{HERE}:doubled", [plan["q"]], TensorSpec([4, 6], "float32")))
    assert caught.value.found == spec
    with pytest.raises(ShapeError):
        evaluate(build.call(f"{HERE}:on_meta", [plan["q"]], spec))


@pytest.mark.parametrize("name", ["no_such_module:f", f"{HERE}:no_such_function", f"{HERE}:MIB", "", ":"])
def test_a_function_that_cannot_be_imported_is_refused_before_anything_is_read(plan, name):
    with pytest.raises(PlanError) as caught:
        materialize({"a": plan["q"], "b": Call(name, (plan["q"],), TensorSpec([6, 4], "float32"))})
    assert caught.value.keys == ("b",)


def test_an_interrupt_leaves_no_file_open(plan):
    bad = build.call(f"{HERE}:interrupting", [plan["q"]], TensorSpec([6, 4], "float32"))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        materialize({**plan, "bad": bad})
    with pytest.raises(KeyboardInterrupt):
        list(stream({**plan, "bad": bad}))
    abandoned = stream(plan)
    next(abandoned)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    abandoned.close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- dtypes ------------------------------------------------------------------------------------------------------------


def stored(path: Path, entries: dict[str, tuple[str, list[int], bytes]]):
    """A safetensors file made by hand, for types that safetensors' own writer cannot be given."""
    at, header = 0, {}
    for name, (kind, shape, data) in entries.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in entries.values()))
    return scan(path)


def test_dtypes_that_torch_lacks_are_refused_only_where_they_are_wanted(tmp_path):
    plan = stored(tmp_path / "m.safetensors", {"f6": ("F6_E3M2", [4], bytes(3)), "ok": ("U8", [2], b"\1\2")})
    assert evaluate(plan["ok"]).tolist() == [1, 2]
    for expr in (plan["f6"], build.narrow(plan["f6"], 0, 0, 4), build.stack([plan["f6"]] * 2)):
        with pytest.raises(PlanError) as caught:
            materialize({"ok": plan["ok"], "f6": expr})
        assert caught.value.keys == ("f6",)


def test_f4_is_cut_and_joined_on_whole_bytes(tmp_path):
    data = bytes(range(12))
    plan = stored(tmp_path / "m.safetensors", {"w": ("F4", [4, 6], data)})
    rows = torch.tensor(list(data), dtype=torch.uint8).view(4, 3)

    def same(expr, expected):
        found = evaluate(expr)
        assert found.dtype == torch.float4_e2m1fn_x2
        assert torch.equal(found.view(torch.uint8), expected)

    w = plan["w"]
    same(w, rows)
    same(build.narrow(w, 0, 1, 3), rows[1:3])
    same(build.select(w, 0, 2), rows[2])
    same(build.take(w, [3, 0, 0]), rows[[3, 0, 0]])
    same(build.concat([build.narrow(w, 0, 2, 4), build.narrow(w, 0, 0, 2)]), rows.roll(2, 0))
    same(build.stack([w, w]), torch.stack([rows, rows]))
    same(build.concat([w, w], dim=1), torch.cat([rows, rows], 1))
    same(build.reshape(w, [2, 2, 6]), rows.view(2, 2, 3))
    same(build.permute(build.reshape(w, [2, 2, 6]), [1, 0, 2]), rows.view(2, 2, 3).transpose(0, 1))
    with pytest.raises(PlanError):
        evaluate(Permute(w, (1, 0)))
    with pytest.raises(PlanError):
        evaluate(Index(w, ((0, 4), (1, 3))))
    with pytest.raises(PlanError):
        evaluate(build.cast(w, "float32"))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("kind", ["float8_e8m0fnu", "uint16", "uint32", "uint64", "complex32"])
def test_constants_and_casts_of_rarer_dtypes(kind):
    spec = TensorSpec([3], kind)
    assert torch.equal(evaluate(build.full(spec, 2)).to(torch.complex64), torch.full((3,), 2, dtype=torch.complex64))


def test_a_constant_that_the_dtype_cannot_hold_is_a_plan_error():
    with pytest.raises(PlanError):
        evaluate(build.full(TensorSpec([3], "float32"), 1j))


@pytest.mark.parametrize("make", [build.full, build.noise])
def test_torch_computes_nothing_in_packed_types(make):
    expr = make(TensorSpec([4], "F4"), **({"value": 1.0} if make is build.full else {}))
    with pytest.raises(PlanError):
        materialize({"w": expr})


# -- files that change -------------------------------------------------------------------------------------------------


def test_a_file_that_was_replaced_is_stale_and_nothing_is_read(plan, tmp_path, tensors):
    save_file({**tensors, "more": torch.ones(1)}, tmp_path / "model.safetensors")
    destination = torch.zeros(4)
    with pytest.raises(StalePlanError):
        fill({"norm": plan["norm"]}, {"norm": destination})
    assert destination.tolist() == [0, 0, 0, 0]
    with pytest.raises(StalePlanError):
        materialize(plan)
    os.unlink(tmp_path / "model.safetensors")
    with pytest.raises(StalePlanError):
        next(stream(plan))


def test_a_file_that_changes_during_a_stream_is_reported(plan, tmp_path):
    found = stream(plan)
    next(found)
    os.utime(tmp_path / "model.safetensors", ns=(0, 1))
    with pytest.raises(ChangedError):
        list(found)


def test_several_files_may_hold_the_same_names(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, tmp_path / "b.safetensors")
    a, b = scan(tmp_path / "a.safetensors"), scan(tmp_path / "b.safetensors")
    found = materialize({"a": a["norm"], "b": b["norm"], "ab": build.stack([a["q"], b["q"]])})
    assert torch.equal(found["a"] + 1, found["b"])
    assert torch.equal(found["ab"], torch.stack([tensors["q"], tensors["q"] + 1]))


def test_a_file_reference_that_was_copied_is_opened_once(plan, tensors):
    copied = evolve(plan["k"], file=evolve(plan["k"].file))
    found = materialize({"q": plan["q"], "k": copied})
    assert torch.equal(found["k"], tensors["k"])


# -- fill --------------------------------------------------------------------------------------------------------------


def test_fill_writes_into_storage_of_any_strides(plan, tensors):
    base = torch.zeros(12, 8)
    destination = base[::2, 1::2]
    parameter = torch.nn.Parameter(torch.zeros(4))
    version = parameter._version
    fill({"q": plan["q"], "norm": plan["norm"]}, {"q": destination, "norm": parameter})
    assert torch.equal(base[::2, 1::2], tensors["q"])
    assert float(base[1::2].abs().sum()) == 0
    assert torch.equal(parameter.detach(), tensors["norm"])
    assert parameter._version > version


def test_fill_does_not_depend_on_order_where_live_tensors_are_destinations():
    a, b = torch.arange(4.0), torch.arange(4.0) + 10
    spec = TensorSpec([4], "float32")
    fill({"a": build.live("b", spec), "b": build.live("a", spec)}, {"a": a, "b": b}, live={"a": a, "b": b})
    assert a.tolist() == [10, 11, 12, 13]
    assert b.tolist() == [0, 1, 2, 3]


def test_fill_checks_every_destination_before_it_writes(plan):
    first = torch.zeros(4)
    wrong = {
        ShapeError: [torch.zeros(4, 6), torch.zeros(6, 4, dtype=torch.float64)],
        PlanError: [torch.zeros(6, 4, device="meta"), torch.zeros(1, 4).expand(6, 4)],
    }
    for error, destinations in wrong.items():
        for destination in destinations:
            with pytest.raises(error):
                fill({"norm": plan["norm"], "q": plan["q"]}, {"norm": first, "q": destination})
    with pytest.raises(PlanError):
        fill({"norm": plan["norm"], "q": plan["q"]}, {"norm": first})
    assert first.tolist() == [0, 0, 0, 0]


def test_fill_refuses_lazy_conjugates_and_negatives():
    z = torch.zeros(3, dtype=torch.complex64)
    for key, destination in {"conj": z.conj(), "neg": torch.imag(z.conj())}.items():
        with pytest.raises(PlanError):
            fill({key: build.full(tensor_spec(destination), 1)}, {key: destination})


def test_fill_runs_calls_before_it_writes(plan):
    first = torch.zeros(2)
    bad = build.call(f"{HERE}:doubled", [plan["q"]], TensorSpec([4, 6], "float32"))
    with pytest.raises(ShapeError):
        fill({"half": build.narrow(plan["norm"], 0, 0, 2), "bad": bad}, {"half": first, "bad": torch.zeros(4, 6)})
    assert first.tolist() == [0, 0]


# -- size --------------------------------------------------------------------------------------------------------------


def sparse(path: Path, specs: dict[str, tuple[str, list[int], int]]):
    """A file of zeros that takes no disk."""
    at, header = 0, {}
    for name, (kind, shape, nbytes) in specs.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return scan(path)


M_MMAP_THRESHOLD, IS_MMAPPED = -3, 2


def peak(act, size: int) -> int:
    """Bytes by which resident memory rose above its start at its highest, as the kernel counts them.

    What earlier calls left on the heap, and what cannot be trimmed, would serve blocks of `size` bytes: it is taken.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    libc.malloc_trim(0)
    libc.mallopt(M_MMAP_THRESHOLD, 64 << 10)
    taken = [libc.malloc(size)]
    while not ctypes.c_size_t.from_address(taken[-1] - 8).value & IS_MMAPPED:
        taken.append(libc.malloc(size))
    Path("/proc/self/clear_refs").write_text("5")
    start = high_water()
    act()
    found = high_water() - start
    for block in taken:
        libc.free(block)
    return found


def high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


can_measure = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's clear_refs")


@can_measure
@pytest.mark.parametrize("how", ["cast", "transpose", "take", "join", "column"])
def test_a_large_tensor_needs_its_own_bytes_and_a_small_buffer(tmp_path, how):
    w = sparse(tmp_path / "m.safetensors", {"w": ("F32", [2048, 8192], 64 * MIB)})["w"]
    expr = {
        "cast": lambda: build.cast(w, "bfloat16"),
        "transpose": lambda: build.transpose(w),
        "take": lambda: build.cast(build.take(w, range(0, 2048, 2)), "float16"),
        "join": lambda: build.cast(build.concat([build.transpose(w), build.transpose(w)], dim=1), "float16"),
        "column": lambda: build.narrow(w, 1, 100, 4000),
    }[how]()
    size = evaluate(expr).nbytes
    assert size - MIB <= peak(lambda: evaluate(expr), size) <= size + 24 * MIB


@can_measure
def test_a_stream_holds_one_tensor(tmp_path):
    plan = sparse(
        tmp_path / "m.safetensors",
        {
            **{f"big{i}": ("F32", [8 * MIB], 32 * MIB) for i in range(8)},
            **{f"small{i}": ("F32", [4096], 16384) for i in range(8_000)},
        },
    )
    seen = []

    def consume():
        found = stream(plan)
        for key, tensor in found:
            seen.append((key, tensor.nbytes))
            del tensor

    assert peak(consume, 32 * MIB) <= 32 * MIB + 24 * MIB
    assert [key for key, _ in seen] == list(plan)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_one_small_tensor_keeps_no_more_than_its_block_alive(tmp_path):
    plan = sparse(tmp_path / "m.safetensors", {f"t{i}": ("F32", [2048], 8192) for i in range(8000)})

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    materialize(plan)
    before = resident()
    found = materialize(plan)
    everything = resident() - before
    kept = found.pop("t4000")
    del found
    assert resident() - before <= everything - 48 * MIB
    assert float(kept.abs().sum()) == 0


def test_large_tensors_are_read_by_threads_and_equal_what_safetensors_reads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(3 * MIB, generator=generator) for i in range(3)}
    save_file(tensors, tmp_path / "m.safetensors")
    found = materialize(scan(tmp_path / "m.safetensors"))
    expected = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(t.data_ptr() % 64 == 0 for t in found.values())


def test_threads_share_nothing(plan, tensors):
    made = {**plan, "qkv": build.cast(build.concat([plan["q"], plan["k"], plan["v"]]), "float64")}
    expected = materialize(made)
    start = threading.Barrier(4)

    def work(_):
        start.wait()
        return [materialize(made) for _ in range(15)]

    with ThreadPoolExecutor(4) as pool:
        found = [one for many in pool.map(work, range(4)) for one in many]
    assert len(found) == 60
    assert all(torch.equal(one[key], expected[key]) for one in found for key in expected)
    assert len({one["q"].data_ptr() for one in found}) == 60


def test_what_a_destination_covers_in_part_is_copied_first():
    base = np.arange(40, dtype=np.float32)
    whole, late, early = (torch.from_numpy(base[start:stop]) for start, stop in ((0, 40), (20, 40), (10, 20)))
    leaf = Live("w", TensorSpec([40], "float32"))
    plan = {"x": build.narrow(leaf, 0, 0, 20), "y": build.narrow(leaf, 0, 20, 30)}
    fill(plan, {"x": late, "y": early}, live={"w": whole})
    assert late.tolist() == [*range(20)]
    assert early.tolist() == [*range(20, 30)]
