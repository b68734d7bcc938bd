"""The engine: memory, coalesced calls, boxes as byte ranges, whole stored tensors."""

import mmap
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from safetensors.torch import save_file

from funcmodel.errors import ChangedError, PlanError, StalePlanError, TruncatedError
from funcmodel.plan.queries import cost, nbytes
from funcmodel.plan.routing import GAP, SLAB, SMALL, routing
from funcmodel.records.expressions import Read
from funcmodel.records.plans import StateDictPlan
from funcmodel.run.boxes import CHUNK, chunks, counts, ranges, whole, widened
from funcmodel.run.engine import IOVECS, RANGE, _Decoded, jobs, opened, perform, read_plain
from funcmodel.run.files import SourceFile, open_regular
from funcmodel.run.formats import FORMATS
from funcmodel.run.memory import memory
from funcmodel.run.scan import scan


def stored(path: Path, tensors: dict[str, torch.Tensor]) -> list[tuple[str, Read]]:
    save_file(tensors, path)
    return [(key, read) for key, read in scan(path).items() if isinstance(read, Read)]


def plain(reads, files):
    return read_plain(dict(reads), files, routing(dict(reads)).routes, threads=2)


def raw_file(path: Path, text: str, data: bytes) -> list[tuple[str, Read]]:
    header = text.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return [(key, read) for key, read in scan(path).items() if isinstance(read, Read)]


@pytest.mark.parametrize("nbytes", [0, 1, 63, SMALL - 1, SMALL, SLAB, SLAB + 1])
def test_memory_is_aligned_writable_and_outlives_its_first_view(nbytes):
    where = memory(nbytes)
    assert len(where) == nbytes
    if nbytes:
        tensor = torch.frombuffer(where, dtype=torch.uint8)
        where[-1:] = b"\x07"
        del where
        assert tensor.data_ptr() % 64 == 0
        assert tensor[-1] == 7


def huge_pages() -> int:
    """Bytes of this process that lie in huge pages."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("AnonHugePages"))


@pytest.mark.parametrize("nbytes", [100 << 10, 1 << 20, 3 << 20])
def test_many_tensors_lie_in_huge_pages_where_the_system_has_them(nbytes):
    total, before = 96 << 20, huge_pages()
    whole = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(whole, np.uint8)[:] = 1
    if huge_pages() - before < total // 2:
        pytest.skip("the system gives no huge pages")
    whole.close()
    before, kept = huge_pages(), [memory(nbytes) for _ in range(total // nbytes)]
    for where in kept:
        np.frombuffer(where, np.uint8)[:] = 1
    assert huge_pages() - before > total // 2


def test_memory_that_the_machine_lacks_is_refused():
    with pytest.raises(MemoryError):
        memory(1 << 60)


def test_adjacent_pieces_share_a_call_up_to_its_limits(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(100))
    with open_regular(path) as file:
        many = [(i, memory(1)) for i in range(IOVECS + 1)]
        assert [(at, len(views)) for _, at, views in jobs(file, many)] == [(0, IOVECS), (IOVECS, 1)]
        apart = [(0, memory(4)), (4, memory(4)), (9, memory(4))]
        assert [(at, len(views)) for _, at, views in jobs(file, apart)] == [(0, 2), (9, 1)]
        big = [(5, memory(RANGE)), (5 + RANGE, memory(RANGE + 7))]
        assert [(at, sum(map(len, views))) for _, at, views in jobs(file, big)] == [
            (5, RANGE),
            (5 + RANGE, RANGE),
            (5 + 2 * RANGE, 7),
        ]
        again = [(0, memory(4)), (0, memory(4))]
        assert [at for _, at, _ in jobs(file, again)] == [0, 0]


class Counted:
    """A source that remembers its calls."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.calls: list[tuple[int, int]] = []

    def readv_into(self, buffers, offset) -> None:
        self.calls.append((offset, sum(map(len, buffers))))
        self.file.readv_into(buffers, offset)


def test_what_lies_between_small_tensors_is_read_with_them_and_reaches_nobody(tmp_path):
    rng = random.Random(0)
    tensors = {f"{i:03d}": torch.full((rng.choice([0, 1, 100, 700]),), float(i)) for i in range(900)}
    reads = stored(tmp_path / "m.safetensors", tensors)
    wanted = [(key, read) for key, read in reads if rng.random() < 0.4]
    plan = StateDictPlan(dict(wanted))
    slabs = dict.fromkeys(plan, "slab")
    (ref,) = {read.file for _, read in wanted}
    calls = []
    with open_regular(ref.path) as file:
        for between in (0, GAP):
            source = Counted(file)
            found = read_plain(dict(wanted), {ref: source}, slabs, 1, between)
            assert all(torch.equal(found[key], tensors[key]) for key in plan)
            calls.append(source.calls)
        decoded = _Decoded(file, lambda source, buffer, offset: source.readv_into([buffer], offset))
        found = read_plain(dict(wanted), {ref: decoded}, slabs, 1, GAP)  # where other bytes may mean nothing
        assert all(torch.equal(found[key], tensors[key]) for key in plan)
    alone, together = calls
    assert sum(size for _, size in alone) == nbytes(plan)
    assert sum(size for _, size in together) == cost(plan).read[ref.path] > nbytes(plan)
    assert len(together) < len(alone) / 2


