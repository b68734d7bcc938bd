"""The routes by example: what each of them gives, what it refuses, and what borrowed tensors may be used for."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import funcmodel as fm
from funcmodel.core import build
from funcmodel.errors import (
    ActionError,
    ChangedError,
    CheckpointError,
    DigestError,
    KeyMismatchError,
    PlanError,
    StalePlanError,
)
from funcmodel.plan.routing import LARGE, routing
from funcmodel.records.routes import ROUTES
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.evaluate import fill, materialize, stored_files
from funcmodel.run.machine import machine

MIB = 1 << 20
HERE = __name__
# Every way in which a load can be asked to go.
WAYS: dict[str, dict[str, Any]] = {
    "chosen": {},
    **{route: {"route": route} for route in ROUTES},
    "borrow": {"memory": "borrow"},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_own_way = pytest.mark.parametrize("way", [{}, *({"route": r} for r in ROUTES if r != "map")])


class Net(nn.Module):
    """Ties, buffers of both kinds, a frozen parameter, one of no elements and one of no axes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.body = nn.Linear(8, 3)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("angles", torch.linspace(0, 1, 4), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids)) * self.scale + self.body(self.embed(ids)).sum()


def randomized(seed: int) -> Net:
    net = Net()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    net.steps += seed
    return net


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def same(found: nn.Module, expected: nn.Module) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for key in one:
        assert (one[key].shape, one[key].dtype) == (other[key].shape, other[key].dtype)
        assert bits(one[key]) == bits(other[key])


def pages_of(path: Path) -> int:
    """How many mappings of files below a folder this process has."""
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- what one sees -----------------------------------------------------------------------------------------------------


def test_a_plan_says_by_which_route_each_tensor_comes(tmp_path: Path) -> None:
    save_file({"w": torch.randn(256, 256), "b": torch.randn(4)}, tmp_path / "m.safetensors")
    plan = fm.scan(tmp_path / "m.safetensors")
    wanted = {**plan, "half": build.cast(plan["w"], "bfloat16")}
    found = machine(stored_files(wanted.values()), smallest=0)
    assert dict(routing(wanted, found).routes) == {"w": "read", "b": "slab", "half": "transform"}
    assert dict(routing(wanted, found, memory="borrow").routes) == {"w": "map", "b": "map", "half": "transform"}
    assert dict(routing(wanted, found, route={"w": "stage"}).routes) == {"w": "stage", "b": "slab", "half": "transform"}
    assert dict(routing(wanted, found, into="existing").routes) == {"w": "read", "b": "read", "half": "transform"}


def test_only_what_is_borrowed_is_mapped(tmp_path: Path) -> None:
    fm.save(randomized(0), tmp_path)
    own = fm.load(Net(), tmp_path)
    assert pages_of(tmp_path) == 0
    assert own.scale.item() == randomized(0).scale.item()
    borrowed = fm.load(Net(), tmp_path, memory="borrow")
    assert pages_of(tmp_path) == 1
    same(borrowed, own)


def test_the_last_reference_frees_what_was_loaded(tmp_path: Path) -> None:
    fm.save(randomized(0), tmp_path)
    gc.collect()
    gc.disable()
    try:
        net = fm.load(Net(), tmp_path, memory="borrow")
        assert pages_of(tmp_path) == 1
        del net
        assert pages_of(tmp_path) == 0
    finally:
        gc.enable()


# -- modules -----------------------------------------------------------------------------------------------------------


@every_way
def test_a_module_is_the_same_by_every_route(tmp_path: Path, way: dict[str, Any]) -> None:
    trained = randomized(1)
    fm.save(trained, tmp_path)
    for made in (Net(), fm.skeleton(Net)):
        parameter = made.embed.weight
        net = fm.load(made, tmp_path, **way)
        same(net, trained)
        assert net.head.weight is net.embed.weight is parameter
        assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in trained.parameters()]
        assert not net.steps.requires_grad
        assert torch.equal(net.angles, trained.angles)
        assert all(t.device.type == "cpu" for t in net.state_dict().values())


