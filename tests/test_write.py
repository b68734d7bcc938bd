"""Save plans carried out: what is in the files, and what is left of the folder when something goes wrong."""

import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from attrs import evolve
from torch import Tensor

from funcmodel.core import build
from funcmodel.core.index import parse_config
from funcmodel.core.journal import LOCK, is_part
from funcmodel.errors import (
    ApplyError,
    NoSpaceError,
    PlanError,
    SaveError,
    StalePlanError,
    TruncatedError,
    UnsafePathError,
)
from funcmodel.plan.saving import plan_save
from funcmodel.records.actions import Publish, WriteShard, WriteText
from funcmodel.records.checkpoint import CheckpointSpec
from funcmodel.records.expressions import Expr, FileRef, Full, Live, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.plans import SavePlan, StateDictPlan
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.existing import existing_checkpoint
from funcmodel.run.faults import Crash, Fault, changes, counted, faulty
from funcmodel.run.filesystem import REAL, FileSystem
from funcmodel.run.scan import scan, scan_checkpoint
from funcmodel.run.tensors import TORCH_DTYPES, tensor_spec
from funcmodel.run.write import write

BENCHMARK = Path(__file__).parent / "benchmarks" / "saving.py"


def plan_of(tensors: Mapping[str, Tensor]) -> StateDictPlan:
    return StateDictPlan({key: Live(key, tensor_spec(tensor)) for key, tensor in tensors.items()})


def save(tensors: Mapping[str, Tensor], into: Path, filesystem: FileSystem = REAL, **options: object) -> CheckpointSpec:
    """Plan and write, on top of whatever the folder holds."""
    existing = existing_checkpoint(into, variant=options.get("variant"))  # type: ignore[arg-type]
    plan = plan_save(plan_of(tensors), existing=existing, **options)  # type: ignore[arg-type]
    return write(plan, into, live=tensors, filesystem=filesystem)


