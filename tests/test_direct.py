"""Reads past the page cache: the same bytes, from any place, in any pieces, and through it where nothing else goes."""

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import funcmodel as fm
from funcmodel.core import build
from funcmodel.errors import ChangedError
from funcmodel.plan.routing import LARGE
from funcmodel.run.direct import DirectFile
from funcmodel.run.files import open_regular
from funcmodel.run.memory import PAGE, memory
from funcmodel.run.passages import Span, passages, trips
from funcmodel.run.ring import Ring
from tests.lazy_lane import LazyDevice
from tests.test_machine import can_count, evict, resident

BLOCK = 4096
SIZE = (12 << 20) + 1234  # longer than a thread's buffer, and no multiple of a block
EDGES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 8 << 20, (8 << 20) - 1, SIZE - 1, SIZE - 1234, SIZE - BLOCK, SIZE]
few = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def content() -> bytes:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=generator).numpy().tobytes()


@pytest.fixture(scope="module")
def path(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "bytes")
        found.write_bytes(content)
        yield found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def is_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Where to begin, and how long the pieces are, together mostly long enough to be read past the cache."""
    near = st.builds(lambda edge, by: min(max(edge + by, 0), SIZE), st.sampled_from(EDGES), st.integers(-3, 3))
    start, stop = sorted([draw(near | st.integers(0, SIZE)), draw(near | st.integers(0, SIZE))])
    cuts = sorted(draw(st.lists(st.integers(start, stop) | near, max_size=4)))
    inner = [min(max(cut, start), stop) for cut in cuts]
    return start, [b - a for a, b in pairwise([start, *inner, stop])]


@few
@given(span=spans(), unaligned=st.integers(0, 65))
def test_any_bytes_into_any_pieces(path: Path, content: bytes, span: tuple[int, list[int]], unaligned: int) -> None:
    """readv_into(buffers, o) leaves bytes[o : o + len] in them, whatever the alignment, and nothing beside."""
    start, sizes = span
    room = bytearray(b"\xee" * (unaligned + sum(sizes) + 9))
    whole = memoryview(room)[unaligned : unaligned + sum(sizes)]
    buffers, at = [], 0
    for size in sizes:
        buffers.append(whole[at : at + size])
        at += size
    with open_regular(path) as file, DirectFile(file) as direct:
        direct.readv_into(buffers, start)
    assert whole == content[start : start + len(whole)]
    assert room[:unaligned] == b"\xee" * unaligned
    assert room[unaligned + len(whole) :] == b"\xee" * 9


@few
@given(span=spans(), shift=st.sampled_from([0, 0, 0, 512, 1]))
def test_any_bytes_to_where_they_may_go_at_once(
    path: Path, content: bytes, span: tuple[int, list[int]], shift: int
) -> None:
    """So they do into memory that starts on a page, from its first byte to its last."""
    start, size = span[0] // BLOCK * BLOCK, sum(span[1])
    pages = memoryview(mmap.mmap(-1, BLOCK + size + shift + 9))
    pages[:] = b"\xee" * len(pages)
    whole = pages[shift : shift + size]
    with open_regular(path) as file, DirectFile(file) as direct:
        direct.readv_into([whole], start)
    assert whole == content[start : start + size]
    assert {*pages[:shift], *pages[shift + size :]} == {0xEE}


@few
@given(span=spans(), shift=st.sampled_from([0, 0, 0, 512, 1]), room=st.sampled_from([0, 1, BLOCK]))
def test_any_bytes_into_the_pages_of_a_buffer(
    path: Path, content: bytes, span: tuple[int, list[int]], shift: int, room: int
) -> None:
    """They arrive, and no other page of the buffer changes."""
    offset, size = span[0], sum(span[1])
    start = BLOCK + offset % BLOCK
    stop = start + size
    pages = memoryview(mmap.mmap(-1, shift + stop + 2 * BLOCK))
    pages[:] = b"\xee" * len(pages)
    where = pages[shift : shift + stop + room]
    with open_regular(path) as file, DirectFile(file) as direct:
        direct.read_pages(where, start, stop, offset)
    assert where[start:stop] == content[offset : offset + size]
    after = -(-stop // BLOCK) * BLOCK
    assert {*pages[: shift + BLOCK], *pages[shift + after :]} == {0xEE}


@pytest.mark.parametrize("left", [0, 1, BLOCK, BLOCK + 1, (8 << 20) + 7, SIZE - 1])
def test_a_file_that_shrinks_under_a_buffer_is_an_error(tmp_path: Path, content: bytes, left: int) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(content)
    with open_regular(path) as file, DirectFile(file) as direct:
        os.truncate(path, left)
        with pytest.raises(ChangedError) as caught:
            direct.read_pages(memoryview(mmap.mmap(-1, SIZE + 2 * BLOCK)), 5, SIZE, 5)
    assert (caught.value.path, caught.value.expected, caught.value.found) == (str(path), SIZE, left)


def test_what_is_changed_on_a_device_has_room_behind_what_a_disk_wrote(path: Path, content: bytes) -> None:
    device = LazyDevice()
    large, small = torch.zeros(300_001, dtype=torch.uint8), torch.zeros(90, 100, dtype=torch.uint8)
    box = (((0, 100),), ((0, 90),))
    with open_regular(path) as file, DirectFile(file) as source:
        turned = passages(source, 300_078, (100, 90), torch.uint8, box, small.T, (), most=8 << 20)
        items = [Span(source, 77, 300_001, large, 0), *turned]
        Ring(threads=1, buffers=2, nbytes=8 << 20, pinned=True).run({device.lane: items})
    device.synchronize()
    assert large.numpy().tobytes() == content[77:300_078]
    assert small.T.contiguous().numpy().tobytes() == content[300_078:309_078]


class Watched(DirectFile):
    """How many bytes pass through a buffer of the file's own."""

    def readv_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.through = getattr(self, "through", 0) + sum(map(len, buffers))
        super().readv_into(buffers, offset)


