"""The ring: what passes through buffers on its way to a device, and what comes back through them."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import funcmodel as fm
from funcmodel.bind.assign import assign
from funcmodel.bind.inspect import module_spec
from funcmodel.core import build
from funcmodel.errors import ChangedError, PlanError, StalePlanError, TruncatedError
from funcmodel.plan.loading import plan_load
from funcmodel.plan.routing import FEW_PINNED, MANY, PAGEABLE, PINNED, routed, routing
from funcmodel.records.dtypes import dtype
from funcmodel.records.expressions import Call, Read
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.routes import Machine
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.boxes import box_of
from funcmodel.run.crew import Crew
from funcmodel.run.drain import Drain, Drains
from funcmodel.run.engine import source
from funcmodel.run.evaluate import fill, materialize, materialize_routed
from funcmodel.run.files import open_regular
from funcmodel.run.formats import FORMATS
from funcmodel.run.lanes import CELLS, lane_to
from funcmodel.run.machine import machine
from funcmodel.run.mapped import Held
from funcmodel.run.passages import Passage, Span, exact, passages
from funcmodel.run.ring import Ring
from funcmodel.run.scan import scan
from funcmodel.run.slabs import ALONE, alignment, homes
from funcmodel.run.tensors import torch_dtype, torch_shape
from tests.lazy_lane import LazyDevice

CPU = torch.device("cpu")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(bits(found), bits(expected))


@cache
def content() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        **{f"small.{i}": drawn(i + 1, 7) for i in range(100)},
        "large": drawn(700, 900),
        "half": drawn(333, 411).bfloat16(),
        "f8": drawn(64, 64).to(torch.float8_e4m3fn),
        "bool": drawn(40, 40) > 0,
        "odd": torch.arange(7, dtype=torch.uint8),
        "complex": torch.complex(drawn(30, 20), drawn(30, 20)),
        "long": torch.arange(5000).view(50, 100),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 7, dtype=torch.int16),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files, whose data begins at odd bytes."""
    path = tmp_path_factory.mktemp("ring")
    tensors = content()
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for i, (key, tensor) in enumerate(tensors.items()):
        shards[i % 3][key] = tensor
    for i, shard in enumerate(shards):
        file = path / f"{i}.safetensors"
        save_file(shard, file)
        raw = file.read_bytes()
        n = int.from_bytes(raw[:8], "little")
        text = raw[8 : 8 + n].rstrip(b" ")
        text += b" " * ((4 - len(text)) % 8 + 1)
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])
        assert (8 + len(text)) % 2
    return path


@pytest.fixture(scope="module")
def plan(folder: Path) -> dict[str, Read]:
    found: dict[str, Read] = {}
    for i in range(3):
        found.update(scan(folder / f"{i}.safetensors"))  # type: ignore[arg-type]
    return {key: found[key] for key in content()}