@pytest.mark.parametrize("way", [{}, *({"route": route} for route in ROUTES)])
def test_existing_storage_is_filled_by_every_route(tmp_path: Path, way: dict[str, Any]) -> None:
    trained = randomized(2)
    fm.save(trained, tmp_path)
    net = Net()
    before = {key: t.data_ptr() for key, t in net.state_dict().items()}
    fm.load(net, tmp_path, commit="in_place", **way)
    same(net, trained)
    assert {key: t.data_ptr() for key, t in net.state_dict().items()} == before


@pytest.mark.parametrize(
    "way", [{"memory": "borrow"}, {"route": {"{*key}": "map"}}, {"route": {"body.{x}": "slab"}}], ids=str
)
def test_existing_storage_cannot_be_borrowed(tmp_path: Path, way: dict[str, Any]) -> None:
    fm.save(randomized(3), tmp_path)
    net = randomized(4)
    with pytest.raises(PlanError):
        fm.load(net, tmp_path, commit="in_place", **way)
    same(net, randomized(4))


@pytest.mark.parametrize("route", ["map", "slab"])
def test_a_plan_that_is_routed_into_fresh_memory_is_not_applied_in_place(tmp_path: Path, route: Any) -> None:
    fm.save(randomized(3), tmp_path)
    net = randomized(4)
    plan = fm.checked(fm.plan_load(fm.module_spec(net), fm.scan(tmp_path)))
    found = machine(stored_files(a.expr for a in plan.actions if hasattr(a, "expr")), smallest=0)
    with pytest.raises(PlanError) as caught:
        fm.apply(routed_by(plan, found, route), net, commit="in_place")
    assert "body.weight" in caught.value.keys
    same(net, randomized(4))
    fm.apply(routed_by(plan, found, route), net)
    same(net, randomized(3))


def routed_by(plan: Any, found: Any, route: Any) -> Any:
    from funcmodel.plan.routing import routed

    return routed(plan, found, route=route)


@every_way
def test_training_goes_on_after_every_route(tmp_path: Path, way: dict[str, Any]) -> None:
    fm.save(randomized(5), tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()

    def trained(net: Net) -> Net:
        for _ in range(2):
            net.zero_grad()
            net(torch.tensor([1, 2, 3])).square().mean().backward()
            with torch.no_grad():
                for p in net.parameters():
                    p.sub_(0.1 * p.grad if p.grad is not None else 0)
        return net

    found, expected = trained(fm.load(Net(), tmp_path, **way)), trained(randomized(5))
    same(found, expected)
    assert not torch.equal(found.embed.weight, randomized(5).embed.weight)
    assert file.read_bytes() == raw


# -- dtypes and formats ------------------------------------------------------------------------------------------------


def of_every_kind() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (12 * 16,), dtype=torch.uint8, generator=generator)
    kinds = ["float64", "int64", "uint64", "float32", "complex64", "bfloat16", "float16", "uint16", "float8_e4m3fn"]
    tensors = {kind: raw.view(getattr(torch, kind))[:12].reshape(3, 4).clone() for kind in kinds}
    tensors["bool"] = (raw[:12] % 2).bool().reshape(3, 4)
    tensors["scalar"] = torch.tensor(-7)
    tensors["empty"] = torch.empty(0, 3, dtype=torch.float16)
    tensors["byte"] = raw[:5].clone()  # what follows starts at odd offsets where the file is not padded
    return tensors