def test_many_ranges_are_read_by_several_threads_and_all_arrive(tmp_path):
    path = tmp_path / "bytes"
    content = os.urandom(3 * RANGE + 5)
    path.write_bytes(content)
    where = memory(len(content))
    with open_regular(path) as file:
        perform(jobs(file, [(0, where)]), 4)
    assert where == content


class Interrupted:
    """A source whose second call is interrupted, as a signal would."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def readv_into(self, buffers, offset) -> None:
        self.calls.append(offset)
        if len(self.calls) == 2:
            raise KeyboardInterrupt


def test_after_an_interrupt_no_thread_still_reads():
    source = Interrupted()
    others = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        perform(jobs(source, [(0, memory(64 * RANGE))]), 2)
    calls = len(source.calls)
    assert calls < 64
    assert set(threading.enumerate()) <= others
    assert len(source.calls) == calls


def test_small_tensors_share_memory_and_nothing_else(tmp_path):
    tensors = {f"t{i}": torch.full((5, 3), float(i)) for i in range(100)}
    reads = stored(tmp_path / "m.safetensors", tensors)
    with opened([reads[0][1].file], FORMATS) as files:
        found = plain(reads, files)
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
    assert max(t.data_ptr() for t in found.values()) - min(t.data_ptr() for t in found.values()) == 99 * 64
    assert all(tensor.untyped_storage().nbytes() == 60 for tensor in found.values())
    found["t0"].add_(1)
    assert found["t0"]._version > found["t1"]._version
    assert torch.equal(found["t1"], tensors["t1"])


def test_a_batch_norm_in_a_slab_can_be_trained(tmp_path):
    """Buffers that change in place must not invalidate weights that autograd saved beside them."""
    tensors = {"w": torch.randn(4, 4), "mean": torch.zeros(4)}
    reads = stored(tmp_path / "m.safetensors", tensors)
    with opened([reads[0][1].file], FORMATS) as files:
        found = plain(reads, files)
    weight = torch.nn.Parameter(found["w"])
    x = torch.randn(2, 4, requires_grad=True)
    loss = (x @ weight).sum()
    found["mean"].add_(1)
    loss.backward()
    assert torch.equal(x.grad, torch.ones(2, 4) @ tensors["w"].T)


def test_odd_offsets_are_read_into_aligned_memory(tmp_path):
    data = os.urandom(1 + 8 + 32)
    reads = raw_file(
        tmp_path / "m.safetensors",
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        '"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},'
        '"c":{"dtype":"C64","shape":[2,2],"data_offsets":[9,41]}}',
        data,
    )
    with opened([reads[0][1].file], FORMATS) as files:
        found = plain(reads, files)
    assert {key: t.data_ptr() % 64 for key, t in found.items()} == {"a": 0, "b": 0, "c": 0}
    assert b"".join(bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in found.values()) == data


def test_zero_dims_empty_and_large_tensors(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7, dtype=torch.int16),
        "large": torch.randn(SMALL),
        "bool": torch.tensor([True, False]),
    }
    reads = stored(tmp_path / "m.safetensors", tensors)
    with opened([reads[0][1].file], FORMATS) as files:
        found = plain(reads, files)
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    assert {k: tuple(v.shape) for k, v in found.items()} == {k: tuple(v.shape) for k, v in tensors.items()}


def test_slabs_are_shared_across_files_and_bounded(tmp_path):
    reads = []
    expected = {}
    for shard in range(3):
        tensors = {f"s{shard}.{i}": torch.full((60, 128), float(i)) for i in range(60)}
        expected.update(tensors)
        reads += stored(tmp_path / f"{shard}.safetensors", tensors)
    with opened([read.file for _, read in reads], FORMATS) as files:
        found = plain(reads, files)
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_f4_has_two_elements_in_a_byte(tmp_path):
    data = bytes(range(6))
    reads = raw_file(tmp_path / "m.safetensors", '{"a":{"dtype":"F4","shape":[3,4],"data_offsets":[0,6]}}', data)
    with opened([reads[0][1].file], FORMATS) as files:
        found = plain(reads, files)["a"]
    assert found.dtype == torch.float4_e2m1fn_x2
    assert found.shape == (3, 2)
    assert bytes(found.view(torch.uint8).flatten().tolist()) == data


def test_a_dtype_that_torch_lacks_is_a_plan_error(tmp_path):
    reads = raw_file(tmp_path / "m.safetensors", '{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}', bytes(3))
    with opened([reads[0][1].file], FORMATS) as files, pytest.raises(PlanError):
        plain(reads, files)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_every_file_is_checked_before_any_is_handed_out(tmp_path):
    good = stored(tmp_path / "good.safetensors", {"a": torch.ones(2)})[0][1].file
    bad = stored(tmp_path / "bad.safetensors", {"a": torch.ones(2)})[0][1].file
    save_file({"b": torch.ones(2)}, tmp_path / "bad.safetensors")
    before = descriptors()
    with pytest.raises(StalePlanError) as caught, opened([good, bad], FORMATS):
        raise AssertionError("never reached")
    assert caught.value.path == bad.path
    assert descriptors() == before


def test_files_are_checked_again_at_the_end_and_closed_after_any_error(tmp_path):
    path = tmp_path / "m.safetensors"
    ref = stored(path, {"a": torch.ones(2)})[0][1].file
    before = descriptors()
    with pytest.raises(ChangedError), opened([ref], FORMATS):
        os.utime(path, ns=(0, 1))
    with pytest.raises(KeyboardInterrupt), opened([ref], FORMATS):
        raise KeyboardInterrupt
    assert descriptors() == before


def test_a_file_that_shrinks_while_it_is_read_is_a_typed_error(tmp_path):
    path = tmp_path / "m.safetensors"
    reads = stored(path, {"a": torch.ones(100_000)})
    with open_regular(path) as file:
        os.truncate(path, 1000)
        with pytest.raises(ChangedError):
            plain(reads, {reads[0][1].file: file})


def test_a_tensor_planned_behind_the_end_of_its_file_is_refused(tmp_path):
    from funcmodel.run.evaluate import evaluate

    read = stored(tmp_path / "m.safetensors", {"a": torch.ones(4)})[0][1]
    with pytest.raises(TruncatedError) as caught:
        evaluate(evolve(read, offset=read.offset + 1))
    assert caught.value.found == read.file.nbytes


def test_a_format_may_decode_its_bytes(tmp_path):
    reads = stored(tmp_path / "m.safetensors", {"a": torch.arange(6, dtype=torch.uint8), "b": torch.ones(2)})

    def inverted(file, buffer, offset):
        file.read_into(buffer, offset)
        buffer[:] = bytes(255 - byte for byte in buffer)

    with opened([reads[0][1].file], (evolve(FORMATS[0], read=inverted),)) as files:
        found = plain(reads, files)
    assert found["a"].tolist() == [255, 254, 253, 252, 251, 250]


# -- boxes -------------------------------------------------------------------------------------------------------------


def test_ranges_of_a_box_are_its_rows():
    assert list(ranges((4, 6), 2, (((1, 2),), ((0, 6),)))) == [(12, 24)]
    assert list(ranges((4, 6), 2, (((1, 2),), ((2, 3),)))) == [(16, 6), (28, 6)]
    assert list(ranges((4, 6), 2, (((3, 1), (0, 1)), ((0, 6),)))) == [(36, 12), (0, 12)]
    assert list(ranges((), 8, ())) == [(0, 8)]
    assert list(ranges((0, 3), 8, whole((0, 3)))) == []


def test_few_runs_are_read_exactly_and_many_small_ones_with_their_gaps():
    few, many, far = ((0, 64),), ((0, 65),), ((0, 1000),)
    column = ((3, 1),)
    assert widened((64, 8), 4, (few, column)) == (few, column)
    assert widened((65, 8), 4, (many, column)) == (many, ((0, 8),))
    assert widened((1000, 100_000), 4, (far, column)) == (far, column)
    assert widened((10, 8), 4, (((2, 1), (2, 1)), ((0, 8),))) == (((2, 1),), ((0, 8),))


def test_chunks_stay_small_and_cover_the_box_once():
    shape = (4000, 3000)
    box = (((10, 3900),), ((5, 2000), (2500, 500)))
    seen = torch.zeros(counts(box), dtype=torch.int32)
    for part, wide, place in chunks(shape, 4, box):
        assert counts(wide)[0] * counts(wide)[1] * 4 <= CHUNK
        assert counts(part) == tuple(size for _, size in place)
        (row, rows), (column, columns) = place
        seen[row : row + rows, column : column + columns] += 1
    assert bool((seen == 1).all())