def expressions(plan: dict[str, Read]) -> dict[str, tuple[object, torch.Tensor]]:
    t = content()
    two = build.full(TensorSpec([3, 900], "float32"), 2.0)
    noise = build.noise(TensorSpec([300, 70], "float32"), mean=1, std=2, seed=3)
    drawn = torch.empty(300, 70).normal_(1, 2, generator=torch.Generator().manual_seed(3))
    return {
        "rows": (build.narrow(plan["large"], 0, 100, 650), t["large"][100:650]),
        "columns": (build.narrow(plan["large"], 1, 3, 500), t["large"][:, 3:500]),
        "turned": (build.transpose(plan["large"]), t["large"].T),
        "picked": (build.take(plan["half"], [300, 2, 2, 7], 0), t["half"][[300, 2, 2, 7]]),
        "picked columns": (build.take(plan["half"], [5, 400, 5], 1), t["half"][:, [5, 400, 5]]),
        "joined": (
            build.concat([plan["large"], two, plan["large"]]),
            torch.cat([t["large"], torch.full((3, 900), 2.0), t["large"]]),
        ),
        "stacked": (build.stack([plan["f8"], plan["f8"]]), torch.stack([bits(t["f8"])] * 2).view(2, 64, 64)),
        "down": (build.cast(plan["large"], "bfloat16"), t["large"].bfloat16()),
        "down, turned": (build.transpose(build.cast(plan["large"], "float16")), t["large"].half().T),
        "up": (build.cast(plan["half"], "float32"), t["half"].float()),
        "up, picked": (build.cast(build.take(plan["half"], [9, 1], 0), "float64"), t["half"][[9, 1]].double()),
        "up from f8": (build.cast(plan["f8"], "bfloat16"), t["f8"].bfloat16()),
        "twice": (build.cast(build.cast(plan["half"], "float32"), "float16"), t["half"].float().half()),
        "to integers": (build.cast(plan["large"], "int64"), t["large"].long()),
        "as wide": (build.cast(plan["long"], "float64"), t["long"].double()),
        "of bool": (build.cast(plan["bool"], "int32"), t["bool"].int()),
        "flat": (build.reshape(build.transpose(plan["half"]), [-1]), t["half"].T.reshape(-1)),
        "cut of flat": (
            build.narrow(build.reshape(build.transpose(plan["half"]), [-1]), 0, 5, 999),
            t["half"].T.reshape(-1)[5:999],
        ),
        "noise": (build.cast(noise, "bfloat16"), drawn.bfloat16()),
        "conjugate": (build.transpose(plan["complex"]), t["complex"].T),
        "one": (build.select(plan["long"], 0, 7), t["long"][7]),
    }


@pytest.mark.parametrize("kind", ["fresh", "existing", "strided"])
def test_through_the_buffers_come_the_bits_that_come_without_them(kind, plan):
    made = expressions(plan)
    wanted = {**plan, **{key: expr for key, (expr, _) in made.items()}, "again": plan["large"]}
    expected = {
        **content(),
        **{key: t.view(torch.float8_e4m3fn) if key == "stacked" else t for key, (_, t) in made.items()},
    }
    expected["again"] = expected["large"]
    if kind == "fresh":
        found = materialize(wanted, route="stage")
        assert list(found) == list(wanted)
        assert all(t.is_contiguous() for t in found.values())
        assert found["again"].data_ptr() != found["large"].data_ptr()
    else:
        shapes = {key: (*t.shape, 2) if kind == "strided" else tuple(t.shape) for key, t in expected.items()}
        found = {key: torch.empty(shapes[key], dtype=t.dtype) for key, t in expected.items()}
        if kind == "strided":
            found = {key: t.select(-1, 1) for key, t in found.items()}
        fill(wanted, found, route="stage")
    for key in expected:
        same(found[key], expected[key])


def test_tensors_that_were_packed_have_nothing_in_common_but_memory(plan):
    found = materialize(plan, route="stage")
    assert len({found[f"small.{i}"].untyped_storage().data_ptr() for i in range(100)}) == 1
    before = found["small.4"].clone()
    found["small.3"].add_(1)
    assert found["small.3"]._version > found["small.4"]._version
    same(found["small.4"], before)


def test_inference_tensors_are_written_to(plan):
    turned = {str(i): build.transpose(build.cast(plan["large"], "float64")) for i in range(5)}  # for several threads
    with torch.inference_mode():
        found = materialize({**turned, "t": plan["large"]}, route="stage")
    for key in turned:
        assert found[key].is_inference()
        same(found[key], content()["large"].double().T)
    with torch.inference_mode():
        found["0"].zero_()
    fill({"0": turned["0"]}, {"0": found["0"]}, route="stage")
    same(found["0"], content()["large"].double().T)


def test_functions_that_read_one_file_can_be_called_twice(plan):
    called = Call("torch:clone", (build.cast(plan["large"], "float16"),), TensorSpec([700, 900], "float16"))
    for route in ("transform", "stage"):
        for tensor in materialize({"a": called, "b": called}, route=route).values():
            same(tensor, content()["large"].half())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 300, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("commit", ["swap", "in_place"])
