"""The same bits on a GPU as on the CPU."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file
from torch import nn

import funcmodel as fm
from funcmodel.core import build as of
from funcmodel.core.shapes import spec_of
from funcmodel.plan.routing import routing
from funcmodel.records.expressions import Call
from funcmodel.records.routes import Machine
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.evaluate import fill, fill_routed, materialize, materialize_routed, stream
from funcmodel.run.formats import FORMATS

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def build() -> nn.Module:
    net = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 50, bias=False))
    net[3].weight = net[0].weight
    return net


def leaves(net: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers(remove_duplicate=False))}


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_a_load_onto_the_device_is_the_load_onto_the_cpu(dtype: str | None, tmp_path: Path) -> None:
    fm.save(build(), tmp_path, max_shard_size="1KB")
    source = fm.scan(tmp_path) if dtype is None else fm.cast(dtype)(fm.scan(tmp_path))
    here = fm.load(fm.skeleton(build), source)
    there = fm.load(fm.skeleton(build), source, device_map="cuda:0")
    assert there[3].weight is there[0].weight
    for name, leaf in leaves(there).items():
        assert leaf.device == torch.device("cuda:0")
        assert torch.equal(leaf.cpu(), leaves(here)[name])


@pytest.mark.parametrize("commit", ["swap", "in_place"])
def test_a_module_on_the_device_stays_there(commit: str, tmp_path: Path) -> None:
    saved, net = build(), build().cuda()
    fm.save(saved, tmp_path)
    before = {name: id(leaf) for name, leaf in leaves(net).items()}
    fm.load(net, tmp_path, commit=commit)  # type: ignore[arg-type]
    assert {name: id(leaf) for name, leaf in leaves(net).items()} == before
    assert all(torch.equal(leaf.cpu(), leaves(saved)[name]) for name, leaf in leaves(net).items())


def test_a_save_from_the_device_is_the_save_from_the_cpu(tmp_path: Path) -> None:
    net = build()
    fm.save(net, tmp_path / "cpu")
    fm.save(net.cuda(), tmp_path / "cuda")
    assert (tmp_path / "cpu/model.safetensors").read_bytes() == (tmp_path / "cuda/model.safetensors").read_bytes()


def test_a_slice_through_a_cast_is_the_same_on_both(tmp_path: Path) -> None:
    fm.save(build(), tmp_path)
    part = fm.pipe(fm.scan(tmp_path), fm.tp_slice({"1.{*r}": 0}, rank=1, world_size=2), fm.cast("bfloat16"))
    here, there = fm.materialize(part), fm.materialize(part, device="cuda:0")
    assert all(torch.equal(there[key].cpu(), here[key]) for key in here)


# -- the ring ----------------------------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)
MIB = 1 << 20


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(bits(found), bits(expected))


def stored(path: Path, large: int = 3000) -> dict[str, Any]:
    """The plan of two files with tensors of every kind."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    small = {f"small.{i}": drawn(i % 50 + 1, 7) for i in range(1000)}
    others = {
        "large": drawn(large, 2500),
        "half": drawn(1237, 999).bfloat16(),
        "f8": drawn(256, 256).to(torch.float8_e4m3fn),
        "bool": drawn(100, 100) > 0,
        "long": torch.arange(30_000).view(100, 300),
        "complex": torch.complex(drawn(300, 200), drawn(300, 200)),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 7, dtype=torch.int16),
        "odd": torch.arange(7, dtype=torch.uint8),
    }
    save_file(small, path / "small.safetensors")
    save_file(others, path / "others.safetensors")
    return {**dict(fm.scan(path / "small.safetensors")), **dict(fm.scan(path / "others.safetensors"))}