def unpadded(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file whose tensors begin wherever the last one ended, a byte after a multiple of eight."""
    at, header = 0, {}
    for key, tensor in tensors.items():
        kind = json.loads(header_of(path.parent, tensor))["t"]["dtype"]
        header[key] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header)
    text += " " * ((1 - len(text)) % 8)
    data = b"".join(map(bits, tensors.values()))
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)


def header_of(folder: Path, tensor: torch.Tensor) -> bytes:
    save_file({"t": tensor}, folder / "one")
    raw = (folder / "one").read_bytes()
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")]


@every_way
@pytest.mark.parametrize("form", ["safetensors", "unpadded", "zip"])
def test_tensors_of_every_kind_come_by_every_route(tmp_path: Path, way: dict[str, Any], form: str) -> None:
    tensors = of_every_kind()
    path = tmp_path / ("m.bin" if form == "zip" else "m.safetensors")
    if form == "zip":
        tensors["turned"] = torch.arange(12.0).reshape(3, 4).t()
        tensors["part"] = torch.arange(100)[3:9:2]
        torch.save(tensors, path)
        oracle = torch.load(path, weights_only=True)
    else:
        (unpadded if form == "unpadded" else save_file)(dict(reversed(tensors.items())), path)
        oracle = load_file(path)
    plan = fm.scan(path)
    found = materialize(plan, **way)
    into = {key: torch.empty_like(t) for key, t in tensors.items()}
    if "memory" not in way:
        fill(plan, into, **way)
    for key, expected in tensors.items():
        assert bits(oracle[key]) == bits(expected)
        assert (found[key].shape, found[key].dtype) == (expected.shape, expected.dtype)
        assert bits(found[key]) == bits(expected)
        assert "memory" in way or bits(into[key]) == bits(expected)
        assert found[key].data_ptr() % max(1, expected.element_size()) == 0


def test_what_does_not_begin_at_an_element_is_read_instead_of_borrowed(tmp_path: Path) -> None:
    unpadded({"a": torch.ones(5, dtype=torch.uint8), "b": torch.arange(4.0)}, tmp_path / "m.safetensors")
    plan = fm.scan(tmp_path / "m.safetensors")
    found = machine(stored_files(plan.values()), smallest=0)
    assert dict(routing(plan, found, memory="borrow").routes) == {"a": "map", "b": "slab"}
    with pytest.raises(PlanError) as caught:
        materialize(plan, route={"b": "map"})
    assert caught.value.keys == ("b",)


# -- errors ------------------------------------------------------------------------------------------------------------


@every_way
def test_a_file_that_was_cut_short_replaced_or_removed_is_stale(tmp_path: Path, way: dict[str, Any]) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"w": torch.randn(300, 300), "b": torch.randn(3)}, file)
    plan = fm.scan(file)
    wanted = {**plan, "half": build.cast(plan["w"], "bfloat16")}
    raw = file.read_bytes()
    for change in (
        lambda: os.truncate(file, len(raw) - 1),
        lambda: save_file({"w": torch.randn(300, 301), "b": torch.randn(3)}, file),
        lambda: file.unlink(),
    ):
        change()
        for expr in ({"w": wanted["w"]}, {"half": wanted["half"]}, wanted):
            with pytest.raises(StalePlanError) as caught:
                materialize(expr, **way)
            assert caught.value.path == str(file)
        file.write_bytes(raw)
    assert materialize(wanted, **way).keys() == wanted.keys()


@every_way
def test_a_bad_checkpoint_is_the_same_error_and_the_module_is_untouched(tmp_path: Path, way: dict[str, Any]) -> None:
    fm.save(randomized(6), tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    net = randomized(7)
    for bad, error, code in (
        (raw[:-1], CheckpointError, "TRUNCATED"),
        (raw[:4], CheckpointError, "TOO_SMALL"),
        (raw + b"PK", CheckpointError, "TRAILING_BYTES"),
    ):
        file.write_bytes(bad)
        with pytest.raises(error) as caught:
            fm.load(net, tmp_path, **way)
        assert caught.value.code == code
    save_file({"other": torch.ones(2)}, file)
    with pytest.raises(KeyMismatchError) as mismatch:
        fm.load(net, tmp_path, **way)
    assert "body.weight" in mismatch.value.report.missing_keys
    file.unlink()
    with pytest.raises(CheckpointError):
        fm.load(net, tmp_path, **way)
    same(net, randomized(7))
    file.write_bytes(raw)
    same(fm.load(net, tmp_path, **way), randomized(6))


def touched(tensor: torch.Tensor, *, path: str) -> torch.Tensor:
    os.utime(path, ns=(0, 1))
    return tensor


def cut(tensor: torch.Tensor, *, path: str) -> torch.Tensor:
    os.truncate(path, 4096)
    return tensor


@every_way
@pytest.mark.parametrize("what", ["touched", "cut"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, way: dict[str, Any], what: str) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"w": torch.randn(200, 100), "b": torch.randn(30)}, file)
    plan = fm.scan(file)
    change = build.call(f"{HERE}:{what}", [build.full(TensorSpec([1], "float32"), 1)], TensorSpec([1], "float32"))
    change = build.call(change.fn, change.args, change.spec, path=str(file))
    before = descriptors()
    for wanted in ({**plan, "change": change}, {"change": change, "half": build.cast(plan["w"], "float16")}):
        with pytest.raises(ChangedError) as caught:
            materialize(wanted, **way)
        assert caught.value.path == str(file)
        save_file({"w": torch.randn(200, 100), "b": torch.randn(30)}, file)
    assert descriptors() == before


@pytest.mark.parametrize("way", [{}, *({"route": route} for route in ROUTES)])
def test_what_fails_in_place_names_what_is_torn(tmp_path: Path, way: dict[str, Any]) -> None:
    file = tmp_path / "m.safetensors"
    net = nn.Linear(100, 200)
    save_file({k: t.clone() for k, t in net.state_dict().items()}, file)
    bias = build.call(f"{HERE}:touched", [build.full(TensorSpec([200], "float32"), 1)], TensorSpec([200], "float32"))
    bias = build.call(bias.fn, bias.args, bias.spec, path=str(file))
    plan = fm.plan_load(fm.module_spec(net), {**fm.scan(file), "bias": bias})
    with pytest.raises(ActionError) as caught:
        fm.apply(fm.bind.assign.probed(plan, commit="in_place", **way), net, commit="in_place")
    assert isinstance(caught.value.cause, ChangedError)
    assert set(caught.value.torn) == {"weight", "bias"}


@every_way
def test_digests_find_a_flipped_bit_by_every_route(tmp_path: Path, way: dict[str, Any]) -> None:
    fm.save(randomized(8), tmp_path, digests="sha256")
    file = tmp_path / "model.safetensors"
    net = randomized(9)
    same(fm.load(Net(), tmp_path, digest="check", **way), randomized(8))
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 16
    file.write_bytes(raw)
    with pytest.raises(DigestError) as caught:
        fm.load(net, tmp_path, digest="check", **way)
    assert caught.value.tensor in net.state_dict()
    same(net, randomized(9))
    fm.load(net, tmp_path, **way)  # nobody asked


def test_routes_that_cannot_be_taken_are_refused_before_anything_is_opened(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"w": torch.randn(4, 4), "b": torch.randn(4)}, file)
    plan = fm.scan(file)
    wanted = {"w": build.transpose(plan["w"]), "b": plan["b"]}
    file.unlink()
    for key, route in ("w", "map"), ("w", "read"), ("w", "slab"), ("v", "read"):
        with pytest.raises(PlanError) as caught:
            materialize(wanted, route={key: route})  # type: ignore[dict-item]
        assert caught.value.keys == (key,)


# -- borrowed tensors --------------------------------------------------------------------------------------------------


def test_writing_to_a_borrowed_tensor_leaves_the_file_and_other_borrowers_as_they_are(tmp_path: Path) -> None:
    fm.save(randomized(10), tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    one, other = (fm.load(Net(), tmp_path, memory="borrow") for _ in range(2))
    with torch.no_grad():
        for p in one.parameters():
            p.fill_(0.5)
    same(other, randomized(10))
    assert file.read_bytes() == raw
    assert bool((one.embed.weight == 0.5).all())


def test_borrowed_tensors_hold_no_descriptor_and_live_on_when_the_file_is_gone(tmp_path: Path) -> None:
    fm.save(randomized(11), tmp_path)
    before = descriptors()
    net = fm.load(Net(), tmp_path, memory="borrow")
    assert descriptors() == before
    (tmp_path / "model.safetensors").unlink()
    same(net, randomized(11))


def test_a_module_can_be_saved_onto_the_files_that_it_is_borrowed_from(tmp_path: Path) -> None:
    fm.save(randomized(12), tmp_path, max_shard_size=1000)
    net = fm.load(Net(), tmp_path, memory="borrow")
    fm.save(net, tmp_path, max_shard_size=1000)
    same(net, randomized(12))
    with torch.no_grad():
        net.scale.fill_(3)
    fm.save(net, tmp_path)
    same(fm.load(Net(), tmp_path), net)
    assert net.embed.weight.equal(randomized(12).embed.weight)
    assert net.scale.item() == 3


def test_torch_saves_of_a_borrowed_tensor_its_own_bytes_only(tmp_path: Path) -> None:
    tensors = {"small": torch.randn(100), "large": torch.randn(500_000)}
    save_file(tensors, tmp_path / "m.safetensors")
    found = materialize(fm.scan(tmp_path / "m.safetensors"), memory="borrow")
    torch.save(found["small"], tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 4096
    assert torch.equal(torch.load(tmp_path / "small.pt", weights_only=True), tensors["small"])
    assert found["small"].untyped_storage().nbytes() == 400


def test_rows_of_a_stored_tensor_are_borrowed_and_columns_are_read(tmp_path: Path) -> None:
    w = torch.randn(64, 64)
    save_file({"w": w}, tmp_path / "m.safetensors")
    read = fm.scan(tmp_path / "m.safetensors")["w"]
    plan = {"rows": build.narrow(read, 0, 8, 24), "row": build.select(read, 0, 3)}
    plan["columns"] = build.narrow(read, 1, 0, 9)
    found = materialize(plan, memory="borrow")
    assert torch.equal(found["rows"], w[8:24])
    assert torch.equal(found["row"], w[3])
    assert torch.equal(found["columns"], w[:, :9])
    chosen = routing(plan, machine(stored_files(plan.values()), smallest=0), memory="borrow")
    assert dict(chosen.routes) == {"rows": "map", "row": "map", "columns": "transform"}


@every_own_way
def test_own_tensors_do_not_change_with_their_file(tmp_path: Path, way: dict[str, Any]) -> None:
    file = tmp_path / "m.safetensors"
    w = torch.randn(300, 300)
    save_file({"w": w}, file)
    read = fm.scan(file)["w"]
    found = materialize({"w": read, "part": build.narrow(read, 0, 3, 9), "half": build.cast(read, "bfloat16")}, **way)
    with file.open("r+b") as other:
        other.write(bytes(file.stat().st_size))
        other.truncate(8)
    assert torch.equal(found["w"], w)
    assert torch.equal(found["part"], w[3:9])
    assert torch.equal(found["half"], w.bfloat16())


def test_borrowed_and_computed_tensors_of_one_large_cold_file(tmp_path: Path) -> None:
    w = torch.arange(LARGE // 4, dtype=torch.int32)
    file = tmp_path / "m.safetensors"
    save_file({"w": w, "v": torch.arange(1000.0)}, file)
    plan = fm.scan(file)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found = materialize({"half": build.cast(plan["w"], "int16"), "v": plan["v"]}, memory="borrow")
    assert torch.equal(found["half"], w.to(torch.int16))
    assert found["v"].tolist() == list(range(1000))


def test_a_stream_of_a_mapped_file_holds_nobody_back_between_two_tensors(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    w = torch.arange(LARGE // 4, dtype=torch.int32)
    save_file({"w": w}, file)
    plan = {"a": build.cast(fm.scan(file)["w"], "int16")}
    plan["b"] = plan["a"]
    found = fm.stream(plan)
    key, tensor = next(found)
    os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))  # would be refused while the file is held still
    assert key == "a"
    assert torch.equal(tensor, w.to(torch.int16))
    assert torch.equal(next(found)[1], tensor)
    assert list(found) == []


@every_way
def test_opaque_nodes_read_by_every_route(tmp_path: Path, way: dict[str, Any]) -> None:
    file = tmp_path / "m.safetensors"
    w = torch.arange(64, dtype=torch.float32).reshape(8, 8)
    save_file({"w": w}, file)
    turned = build.transpose(build.cast(fm.scan(file)["w"], "float64"))
    call = build.call("torch:clone", [turned], TensorSpec([8, 8], "float64"))
    plan = {f"flat{i}": build.reshape(turned, [4, 16]) for i in range(3)} | {"call": call, "half": turned}
    found = materialize(plan, **way)
    assert all(torch.equal(found[f"flat{i}"], w.double().t().reshape(4, 16)) for i in range(3))
    assert torch.equal(found["call"], w.double().t())
    assert torch.equal(found["half"], w.double().t())
    assert pages_of(tmp_path) == 0