def test_a_module_with_ties_takes_its_values_through_the_buffers(commit, tmp_path):
    saved, net = Net(), Net()
    fm.save(saved, tmp_path)
    made = plan_load(module_spec(net), scan(tmp_path))
    before = {name: id(leaf) for name, leaf in net.named_parameters()}
    assign(routed(made, commit=commit, route="stage"), net, commit=commit)
    assert {name: id(leaf) for name, leaf in net.named_parameters()} == before
    assert net.head.weight is net.embed.weight
    for name, leaf in saved.state_dict().items():
        same(net.state_dict()[name], leaf)
    fm.save(net, tmp_path / "again")
    for name, leaf in load_file(tmp_path / "again/model.safetensors").items():
        same(leaf, saved.state_dict()[name])


# -- errors ------------------------------------------------------------------------------------------------------------


def test_files_that_are_not_what_was_planned_are_the_same_errors(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(100, 100)}, path)
    made = scan(path)
    os.truncate(path, 5000)
    with pytest.raises((StalePlanError, TruncatedError)) as staged:
        materialize(made, route="stage")
    with pytest.raises((StalePlanError, TruncatedError)) as plain:
        materialize(made)
    assert type(staged.value) is type(plain.value)
    assert staged.value.path == str(path)


def test_a_dtype_that_torch_lacks_is_a_plan_error(tmp_path):
    path = tmp_path / "m.safetensors"
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(PlanError):
        materialize(scan(path), route="stage")


# -- a device that does as late as it may what it is given -------------------------------------------------------------


def passing(
    plan: dict[str, Read], files: dict[str, object], most: int
) -> tuple[list[Passage], dict[str, torch.Tensor]]:
    """Every tensor as it is, turned, cast down and cast up."""
    found: dict[str, torch.Tensor] = {}
    items: list[Passage] = []
    places = homes([(key, read.spec) for key, read in plan.items()], CPU)
    for key, read in plan.items():
        home, file = places[key], files[read.file.path]
        found[key] = home.tensor
        if not home.tensor.numel():
            continue
        items.append(Span(file, read.offset, read.spec.nbytes, home.flat, home.at, padded=True))
        shape, kind = torch_shape(read.spec), torch_dtype(read.spec.dtype)
        box = box_of(read.spec, tuple((0, n) for n in shape), [None] * len(shape))
        for name, casts in {"turned": (), "float16": (dtype("float16"),), "float64": (dtype("float64"),)}.items():
            if kind.is_complex and casts:
                continue
            to = torch.empty(shape[::-1], dtype=torch_dtype(casts[-1]) if casts else kind)
            found[f"{key} {name}"] = to
            view = to.permute(tuple(range(to.ndim))[::-1])
            items += passages(file, read.offset, shape, kind, box, view, casts, most=most)
    return items, found


def expected(key: str) -> torch.Tensor:
    tensors = content()
    name, _, how = key.partition(" ")
    t = tensors[name]
    if how in ("float16", "float64"):
        t = t.to(getattr(torch, how))
    return t.permute(tuple(range(t.ndim))[::-1]) if how and t.ndim else t


@contextmanager
def opened(plan: dict[str, Read]) -> Iterator[dict[str, object]]:
    files = {path: open_regular(path) for path in {read.file.path for read in plan.values()}}
    try:
        yield {path: source(FORMATS[0], file) for path, file in files.items()}
    finally:
        for file in files.values():
            file.close()


@pytest.mark.parametrize(
    ("threads", "buffers", "pinned", "nbytes"),
    [
        (1, 1, False, 1 << 16),
        (1, 2, True, 4096),
        (4, 8, True, 4096),
        (4, 8, True, 1 << 16),
        (4, 8, True, 8 << 20),
        (3, 3, False, 1 << 16),
    ],
)
def test_no_buffer_is_filled_before_the_device_has_done_with_it(threads, buffers, pinned, nbytes, plan):
    device = LazyDevice()
    ring = Ring(threads=threads, buffers=buffers, nbytes=nbytes, pinned=pinned)
    for _ in range(2):  # the buffers are kept, and so are the marks in them
        with opened(plan) as files:
            items, found = passing(plan, files, nbytes)
            # What the caller gave its stream before must be done before the first byte arrives.
            device.lane.give(lambda found=found: [t.zero_() for t in found.values()] and None)
            ring.run({device.lane: items})
        device.synchronize()
        for key, tensor in found.items():
            same(tensor, expected(key).contiguous())
    assert device.pinned == {pinned}
    assert len(device.hosts) <= buffers
    assert max(device.hosts) <= nbytes
    assert device.idle()