def changed(plan: dict[str, Any]) -> dict[str, Any]:
    spec = TensorSpec([2_100_001], "float32")
    return {
        "rows": of.narrow(plan["large"], 0, 100, 900),
        "columns": of.narrow(plan["large"], 1, 3, 2000),
        "turned": of.transpose(plan["large"]),
        "picked": of.take(plan["half"], [300, 2, 2, 7], 0),
        "picked columns": of.take(plan["half"], [5, 400, 5], 1),
        "joined": of.concat([plan["large"], of.full(TensorSpec([3, 2500], "float32"), 2.0), plan["large"]]),
        "stacked": of.stack([plan["f8"], plan["f8"]]),
        "down": of.cast(plan["large"], "bfloat16"),
        "down, turned": of.transpose(of.cast(plan["large"], "float16")),
        "to f8": of.cast(plan["half"], "float8_e4m3fn"),
        "up": of.cast(plan["half"], "float32"),
        "up, turned": of.transpose(of.cast(plan["half"], "float64")),
        "up from f8": of.cast(plan["f8"], "bfloat16"),
        "to integers": of.cast(plan["large"], "int64"),
        "of bool": of.cast(plan["bool"], "int32"),
        "flat": of.reshape(of.transpose(plan["half"]), [-1]),
        "cut of flat": of.narrow(of.reshape(of.transpose(plan["half"]), [-1]), 0, 5, 999_999),
        "turned complex": of.transpose(plan["complex"]),
        "full": of.full(spec, 0.1),
        "half full": of.cast(of.full(spec, 0.1), "bfloat16"),
        "noise": of.noise(spec, mean=1, std=2, seed=3),
        "half noise": of.cast(of.noise(spec, mean=1, std=2, seed=3), "bfloat16"),
        "turned noise": of.transpose(of.noise(TensorSpec([300, 70], "float16"), mean=1, std=2, seed=3)),
        "called": Call("torch:clone", (plan["large"],), plan["large"].spec),
    }


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("pinned", [False, True])
def test_every_way_onto_the_device_gives_the_bits_of_the_cpu(threads: int, pinned: bool, tmp_path: Path) -> None:
    plan = stored(tmp_path)
    wanted = {**plan, **changed(plan)}
    here = materialize(wanted)
    routes = evolve(
        routing(wanted, Machine(threads=threads), on="cuda:0"), pinned=pinned, buffers=2 * threads, threads=threads
    )
    there = materialize_routed(wanted, routes, GPU, None, FORMATS, "ignore")
    assert list(there) == list(wanted)
    for key, tensor in there.items():
        assert tensor.device == GPU
        same(tensor, here[key])
    for key, tensor in stream(wanted, device="cuda"):
        same(tensor, here[key])
    strided = {key: torch.empty((*t.shape, 2), dtype=t.dtype, device=GPU).select(-1, 1) for key, t in here.items()}
    fill_routed(wanted, routes, strided, None, FORMATS, "ignore")
    for key, tensor in strided.items():
        same(tensor, here[key])


def test_in_inference_mode_too(tmp_path: Path) -> None:
    plan = stored(tmp_path)
    wanted = changed(plan)
    with torch.inference_mode():
        there = materialize(wanted, device=GPU)
    for key, tensor in materialize(wanted).items():
        same(there[key], tensor)
    fill({"turned": wanted["turned"]}, {"turned": there["turned"]})


@pytest.mark.parametrize("own", [False, True])
def test_the_stream_of_the_caller_is_kept(own: bool, tmp_path: Path) -> None:
    """What is still running on it when memory is taken again, and what is given to it next, see the right bytes."""
    plan = {"large": stored(tmp_path)["large"]}
    plan["turned"] = of.transpose(plan["large"])
    here = materialize(plan)
    stream_ = torch.cuda.Stream(GPU) if own else torch.cuda.current_stream(GPU)
    with torch.cuda.stream(stream_):
        for _ in range(5):
            late = torch.empty(3000 * 2500, device=GPU)
            torch.cuda._sleep(50_000_000)
            late.fill_(float("nan"))  # still to come when its memory is free for what is loaded
            del late
            found = materialize(plan, device=GPU)
            copies = {key: tensor.clone() for key, tensor in found.items()}  # without any wait
            into = {key: torch.zeros_like(tensor) for key, tensor in found.items()}
            torch.cuda._sleep(50_000_000)
            for tensor in into.values():
                tensor.fill_(float("nan"))
            fill(plan, into)
            sums = {key: tensor.clone() for key, tensor in into.items()}
            assert torch.cuda.current_stream(GPU) == stream_
            for key, expected in here.items():
                same(copies[key], expected)
                same(sums[key], expected)


def test_the_device_holds_the_tensors_and_a_scratch_and_no_more(tmp_path: Path) -> None:
    plan = stored(tmp_path, large=12_000)
    wanted = {
        "turned": of.transpose(plan["large"]),
        "large": plan["large"],
        "up": of.cast(plan["half"], "float32"),
    }
    held = sum(spec_of(expr).nbytes for expr in wanted.values())
    materialize({"scalar": plan["scalar"]}, device=GPU)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    routes = routing(wanted, Machine(threads=4), on="cuda:0")
    there = materialize_routed(wanted, routes, GPU, None, FORMATS, "ignore")
    torch.cuda.synchronize()
    # Each thread has a scratch, and makes at most one part contiguous or picks from it.
    assert torch.cuda.max_memory_allocated(GPU) - before <= held + 4 * 2 * routes.buffer + 4 * MIB
    assert torch.cuda.memory_allocated(GPU) - before <= held + 4 * MIB
    assert len(there) == 3