NEAR = st.sampled_from([0, 0, 1, 4, 64, 5000])
LENGTH = st.sampled_from([1, 100, 5000, 200_000, 256 << 10, 300_001, 1 << 20, 3_000_000])


@few
@given(
    st.lists(st.tuples(NEAR, LENGTH, st.booleans()), min_size=1, max_size=12),
    st.integers(0, 5000),
    st.sampled_from([4096, 1 << 18, 1 << 19, 8 << 20]),
)
@example([(0, 300_001, False), (0, 300_001, True), (0, 300_001, True), (5, 300_001, True), (0, 1, True)], 77, 8 << 20)
def test_what_is_large_goes_from_the_disk_into_a_buffer_of_the_ring_at_once(
    path: Path, content: bytes, drawn: list[tuple[int, int, bool]], first: int, most: int
) -> None:
    device, block = LazyDevice(), torch.zeros(SIZE, dtype=torch.uint8)
    large = top = 0
    with open_regular(path) as file, Watched(file) as source:
        items, offset = [], first
        for gap, size, packed in drawn:
            offset += gap
            if offset + size > SIZE:
                break
            to, at = (block, top) if packed else (torch.zeros(size, dtype=torch.uint8), 0)
            items.append(Span(source, offset, size, to, at, padded=packed))
            offset, top = offset + size, top + size * packed
        for trip in trips(items, most, 64):
            for stop in trip:
                assert 0 <= stop.start < stop.end <= most
                large += stop.size * stop.direct
                if stop.direct:
                    assert (stop.start - stop.offset) % BLOCK == 0
                    for other in trip:
                        if other is not stop and other.end > stop.start // BLOCK * BLOCK:
                            beside = other.start - stop.start == other.offset - stop.offset and other.direct
                            assert beside or other.start >= -(-stop.end // BLOCK) * BLOCK
        Ring(threads=1, buffers=2, nbytes=most, pinned=True).run({device.lane: items})
        through = getattr(source, "through", 0)
    device.synchronize()
    assert device.idle()
    for one in items:
        assert one.to[one.at : one.at + one.nbytes].numpy().tobytes() == content[one.first : one.first + one.nbytes]
    if is_direct(path):
        assert through == sum(one.nbytes for one in items) - large
    if most > 1 << 18:
        assert large >= sum(one.nbytes for one in items if one.nbytes >= 1 << 20) / 2


@pytest.mark.parametrize("nbytes", [1, 1000, 64 << 10, 4 << 20, (4 << 20) + 1, 9 << 20])
@pytest.mark.parametrize("step", [64, PAGE])
def test_memory_starts_where_it_should(nbytes: int, step: int) -> None:
    where = memory(nbytes, step)
    assert len(where) == nbytes
    assert np.frombuffer(where, np.uint8).ctypes.data % step == 0


@pytest.mark.parametrize("buffers", [[], [memoryview(bytearray())], [memoryview(bytearray())] * 3])
def test_nothing_is_wanted(path: Path, buffers: list[memoryview]) -> None:
    with open_regular(path) as file, DirectFile(file) as direct:
        direct.readv_into(buffers, 0)
        direct.readv_into(buffers, SIZE)


def test_what_is_read_does_not_stay_in_the_page_cache(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(content)
    if not is_direct(path) or not can_count():
        pytest.skip("this file system reads through its cache only, or nobody counts what is in it")
    evict(path)
    if resident(path):
        pytest.skip("this file system keeps what it has")
    buffer = bytearray(SIZE)
    with open_regular(path) as file, DirectFile(file) as direct:
        direct.readv_into([memoryview(buffer)], 0)
    assert buffer == content
    assert resident(path) == 0


def test_files_in_memory_are_read_like_any_other(content: bytes) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = Path(folder, "bytes")
        path.write_bytes(content)
        buffer = bytearray(SIZE - 5)
        with open_regular(path) as file, DirectFile(file) as direct:
            direct.readv_into([memoryview(buffer)], 5)
    assert buffer == content[5:]


def test_the_descriptor_is_closed_whatever_happens(path: Path) -> None:
    before = descriptors()
    with open_regular(path) as file:
        with DirectFile(file):
            assert descriptors() == before + 1 + is_direct(path)
        assert descriptors() == before + 1
        with pytest.raises(ZeroDivisionError), DirectFile(file):
            raise ZeroDivisionError
        assert descriptors() == before + 1
    assert descriptors() == before


@pytest.mark.parametrize("left", [0, 1, BLOCK, BLOCK + 1, (8 << 20) + 7, SIZE - 1])
def test_a_file_that_shrinks_is_an_error(tmp_path: Path, content: bytes, left: int) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(content)
    with open_regular(path) as file, DirectFile(file) as direct:
        os.truncate(path, left)
        with pytest.raises(ChangedError) as caught:
            direct.readv_into([memoryview(bytearray(SIZE))], 0)
    assert (caught.value.path, caught.value.expected, caught.value.found) == (str(path), SIZE, left)


def test_a_cold_checkpoint_is_what_safetensors_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"small{i}": torch.randn(i + 1, generator=generator) for i in range(50)}
    tensors["big"] = torch.randn(LARGE // 8, 2, generator=generator)
    tensors["odd"] = torch.randint(0, 256, (3_000_001,), dtype=torch.uint8, generator=generator)
    save_file(tensors, tmp_path / "m.safetensors")
    expected = load_file(tmp_path / "m.safetensors")
    plan = fm.scan(tmp_path / "m.safetensors")
    wanted = {**plan, "half": build.cast(plan["big"], "bfloat16"), "turned": build.transpose(plan["big"])}
    evict(tmp_path / "m.safetensors")
    into = {key: torch.empty_like(expected[key]) for key in plan}
    before = descriptors()
    found = fm.materialize(wanted)
    fm.fill(dict(plan), into)
    assert descriptors() == before
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor)
        assert torch.equal(into[key], tensor)
    assert torch.equal(found["half"], expected["big"].bfloat16())
    assert torch.equal(found["turned"], expected["big"].t())