def test_what_lies_side_by_side_takes_one_copy(tmp_path):
    tensors = {f"t{i:04}": torch.full((i % 40 + 1,), float(i)) for i in range(2000)}
    save_file(tensors, tmp_path / "m.safetensors")
    made = dict(scan(tmp_path / "m.safetensors"))
    device = LazyDevice()
    with opened(made) as files:
        places = homes([(key, read.spec) for key, read in made.items()], CPU)
        items = [
            Span(files[read.file.path], read.offset, read.spec.nbytes, places[key].flat, places[key].at, padded=True)
            for key, read in made.items()
        ]
        Ring(threads=4, buffers=8, nbytes=8 << 20, pinned=True).run({device.lane: items})
    device.synchronize()
    assert device.copies == 1
    assert len(device.hosts) == 1
    assert all(torch.equal(places[key].tensor, tensors[key]) for key in tensors)


class Counting:
    """A source that counts the bytes that are read of it."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.nbytes = 0
        self.lock = threading.Lock()

    def readv_into(self, buffers, offset) -> None:
        with self.lock:
            self.nbytes += sum(map(len, buffers))
        self.inner.readv_into(buffers, offset)


@pytest.mark.parametrize(("threads", "pinned"), [(1, False), (1, True), (4, True)])
@pytest.mark.parametrize("nbytes", [4096, 1 << 16, 8 << 20])
@pytest.mark.parametrize("count", [2, 3])
def test_several_devices_are_filled_side_by_side_and_each_byte_is_read_once(count, nbytes, threads, pinned, plan):
    devices = [LazyDevice() for _ in range(count)]
    ring = Ring(threads=threads, buffers=2 * threads, nbytes=nbytes, pinned=pinned)
    alone = LazyDevice()
    with opened(plan) as files:
        counted = {path: Counting(file) for path, file in files.items()}
        ring.run({alone.lane: passing(plan, counted, nbytes)[0]})
        needed = sum(source.nbytes for source in counted.values())
    for _ in range(2):
        with opened(plan) as files:
            counted = {path: Counting(file) for path, file in files.items()}
            work, found = {}, {}
            for i, device in enumerate(devices):
                # Some tensors go to every device, some to one; as they are, and changed on the way.
                mine = {key: read for j, (key, read) in enumerate(plan.items()) if j % 7 < 3 or j % count == i}
                work[device.lane], found[i] = passing(mine, counted, nbytes)
                device.lane.give(lambda made=found[i]: [t.zero_() for t in made.values()] and None)
            ring.run(work)
        for i, device in enumerate(devices):
            device.synchronize()
            for key, tensor in found[i].items():
                same(tensor, expected(key).contiguous())
        assert sum(source.nbytes for source in counted.values()) == needed
    assert sum(len(device.hosts) for device in (alone, *devices)) <= 2 * threads
    assert all(device.idle() for device in devices)


def test_what_goes_to_two_places_of_one_device_is_read_once(plan):
    device = LazyDevice()
    read = plan["large"]
    with opened({"large": read}) as files:
        file = Counting(files[read.file.path])
        places = homes([("a", read.spec), ("b", read.spec), ("c", read.spec)], CPU)
        items = [Span(file, read.offset, read.spec.nbytes, home.flat, home.at) for home in places.values()]
        Ring(threads=2, buffers=4, nbytes=1 << 16, pinned=True).run({device.lane: items})
    device.synchronize()
    assert file.nbytes == read.spec.nbytes
    for home in places.values():
        same(home.tensor, content()["large"])


@pytest.mark.parametrize("casts", [("float16",), ("float64",), ("float64", "bfloat16")])
@pytest.mark.parametrize("nbytes", [1 << 16, 8 << 20])
def test_what_is_cast_for_several_devices_is_read_once(nbytes, casts, plan):
    devices = [LazyDevice() for _ in range(3)]
    read, kinds = plan["large"], tuple(map(dtype, casts))
    shape = torch_shape(read.spec)
    box = box_of(read.spec, tuple((0, n) for n in shape), [None] * len(shape))
    with opened({"large": read}) as files:
        file = Counting(files[read.file.path])
        work, found = {}, []
        for device in (*devices, devices[0]):
            to = torch.empty(shape, dtype=torch_dtype(kinds[-1]))
            found.append(to)
            items = passages(file, read.offset, shape, torch.float32, box, to, kinds, most=nbytes)
            work.setdefault(device.lane, []).extend(items)
        Ring(threads=2, buffers=4, nbytes=nbytes, pinned=True).run(work)
    for device in devices:
        device.synchronize()
    assert file.nbytes == read.spec.nbytes
    values = content()["large"]
    for kind in casts:
        values = values.to(getattr(torch, kind))
    for to in found:
        same(to, values)


def test_what_lies_side_by_side_takes_one_copy_to_each_device(tmp_path):
    tensors = {f"t{i:04}": torch.full((i % 40 + 1,), float(i)) for i in range(2000)}
    save_file(tensors, tmp_path / "m.safetensors")
    made = dict(scan(tmp_path / "m.safetensors"))
    devices = [LazyDevice(), LazyDevice()]
    with opened(made) as files:
        work, found = {}, []
        for device in devices:
            places = homes([(key, read.spec) for key, read in made.items()], CPU)
            found.append(places)
            work[device.lane] = [
                Span(files[read.file.path], read.offset, read.spec.nbytes, places[key].flat, places[key].at, True)
                for key, read in made.items()
            ]
        Ring(threads=4, buffers=8, nbytes=8 << 20, pinned=True).run(work)
    for device, places in zip(devices, found, strict=True):
        device.synchronize()
        assert device.copies == 1
        assert all(torch.equal(places[key].tensor, tensors[key]) for key in tensors)


class Failing:
    """A source whose nth call fails."""

    def __init__(self, inner, n, how) -> None:
        self.inner = inner
        self.left = n
        self.how = how
        self.calls = 0
        self.lock = threading.Lock()

    def readv_into(self, buffers, offset) -> None:
        with self.lock:
            self.calls += 1
            self.left -= 1
            failing = not self.left
        if failing:
            self.how()
        self.inner.readv_into(buffers, offset)


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupt_the_caller() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("how", [interrupt, interrupt_the_caller])
@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("count", [1, 2])
def test_after_an_interrupt_nothing_reads_and_nothing_is_copied(count, threads, how, n, plan):
    devices = [LazyDevice() for _ in range(count)]
    others = set(threading.enumerate())
    with opened(plan) as files:
        failing = {path: Failing(file, n, how) for path, file in files.items()}
        work = {device.lane: passing(plan, failing, 4096)[0] for device in devices}
        with pytest.raises(KeyboardInterrupt):
            Ring(threads=threads, buffers=2 * threads, nbytes=4096, pinned=True).run(work)
        calls = sum(file.calls for file in failing.values())
        assert all(device.idle() for device in devices)
        for thread in set(threading.enumerate()) - others:  # one that was about to start when the interrupt came
            while thread in threading.enumerate():
                pass
        assert all(device.idle() for device in devices)
        assert sum(file.calls for file in failing.values()) == calls


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_shrinks_while_it_is_read_is_a_typed_error(threads, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({f"t{i}": torch.ones(300_000) for i in range(4)}, path)
    made = dict(scan(path))
    device = LazyDevice()
    others = set(threading.enumerate())
    with opened(made) as files:
        items, _ = passing(made, files, 1 << 16)
        os.truncate(path, 2_000_000)
        with pytest.raises(ChangedError) as caught:
            Ring(threads=threads, buffers=2 * threads, nbytes=1 << 16, pinned=True).run({device.lane: items})
    assert caught.value.path == str(path)
    assert set(threading.enumerate()) <= others
    assert device.idle()


def test_threads_that_copy_start_no_others(tmp_path):
    """Teams of torch in each of the threads would be many more threads than there are processors."""
    code = """