def read(folder: Path) -> dict[str, Tensor]:
    """What transformers and most others read: a single file first, else what the index lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return safetensors.torch.load_file(single)
    weight_map = json.loads(index.read_text())["weight_map"]
    found: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        held = safetensors.torch.load_file(folder / file)
        found |= {key: held[key] for key in weight_map if weight_map[key] == file}
    return found


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


OLD = {"a": torch.arange(4.0), "b": torch.arange(4.0) + 10, "c": torch.arange(4.0) + 20}
NEW = {key: tensor + 100 for key, tensor in OLD.items()}
ONE, MANY = None, 16  # limits that make one file, and one file per tensor


# -- what is in the files ----------------------------------------------------------------------------------------------


def test_a_single_file_holds_every_tensor(tmp_path: Path) -> None:
    save(OLD, tmp_path / "deep" / "out")
    assert names(tmp_path / "deep" / "out") == {"model.safetensors"}
    assert same(read(tmp_path / "deep" / "out"), OLD)


def test_shards_and_an_index_hold_every_tensor(tmp_path: Path) -> None:
    save(OLD, tmp_path, max_shard_size=MANY)
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names(tmp_path) == {"model.safetensors.index.json", *shards}
    assert same(read(tmp_path), OLD)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 48


@pytest.mark.parametrize("limit", [ONE, MANY])
def test_what_was_written_is_what_a_scan_finds(tmp_path: Path, limit: int | None) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    config = parse_config('{"model_type": "bert"}')
    written = save(OLD, tmp_path, max_shard_size=limit, config=config, variant="fp16")
    assert written == scan_checkpoint(tmp_path, variant="fp16")
    assert (tmp_path / "config.json").read_text() == '{"model_type": "bert"}'


def test_data_starts_at_a_page_and_every_tensor_at_its_width(tmp_path: Path) -> None:
    written = save({"a": torch.ones(1, dtype=torch.bool), "b": torch.ones(3, dtype=torch.float64)}, tmp_path)
    start = struct.unpack("<Q", (tmp_path / "model.safetensors").read_bytes()[:8])[0] + 8
    assert start % 4096 == 0
    assert all(stored.start % stored.spec.dtype.bits == 0 for stored in written.files[0].tensors.values())


def test_the_data_is_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    kinds = {d: t for d, t in TORCH_DTYPES.items() if d.safetensors}
    tensors = {
        f"{i}.{d.name}": torch.full((24,), i, dtype=torch.uint8).view(t) for i, (d, t) in enumerate(kinds.items())
    }
    tensors = {key: t if t.dtype is not torch.bool else torch.tensor([True, False]) for key, t in tensors.items()}
    tensors |= {"empty": torch.ones(0, 3), "scalar": torch.tensor(7.0)}
    save(tensors, tmp_path)
    ours, theirs = (tmp_path / "model.safetensors").read_bytes(), safetensors.torch.save(tensors)
    data = [file[8 + struct.unpack("<Q", file[:8])[0] :] for file in (ours, theirs)]
    assert len(kinds) > 15
    assert data[0] == data[1]


def test_nothing_is_an_empty_file_that_safetensors_reads(tmp_path: Path) -> None:
    save({}, tmp_path)
    assert safetensors.torch.load_file(tmp_path / "model.safetensors") == {}
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_strides_views_and_lazy_signs_are_written_as_torch_shows_them(tmp_path: Path) -> None:
    z = torch.complex(torch.arange(6.0), torch.ones(6)).reshape(2, 3)
    large = torch.arange(3.0 * 2**20).reshape(3 * 2**10, 2**10)
    tensors = {
        "transposed": large.t(),
        "every second": large[:, ::2],
        "expanded": torch.ones(1, 4).expand(3, 4),
        "flipped": torch.view_as_real(z.conj().resolve_conj())[..., 1],
        "conjugate": z.conj(),
        "negative": z.conj().imag,
        "large conjugate": torch.complex(large, large).conj(),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "large parameter": torch.nn.Parameter(torch.ones(2**18)),
    }
    assert tensors["conjugate"].is_conj()
    assert tensors["negative"].is_neg()
    save(tensors, tmp_path)
    assert same(read(tmp_path), {key: tensor.detach() for key, tensor in tensors.items()})


@pytest.mark.parametrize("rows", [1, 100, 5000])
def test_a_bool_of_any_byte_keeps_it_whatever_its_strides(rows: int, tmp_path: Path) -> None:
    raw = torch.arange(rows * 40).to(torch.uint8).view(rows, 40)
    tensors = {"a": raw.view(torch.bool), "b": raw.view(torch.bool).T, "c": raw.view(torch.bool)[:, ::2]}
    save(tensors, tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    expected = b"".join(part.contiguous().numpy().tobytes() for part in (raw, raw.T, raw[:, ::2]))
    assert data.endswith(expected)


def test_packed_four_bit_floats_keep_their_bytes(tmp_path: Path) -> None:
    bits = torch.arange(8, dtype=torch.uint8)
    written = save({"w": bits.view(torch.float4_e2m1fn_x2)}, tmp_path)
    assert written.files[0].tensors["w"].spec == TensorSpec((16,), "F4")
    assert (tmp_path / "model.safetensors").read_bytes()[-8:] == bytes(range(8))


def test_types_that_torch_cannot_hold_are_copied_from_file_to_file(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F6_E3M2", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "in.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    write(plan_save(scan(tmp_path / "in.safetensors")), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[-3:] == b"abc"


def test_expressions_are_computed_on_the_way(tmp_path: Path) -> None:
    safetensors.torch.save_file(OLD, tmp_path / "in.safetensors")
    source = scan(tmp_path / "in.safetensors")
    plan = StateDictPlan(
        {
            "half": build.cast(source["a"], "float16"),
            "plain": source["a"],
            "row": build.reshape(source["b"], (2, 2)),
            "both": build.stack([source["a"], source["b"]]),
            "zeros": Full(TensorSpec((3,), "int64"), 0),
            "live": Live("x", TensorSpec((2,), "float32")),
            "turned": build.transpose(build.stack([source["c"], build.live("y", TensorSpec((4,), "float32"))])),
        }
    )
    live = {"x": torch.ones(2), "y": torch.zeros(4)}
    write(plan_save(plan, max_shard_size=24), tmp_path / "out", live=live)
    expected = {
        "half": OLD["a"].half(),
        "plain": OLD["a"],
        "row": OLD["b"].reshape(2, 2),
        "both": torch.stack([OLD["a"], OLD["b"]]),
        "zeros": torch.zeros(3, dtype=torch.int64),
        "live": live["x"],
        "turned": torch.stack([OLD["c"], live["y"]]).t(),
    }
    assert same(read(tmp_path / "out"), expected)


def test_the_path_of_one_file_writes_exactly_this_file(tmp_path: Path) -> None:
    plan = plan_save(plan_of(OLD), max_shard_size=None, name="weights")
    write(plan, tmp_path / "weights.safetensors", live=OLD)
    assert names(tmp_path) == {"weights.safetensors"}
    with pytest.raises(PlanError):
        write(plan, tmp_path / "other.safetensors", live=OLD)


def test_many_small_tensors_and_large_ones_keep_their_places(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {f"t.{i}": torch.randn(i % 7 * 50, generator=g) for i in range(3000)}
    tensors |= {f"big.{i}": torch.randn(2**18 + i, generator=g) for i in range(3)}
    save(tensors, tmp_path / "a", max_shard_size="2MB")
    assert same(read(tmp_path / "a"), tensors)
    write(plan_save(scan(tmp_path / "a")), tmp_path / "b")
    assert same(read(tmp_path / "b"), tensors)


def test_copies_from_file_to_file_pass_through_a_buffer_smaller_than_they_are(tmp_path: Path) -> None:
    sizes = {"a": 3 * 2**20 + 1, "b": 5 * 2**20 + 7, "c": 11, "d": 2**20}  # 36 MiB, and ends that meet no round number
    tensors = {key: torch.arange(size, dtype=torch.int32) + i for i, (key, size) in enumerate(sizes.items())}
    safetensors.torch.save_file(tensors, tmp_path / "in.safetensors")
    write(plan_save(scan(tmp_path / "in.safetensors"), max_shard_size=None), tmp_path / "one")
    assert same(read(tmp_path / "one"), tensors)
    turned = StateDictPlan({f"{9 - i}": expr for i, expr in enumerate(scan(tmp_path / "one").values())})
    write(plan_save(turned), tmp_path / "two")
    assert same(read(tmp_path / "two"), {f"{9 - i}": tensors[key] for i, key in enumerate(sorted(tensors))})


# -- onto what is there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [ONE, MANY, 32])
@pytest.mark.parametrize("after", [ONE, MANY, 32])
def test_a_save_leaves_the_new_checkpoint_alone_in_the_folder(
    tmp_path: Path, before: int | None, after: int | None
) -> None:
    others = ("README.md", "adapter_model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "config.json")
    save(OLD, tmp_path, max_shard_size=before)
    for other in others:
        (tmp_path / other).write_bytes(b"{}")
    written = save(NEW, tmp_path, max_shard_size=after)
    files = {Path(file.path).name for file in written.files}
    index = {Path(written.index.path).name} if written.index else set()
    assert names(tmp_path) == {*files, *index, *others}
    assert same(read(tmp_path), NEW)


def test_saving_again_and_again_does_not_pile_up(tmp_path: Path) -> None:
    counts = []
    for i in range(4):
        save({key: tensor + i for key, tensor in OLD.items()}, tmp_path, max_shard_size=MANY)
        counts.append(len(names(tmp_path)))
    assert counts == [4] * 4
    assert same(read(tmp_path), {key: tensor + 3 for key, tensor in OLD.items()})


def test_a_variant_leaves_the_others_alone(tmp_path: Path) -> None:
    save(OLD, tmp_path, max_shard_size=MANY)
    before = names(tmp_path)
    save(NEW, tmp_path, max_shard_size=MANY, variant="ema")
    assert before < names(tmp_path)
    assert same(read(tmp_path), OLD)
    assert same({k: safetensors.torch.load_file(tmp_path / f)[k] for k, f in _map(tmp_path, ".ema").items()}, NEW)


def _map(folder: Path, variant: str) -> dict[str, str]:
    return json.loads((folder / f"model.safetensors.index{variant}.json").read_text())["weight_map"]


def test_a_checkpoint_is_saved_onto_the_files_it_is_read_from(tmp_path: Path) -> None:
    save(OLD, tmp_path, max_shard_size=MANY)
    for limit in (ONE, MANY, 32, ONE):
        existing = existing_checkpoint(tmp_path)
        write(plan_save(scan(tmp_path), existing=existing, max_shard_size=limit), tmp_path)
        assert same(read(tmp_path), OLD)


def test_tensors_mapped_from_the_file_that_is_replaced_keep_their_values(tmp_path: Path) -> None:
    save(OLD, tmp_path)
    mapped = safetensors.torch.load_file(tmp_path / "model.safetensors")
    save({key: mapped[key] for key in ("c", "b")}, tmp_path)
    assert same(mapped, OLD)
    assert same(read(tmp_path), {key: OLD[key] for key in ("b", "c")})


def test_a_folder_that_the_plan_does_not_know_is_refused(tmp_path: Path) -> None:
    blind = {limit: plan_save(plan_of(NEW), max_shard_size=limit) for limit in (ONE, MANY)}
    for before, after in ((ONE, MANY), (MANY, ONE), (MANY, MANY)):
        folder = tmp_path / f"{before}{after}"
        save(OLD, folder, max_shard_size=before)
        held = names(folder)
        with pytest.raises(StalePlanError):
            write(blind[after], folder, live=NEW)
        assert names(folder) == held
        assert same(read(folder), OLD)


# -- what is refused before anything is touched ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "live",
    [
        {},
        {"w": torch.ones(4, device="meta")},
        {"w": torch.ones(4).to_sparse()},
    ],
)
@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: build.cast(e, "float16")])
def test_a_live_tensor_without_data_is_refused(
    tmp_path: Path, live: dict[str, Tensor], wrap: Callable[[Expr], Expr]
) -> None:
    plan = plan_save({"key": wrap(build.live("w", TensorSpec((4,), "float32")))})
    with pytest.raises(PlanError) as raised:
        write(plan, tmp_path / "out", live=live)
    assert "w" in raised.value.keys
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", [torch.ones(5), torch.ones(4, dtype=torch.float16), torch.ones(2, 2)])
def test_a_live_tensor_that_is_not_the_planned_one_is_refused(tmp_path: Path, other: Tensor) -> None:
    with pytest.raises(StalePlanError) as raised:
        write(plan_save(plan_of({"w": torch.ones(4)})), tmp_path / "out", live={"w": other})
    assert raised.value.found == tensor_spec(other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: build.cast(e, "float16")])
def test_a_source_that_changed_is_refused(tmp_path: Path, wrap: Callable[[Expr], Expr]) -> None:
    file = tmp_path / "in.safetensors"
    safetensors.torch.save_file(OLD, file)
    plan = plan_save({key: wrap(expr) for key, expr in scan(file).items()})
    safetensors.torch.save_file({**OLD, "d": torch.ones(1)}, file)
    with pytest.raises(StalePlanError):
        write(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_while_it_is_read_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "in.safetensors"
    safetensors.torch.save_file(OLD, file)
    plan = plan_save(scan(file), max_shard_size=MANY)
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = real(fd, buffers, offset)
        with file.open("r+b") as other:
            other.seek(-1, os.SEEK_END)
            other.write(b"\x01")
        os.utime(file, ns=(1, 1))
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ApplyError):
        write(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stored_tensor_behind_the_end_of_its_file_is_refused(tmp_path: Path) -> None:
    leaf = Read(FileRef("in.safetensors", "safetensors", 100, ""), "w", TensorSpec((50,), "float32"), 8)
    with pytest.raises(TruncatedError):
        write(plan_save({"w": leaf}), tmp_path / "out")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "sub/x.safetensors"])
def test_a_plan_cannot_write_outside_its_folder(tmp_path: Path, name: str) -> None:
    shard = WriteShard(name, FrozenMap(plan_of(OLD).entries))
    with pytest.raises(UnsafePathError):
        write(SavePlan((shard, Publish((), name))), tmp_path / "out", live=OLD)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "."])
def test_a_plan_cannot_remove_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(b"")
    shard = WriteShard("model.safetensors", FrozenMap(plan_of(OLD).entries))
    with pytest.raises(UnsafePathError):
        write(SavePlan((shard, Publish((), shard.file, (name,)))), tmp_path / "out", live=OLD)
    assert (tmp_path / "x").exists()


def test_a_plan_publishes_exactly_what_it_writes(tmp_path: Path) -> None:
    shard = WriteShard("model.safetensors", FrozenMap(plan_of(OLD).entries))
    for plan in (
        SavePlan((shard,)),
        SavePlan((shard, Publish((), "other.safetensors"))),
        SavePlan((shard, WriteText("config.json", "{}"), Publish((), shard.file))),
    ):
        with pytest.raises(PlanError):
            write(plan, tmp_path / "out", live=OLD)
    assert names(tmp_path) == set()


# -- peak memory -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("case", ["save strided", "reshard", "cast"])
def test_peak_memory_is_one_tensor_and_buffers(tmp_path: Path, case: str) -> None:
    command = [sys.executable, str(BENCHMARK), "--megabytes", "96", "--folder", str(tmp_path), "--json"]
    ran = subprocess.run([*command, "--case", case], check=True, capture_output=True, text=True)
    found = json.loads(ran.stdout)
    assert found["peak"] <= 64 * 2**20 + found["tensor"]


# -- faults ------------------------------------------------------------------------------------------------------------

TRANSITIONS = [(before, after) for before in ("nothing", ONE, MANY) for after in (ONE, MANY)]


def faults(folder: Path, before: object, after: int | None, fault: Fault) -> Iterator[BaseException | None]:
    """Save OLD, then NEW with the k-th call failing, for every k until nothing fails."""
    for k in range(1, 200):
        into = folder / str(k)
        if before != "nothing":
            save(OLD, into, max_shard_size=before)
            (into / "config.json").write_text('{"old": 1}')
        filesystem, trace = counted(faulty(REAL, k, fault))
        raised: BaseException | None = None
        try:
            save(NEW, into, filesystem, max_shard_size=after, config=parse_config('{"new": 1}'))
        except (SaveError, Crash) as error:
            raised = error
        if raised is None and {call.outcome for call in trace} <= {"", "FileNotFoundError"}:
            return
        yield raised
    raise AssertionError("it never came to an end")


def state(folder: Path, before: object) -> str:
    if not folder.exists() or not {"model.safetensors", "model.safetensors.index.json"} & names(folder):
        return "OLD" if before == "nothing" else "lost"
    found = read(folder)
    return "NEW" if same(found, NEW) else "OLD" if same(found, OLD) else "mixed"


@pytest.mark.parametrize(("before", "after"), TRANSITIONS)
def test_an_error_at_any_call_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, before: object, after: int | None
) -> None:
    seen = set()
    for k, raised in enumerate(faults(tmp_path, before, after, errno.EIO), 1):
        folder = tmp_path / str(k)
        if raised is None:  # what is left of a lock that nobody holds is no reason to fail
            assert state(folder, before) == "NEW"
            continue
        assert isinstance(raised, SaveError)
        seen.add(raised.committed)
        now = state(folder, before)
        assert now in {"no": {"OLD"}, "yes": {"NEW"}, "unknown": {"OLD", "NEW"}}[raised.committed]
        if raised.committed == "no":
            left = names(folder) - {LOCK} if folder.exists() else set()  # a lock that nobody holds means nothing
            assert len(left) == {"nothing": 0, ONE: 2, MANY: 5}[before]  # type: ignore[index]
            if left:
                assert (folder / "config.json").read_text() == '{"old": 1}'
            assert not [name for name in left if is_part(name)]
    assert {"no", "yes", "unknown"} == seen


@pytest.mark.parametrize(("before", "after"), TRANSITIONS)
def test_a_death_at_any_call_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, before: object, after: int | None
) -> None:
    seen = set()
    for k, raised in enumerate(faults(tmp_path, before, after, "die"), 1):
        assert isinstance(raised, Crash)
        seen.add(state(tmp_path / str(k), before))
    assert seen == {"OLD", "NEW"}


def test_what_a_dead_writer_left_is_no_weights_to_anyone_and_does_not_stop_the_next(tmp_path: Path) -> None:
    seen: set[str] = set()
    for k, _ in enumerate(faults(tmp_path, MANY, MANY, "die"), 1):
        folder = tmp_path / str(k)
        left = {name for name in names(folder) if name.startswith(".")}
        assert not [name for name in left if name.endswith(".safetensors")]
        assert all(name in left or name.startswith(("model", "config")) for name in names(folder))
        seen |= left
        save(NEW, folder, max_shard_size=MANY)
        assert same(read(folder), NEW)
    assert seen


def test_a_full_disk_is_a_typed_error_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    for k, raised in enumerate(faults(tmp_path, ONE, MANY, errno.ENOSPC), 1):
        if raised is None:
            continue
        assert isinstance(raised, NoSpaceError)
        assert raised.needed > 3 * 4096
        assert raised.available >= 0
        assert (
            state(tmp_path / str(k), ONE)
            in {"no": {"OLD"}, "yes": {"NEW"}, "unknown": {"OLD", "NEW"}}[raised.committed]
        )


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(tmp_path: Path) -> None:
    save(OLD, tmp_path)
    real = os.statvfs(tmp_path)
    small, trace = counted(evolve(REAL, statvfs=lambda path: os.statvfs_result((*real[:4], 1, *real[5:]))))
    with pytest.raises(NoSpaceError) as raised:
        save(NEW, tmp_path, small, max_shard_size=MANY)
    assert {os.path.basename(call.path) for call in trace if changes(call)} == {LOCK}
    assert raised.value.committed == "no"
    assert (raised.value.available, raised.value.needed > 3 * 4096) == (real.f_frsize, True)
    assert names(tmp_path) == {"model.safetensors"}


def test_short_writes_are_continued(tmp_path: Path) -> None:
    short = evolve(REAL, pwritev=lambda fd, buffers, at: os.pwritev(fd, [buffers[0][:777]], at))
    tensors = {"a": torch.arange(3000.0), "b": torch.arange(70000.0)}
    save(tensors, tmp_path, short)
    assert same(read(tmp_path), tensors)


def test_a_lost_byte_is_noticed(tmp_path: Path) -> None:
    losing = evolve(REAL, pwritev=lambda fd, buffers, at: os.pwritev(fd, [*buffers[:-1], buffers[-1][:-1]], at) + 1)
    with pytest.raises(SaveError) as raised:
        save(OLD, tmp_path / "out", losing)
    assert raised.value.expected == raised.value.found + 1
    assert not (tmp_path / "out").exists()