def test_parameters_on_the_device_are_written_in_place(tmp_path: Path) -> None:
    saved = nn.Sequential(nn.Linear(2000, 1500), nn.Linear(1500, 70))
    fm.save(saved, tmp_path)
    net = nn.Sequential(nn.Linear(2000, 1500), nn.Linear(1500, 70)).cuda()
    places = {name: leaf.data_ptr() for name, leaf in leaves(net).items()}
    versions = {name: leaf._version for name, leaf in leaves(net).items()}
    fm.load(net, tmp_path, commit="in_place")
    assert {name: leaf.data_ptr() for name, leaf in leaves(net).items()} == places
    for name, leaf in leaves(net).items():
        assert leaf._version > versions[name]
        assert leaf.requires_grad
        same(leaf, leaves(saved)[name])


def test_live_tensors_of_the_device_do_not_leave_it() -> None:
    held = torch.randn(3000, 2000, device=GPU)
    expr = of.transpose(of.live("x", TensorSpec([3000, 2000], "float32")))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found = materialize({"a": expr}, device=GPU, live={"x": held})
        torch.cuda.synchronize()
    same(found["a"], held.T.contiguous())
    assert not [event for event in profile.events() if "DtoH" in event.name]
    same(materialize({"a": expr}, live={"x": held})["a"], held.T.contiguous())
    same(materialize({"a": expr}, live={"x": held.cpu()}, device=GPU)["a"], held.T.contiguous())


def test_an_interrupt_leaves_no_thread_and_no_copy(tmp_path: Path) -> None:
    plan = stored(tmp_path)
    calls: list[int] = []

    def read(file: Any, buffer: memoryview, offset: int) -> None:
        file.read_into(buffer, offset)
        calls.append(offset)
        if len(calls) == 3:
            raise KeyboardInterrupt

    others = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        materialize(plan, device=GPU, formats=(evolve(FORMATS[0], read=read),))
    assert set(threading.enumerate()) <= others
    found = materialize(plan, device=GPU)
    for key, tensor in materialize(plan).items():
        same(found[key], tensor)


def test_a_save_from_the_device_passes_through_buffers(tmp_path: Path) -> None:
    made = materialize({key: expr for key, expr in stored(tmp_path).items() if key != "empty"}, device=GPU)
    made["strided"] = made["large"][::3, 5:].T
    made["conjugate"] = made["complex"].clone().conj()
    late = torch.zeros(1000, 1000, device=GPU)
    torch.cuda._sleep(50_000_000)
    made["late"] = late.add_(1)
    fm.save(made, tmp_path / "cuda")
    fm.save({key: tensor.cpu() for key, tensor in made.items()}, tmp_path / "cpu")
    written = load_file(tmp_path / "cuda/model.safetensors")
    for key, tensor in made.items():
        same(written[key], tensor.resolve_conj())
    assert (tmp_path / "cuda/model.safetensors").read_bytes() == (tmp_path / "cpu/model.safetensors").read_bytes()


def test_shards_are_written_at_once_behind_what_the_device_was_given(tmp_path: Path) -> None:
    tensors = {f"{i}": torch.zeros(100_000_000, device=GPU) for i in range(4)}  # as many bytes as are worth pinning for
    own = torch.cuda.Stream()
    with torch.cuda.stream(own):
        own.wait_stream(torch.cuda.default_stream())
        torch.cuda._sleep(500_000_000)
        for i, tensor in enumerate(tensors.values()):
            tensor.add_(i + 1)
        saved = fm.save(tensors, tmp_path, shards=4)
    assert len(saved.files) == 4
    assert all(bool((tensor == int(key) + 1).all()) for key, tensor in materialize(fm.scan(tmp_path)).items())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_two_devices_take_each_what_is_theirs(tmp_path: Path) -> None:
    plan = stored(tmp_path)
    wanted = changed(plan)
    here = materialize(wanted)
    into = {key: torch.empty(t.shape, dtype=t.dtype, device=f"cuda:{i % 2}") for i, (key, t) in enumerate(here.items())}
    fill(wanted, into)
    second = materialize(wanted, device="cuda:1")
    on = {key: torch.device("cuda", i % 2) if i % 3 else torch.device("cpu") for i, key in enumerate(wanted)}
    routes = routing(wanted, Machine(threads=4), on=on)
    beside = materialize_routed(wanted, routes, on, None, FORMATS, "ignore")
    assert torch.cuda.current_device() == 0
    for key, tensor in here.items():
        same(into[key], tensor)
        same(second[key], tensor)
        same(beside[key], tensor)
        assert second[key].device == torch.device("cuda", 1)
        assert beside[key].device == on[key]