import os, sys, threading, torch
from attrs import evolve
from safetensors.torch import save_file
from funcmodel.core import build
from funcmodel.run.evaluate import materialize
from funcmodel.run.formats import FORMATS
from funcmodel.run.scan import scan
threads = torch.get_num_threads()
save_file({f"t{i}": torch.zeros(1000, 1500) for i in range(2)}, sys.argv[1])
plan = dict(scan(sys.argv[1]))
seen, ours = set(), set()
def began(*event):  # a thread that ends is a task for a while longer, so the list of the living would not do
    ours.add(threading.get_native_id())
    sys.setprofile(None)
threading.setprofile(began)
def read(file, buffer, offset):
    file.read_into(buffer, offset)
    seen.update(map(int, os.listdir("/proc/self/task")))
wanted = {}
for key, expr in plan.items():
    wanted |= {key: expr, key + "T": build.transpose(expr), key + "h": build.cast(expr, "bfloat16")}
    wanted |= {key + "d": build.cast(expr, "float64")}
before = set(map(int, os.listdir("/proc/self/task")))
materialize(wanted, route="stage", formats=(evolve(FORMATS[0], read=read),))
print(len(seen - ours - before), len(ours) > 1, torch.get_num_threads() - threads)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.safetensors")],
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["0", "True", "0"]


# -- slices of many small runs -----------------------------------------------------------------------------------------


def sliced(plan: dict[str, Read]) -> dict[str, tuple[object, torch.Tensor]]:
    """What lies in many small runs of its file, and what it is."""
    large, half = content()["large"], content()["half"]
    chosen = [*range(5), *range(80, 90), 3]
    return {
        "columns": (build.narrow(plan["large"], 1, 3, 500), large[:, 3:500]),
        "a column": (build.narrow(plan["large"], 1, 7, 8), large[:, 7:8]),
        "blocks": (build.take(plan["large"], chosen, 1), large[:, chosen]),
        "turned": (build.transpose(build.narrow(plan["half"], 1, 100, 200)), half[:, 100:200].T),
        "cast": (build.cast(build.narrow(plan["half"], 1, 5, 10), "float64"), half[:, 5:10].double()),
        "few": (build.index(plan["complex"], ((3, 7), (2, 3))), content()["complex"][3:7, 2:3]),
    }


@pytest.mark.usefixtures("leases")
@pytest.mark.parametrize("writer", [False, True])
def test_slices_of_small_runs_come_out_of_a_mapping_unless_somebody_may_write(writer, plan):
    wanted = sliced(plan)
    refs = {read.file for read in plan.values()}
    made = StateDictPlan({key: expr for key, (expr, _) in wanted.items()})
    routes = routing(made, machine(refs, smallest=0), route="stage")
    assert set(routes.sliced) == {plan[key].file.path for key in ("large", "half")}

    def load() -> dict[str, torch.Tensor]:
        return materialize_routed(made, routes, CPU, None, FORMATS, "ignore")

    load()  # which imports what it needs
    with ExitStack() as stack:
        if writer:
            for ref in refs:
                stack.enter_context(open(ref.path, "r+b"))
        before = Path("/proc/self/io").read_text()
        found = load()
        after = Path("/proc/self/io").read_text()
    nbytes = int(after.split()[1]) - int(before.split()[1]) - len(before)
    for key, (_, tensor) in wanted.items():
        same(found[key], tensor.contiguous())
    headers = 3 * (1 << 14)
    assert (nbytes > headers) is writer


@pytest.mark.usefixtures("leases")
def test_who_waits_to_write_is_let_through_and_what_is_left_is_read(plan, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(Path(plan["large"].file.path).read_bytes())
    read = dict(scan(path))["large"]
    shape, kind = torch_shape(read.spec), torch_dtype(read.spec.dtype)
    box = (((0, 700),), ((3, 400),))
    to = torch.empty(700, 400)
    first = torch.empty(64, dtype=torch.uint8)
    device, still = LazyDevice(), Held()
    refused: list[int] = []

    class Announcing(Counting):
        """A source whose every call somebody uses to ask whether he may write."""

        def readv_into(self, buffers, offset) -> None:
            if not refused:
                try:
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                except BlockingIOError as error:  # the kernel has told us, and waits
                    refused.append(error.errno)
            super().readv_into(buffers, offset)

    with opened({"large": read}) as files:
        source_ = Announcing(files[str(path)])
        source_.file = source_.inner  # whose bytes stand as tensors hold them
        items: list[Passage] = [Span(source_, 0, 64, first, 0)]
        items += passages(source_, read.offset, shape, kind, box, to, (), most=1 << 16, held=still)
        assert still.bytes_of(source_.file) is not None
        try:
            Ring(threads=1, buffers=2, nbytes=1 << 16, pinned=True).run({device.lane: items})
            assert still.bytes_of(source_.file) is None
        finally:
            still.release()
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    device.synchronize()
    assert refused
    assert source_.nbytes > 64  # what was not taken out of the mapping was read, and nothing but what is wanted
    assert source_.nbytes <= 64 + to.nbytes
    same(to, content()["large"][:, 3:403].contiguous())


# -- the choices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (4, (8, False)),
        (PAGEABLE - 4, (8, False)),
        (PAGEABLE, (FEW_PINNED, True)),
        (MANY - 4, (FEW_PINNED, True)),
        (MANY, (16, True)),
    ],
)
def test_pinning_must_pay_for_itself(nbytes, expected):
    made = {"w": build.full(TensorSpec([nbytes // 4], "float32"), 0.0)}
    found = routing(made, Machine(threads=8), on="cuda:0")
    assert (found.buffers, found.pinned) == expected
    assert found.buffer == PINNED
    assert set(found.routes.values()) == {"stage"}
    assert not routing(made, Machine(threads=8), route="stage").pinned
    mixed = routing({**made, "b": made["w"]}, Machine(threads=8), on={"w": "cuda:1", "b": "cpu"})
    assert (mixed.routes["w"], mixed.routes["b"]) == ("stage", "transform")
    assert mixed.pinned == expected[1]


@pytest.mark.parametrize(
    ("kind", "casts", "there"),
    [
        ("bfloat16", ["float32"], True),
        ("float8_e4m3fn", ["bfloat16", "float32"], True),
        ("uint8", ["int16"], True),
        ("int16", ["float32"], True),
        ("float32", ["complex64"], True),
        ("float32", ["bfloat16"], False),
        ("float32", ["float32"], False),
        ("float32", ["int64"], False),
        ("float16", ["bfloat16"], False),
        ("float16", ["float32", "float16"], False),
        ("bool", ["float32"], False),
        ("int8", ["uint16"], False),
        ("complex64", ["float64"], False),
    ],
)
def test_a_device_casts_only_what_every_device_casts_alike(kind, casts, there):
    assert exact(dtype(kind), [dtype(cast) for cast in casts]) is there


def test_large_tensors_live_alone_and_small_ones_at_aligned_places():
    specs = [(f"{i}", TensorSpec([i * 37 + 1], "int16")) for i in range(50)]
    specs += [("large", TensorSpec([ALONE], "uint8")), ("none", TensorSpec([0, 3], "float32"))]
    found = homes(specs, CPU)
    assert found["large"].tensor.untyped_storage().nbytes() >= ALONE
    assert all(found[f"{i}"].at % alignment(CPU) == 0 for i in range(50))
    for i, home in enumerate(found.values()):
        home.tensor.fill_(i)
    assert all(bool((home.tensor == i).all()) for i, home in enumerate(found.values()))
    for home in found.values():
        raw = home.flat[home.at : home.at + home.tensor.nbytes]
        assert torch.equal(raw, bits(home.tensor))
    assert alignment(torch.device("cuda", 0)) == 512


@pytest.mark.parametrize(("old", "new"), [("float32", "float16"), ("float16", "float64"), ("int64", "float64")])
def test_casts_within_a_buffer_lose_nothing(old, new, tmp_path):
    values = torch.arange(3 * CELLS + 5).to(getattr(torch, old))
    save_file({"a": values}, tmp_path / "m.safetensors")
    plan = dict(scan(tmp_path / "m.safetensors"))
    through = [dtype("float32"), dtype(new)] if old == "float16" else [dtype(new)]
    expected = values
    for kind in through:
        expected = expected.to(torch_dtype(kind))
    if old == "float16":  # the device could make this one; a bool in between must not be made there
        through, expected = [dtype("bool"), dtype(new)], values.bool().double()
    to = torch.empty(expected.shape, dtype=expected.dtype)
    read = plan["a"]
    with opened(plan) as files:
        items = passages(
            files[read.file.path],
            read.offset,
            tuple(values.shape),
            values.dtype,
            (((0, len(values)),),),
            to,
            tuple(through),
            most=8 << 20,
        )
        Ring(threads=2, buffers=4, nbytes=8 << 20).run({lane_to(CPU): items})
    same(to, expected)


# -- the way back ------------------------------------------------------------------------------------------------------


def laid_out() -> list[torch.Tensor]:
    t = content()
    return [
        *t.values(),
        t["large"].T,
        t["large"][::3, 5:],
        t["complex"].conj(),
        t["complex"].T.imag,
        torch.ones(1).expand(3000, 2),
        nn.Parameter(t["half"]),
        t["large"].view(1, 700, 1, 900).permute(3, 0, 1, 2),
    ]


@pytest.mark.parametrize("nbytes", [2048, 40_000, 8 << 20])
def test_bytes_come_back_in_order_and_no_buffer_is_used_twice_at_once(nbytes):
    device = LazyDevice()
    tensors = laid_out()
    target = [torch.zeros(1)]
    device.lane.give(lambda: target[0].add_(1) and None)
    found = bytearray()
    for batch in Drain(device.lane, nbytes).bytes_of([*tensors, target[0]], device.lane.record()):
        assert sum(map(len, batch)) <= nbytes
        for view in batch:
            found += view
    expected = [*tensors, torch.ones(1)]
    raw = [bits(t.detach().resolve_conj().resolve_neg().contiguous()).numpy().tobytes() for t in expected]
    assert bytes(found) == b"".join(raw)
    assert len(device.hosts) <= 2
    assert device.pinned == {True}


def test_a_way_back_that_is_left_early_is_synchronized():
    device = LazyDevice()
    coming = Drain(device.lane, 4096).bytes_of([torch.ones(100_000)], device.lane.record())
    next(coming)
    coming.close()
    assert device.idle()
    assert list(Drain(lane_to(CPU)).bytes_of([torch.empty(0)], None)) == []


def test_files_that_are_written_at_once_each_have_a_way_back_behind_what_the_caller_gave():
    """Streams are a setting of each thread: the caller's work may wait in one that no other thread knows of."""
    device, tensors = LazyDevice(), laid_out()
    aside, late = device.lane.stream(), [torch.zeros(5000) for _ in range(4)]
    with device.using(aside):
        for tensor in late:
            device.lane.give(partial(tensor.add_, 1))
        drains = Drains({CPU}, lambda _: device.lane)
    found = [bytearray() for _ in late]

    def write(at: int) -> None:
        for batch in drains.bytes_of([*tensors, late[at]]):
            for view in batch:
                found[at] += view

    Crew().together([partial(write, at) for at in range(len(late))])
    raw = [bits(t.detach().resolve_conj().resolve_neg().contiguous()).numpy().tobytes() for t in tensors]
    assert all(bytes(each) == b"".join(raw) + torch.ones(5000).numpy().tobytes() for each in found)
    assert len(device.hosts) <= 2 * len(late)
    assert device.idle()
