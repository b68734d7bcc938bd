"""Sources that cost much, claim much, or change while they are read: bounded memory and time, and a typed error."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import funcmodel as fm

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
MIB = 1 << 20
# Small inputs show with a small allowance what large ones show with the one that is promised.
ALLOWED = (64 if NIGHTLY else 16) * MIB
MEASURE = """
import json, os, sys, time
import funcmodel as fm
from funcmodel.core import entries, headers

fm.scan
for line in sys.stdin:
    child = os.fork()  # every case starts with the same memory
    if not child:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        def highest():
            with open("/proc/self/status") as file:
                return next(int(row.split()[1]) << 10 for row in file if row.startswith("VmHWM:"))
        before, start = highest(), time.process_time()
        try:
            found = len(fm.scan(line.strip()))
        except fm.CheckpointError as error:
            found = error.code
        print(json.dumps([found, highest() - before, time.process_time() - start]), flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(json.dumps([f"died of {status}", 0, 0]), flush=True)
"""
Scanned = tuple[Any, int, float]


@pytest.fixture(scope="module")
def scanned() -> Iterator[Callable[[Path], Scanned]]:
    """What a scan finds, its peak of memory in bytes, and its time in seconds, in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", MEASURE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as to:
        assert to.stdin is not None
        assert to.stdout is not None

        def ask(path: Path) -> Scanned:
            to.stdin.write(f"{path}\n")  # type: ignore[union-attr]
            to.stdin.flush()  # type: ignore[union-attr]
            found, peak, seconds = json.loads(to.stdout.readline())  # type: ignore[union-attr]
            return found, peak, seconds

        yield ask
        to.stdin.close()


def entry(i: int, start: int, stop: int) -> str:
    return f'"t{i}":{{"dtype":"U8","shape":[{stop - start}],"data_offsets":[{start},{stop}]}}'


def many(count: int) -> tuple[str, int]:
    return "{" + ",".join(entry(i, i, i + 1) for i in range(count)) + "}", count


def with_flaw(count: int, flaw: str) -> tuple[str, int]:
    """Nothing is wrong until the last entry."""
    text, size = many(count)
    return text[:-1] + flaw + "}", size


N = 1_000_000 if NIGHTLY else 40_000
LARGE: list[tuple[str, Any, Callable[[], tuple[str, int]]]] = [
    (
        "30 dimensions",
        "NDIM",
        lambda: ('{"w":{"dtype":"F32","shape":[' + "1," * (30 * N) + '1],"data_offsets":[0,4]}}', 4),
    ),
    ("38 deep", "JSON_DEPTH", lambda: ('{"a":' + "[" * (30 * N) + "]" * (30 * N) + "}", 0)),
    ("38 unbalanced", "JSON_DEPTH", lambda: ('{"a":' + "[" * (60 * N) + "}", 0)),
    ("38 quotes that never close", "ENTRY_FIELDS", lambda: ('{"w":"' + '\\"' * (30 * N) + "}", 0)),
    ("38 wide", "ENTRY_FIELDS", lambda: ('{"a":[' + "[]," * (20 * N) + "[]]}", 0)),
    ("38 wide, of objects", "ENTRY_FIELDS", lambda: ('{"a":{"b":[' + "{}," * (20 * N) + "{}]}}", 0)),
    ("40 overlapping", "OVERLAP", lambda: ("{" + ",".join(entry(i, 0, 1) for i in range(N)) + "}", 1)),
    ("40 in the end", "OVERLAP", lambda: with_flaw(N, "," + entry(N, 0, 1))),
    ("a hole in the end", "HOLE", lambda: with_flaw(N, "," + entry(N, N + 1, N + 2))),
    ("a name twice in the end", "DUPLICATE_KEY", lambda: with_flaw(N, "," + entry(0, N, N))),
    (
        "a flaw in the end",
        "SIZE_MISMATCH",
        lambda: with_flaw(N, ',"w":{"dtype":"F32","shape":[1],"data_offsets":[0,1]}'),
    ),
    ("no JSON in the end", "BAD_JSON", lambda: with_flaw(N, ',"w"')),
    ("one byte short", "TRUNCATED", lambda: (many(N)[0], N - 1)),
    (
        "metadata",
        "METADATA_TYPE",
        lambda: ('{"__metadata__":{' + "".join(f'"{i}":"",' for i in range(5 * N)) + '"x":1}}', 0),
    ),
    (
        "a long text",
        "NAME_TOO_LONG",
        lambda: ('{"' + "x" * (60 * N) + '":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0),
    ),
]


@pytest.mark.parametrize(("code", "make"), [pytest.param(c, m, id=n) for n, c, m in LARGE])
def test_a_header_that_is_refused_costs_little_beside_the_file(
    code: str, make: Callable[[], tuple[str, int]], scanned: Callable[[Path], Scanned], tmp_path: Path
) -> None:
    text, size = make()
    raw = text.encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))
    found, peak, seconds = scanned(path)
    print(f"{len(raw)} bytes, peak {peak / MIB:.1f} MiB, {seconds / len(raw) * 1e6:.3f} us/byte")
    assert found == code
    assert peak <= path.stat().st_size + ALLOWED


def test_39_a_header_of_many_tensors_costs_15_times_its_size(
    scanned: Callable[[Path], Scanned], tmp_path: Path
) -> None:
    text, size = many(N)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(size))
    found, peak, seconds = scanned(path)
    print(f"{len(text)} bytes, peak {peak / MIB:.1f} MiB, {seconds / len(text) * 1e6:.3f} us/byte")
    assert found == N
    assert peak <= 15 * len(text)


def test_the_depth_of_what_is_unbalanced_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for closed in ("", "]", "]}", "}]"):
        for depth in (15, 16):
            text = '{"a":' + "[" * depth + closed
            path.write_bytes(struct.pack("<Q", len(text) + 1) + text.encode() + b"}")
            with pytest.raises(fm.HeaderError) as caught:
                fm.scan(path)
            assert caught.value.code == ("JSON_DEPTH" if depth == 16 else "BAD_JSON")


# -- 63 ----------------------------------------------------------------------------------------------------------------


def big_index(folder: Path, keys: int, files: int) -> None:
    names = [f"model-{i:06}.safetensors" for i in range(files)]
    where = {f"k{i}": names[i % files] for i in range(keys)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_63_a_large_index_of_files_that_are_absent(scanned: Callable[[Path], Scanned], tmp_path: Path) -> None:
    big_index(tmp_path, N, N // 10)
    found, peak, seconds = scanned(tmp_path)
    size = (tmp_path / "model.safetensors.index.json").stat().st_size
    print(f"{size} bytes, peak {peak / MIB:.1f} MiB, {seconds:.2f} s")
    assert found == "OPEN"
    assert peak <= 15 * size


@pytest.mark.skipif(not NIGHTLY, reason="100,000 files")
def test_63_a_large_index_of_files_that_are_there(scanned: Callable[[Path], Scanned], tmp_path: Path) -> None:
    big_index(tmp_path, N, N // 10)
    for i in range(N // 10):
        text = "{" + ",".join(entry(i + j * (N // 10), j, j + 1) for j in range(10)).replace('"t', '"k') + "}"
        (tmp_path / f"model-{i:06}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(10))
    found, peak, seconds = scanned(tmp_path)
    print(f"{N} keys, peak {peak / MIB:.1f} MiB, {seconds:.2f} s")
    assert found == N


@pytest.mark.parametrize(
    "text", ['{"weight_map": [' + "[]," * 1_000_000 + "0]}", '{"x": [' + "{}," * 1_000_000 + "0]}"]
)
def test_a_large_index_without_a_map_is_not_built(
    text: str, scanned: Callable[[Path], Scanned], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    found, peak, _ = scanned(tmp_path)
    print(f"{len(text)} bytes, peak {peak / MIB:.1f} MiB")
    assert found == "INDEX_SHAPE"
    assert peak <= len(text) + ALLOWED


# -- 41 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 1000])
def test_41_a_terabyte_that_is_not_there_is_planned_and_refused_before_it_is_read(count: int, tmp_path: Path) -> None:
    """Also in pieces each of which the system would promise."""
    path = tmp_path / "model.safetensors"
    size = 10**12 // count
    text = "{" + ",".join(entry(i, i * size, (i + 1) * size) for i in range(count)) + "}"
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text.encode())
        try:
            out.truncate(8 + len(text) + 10**12)
        except OSError:
            pytest.skip("this file system holds no sparse terabyte")
    plan = fm.scan(path)
    assert fm.nbytes(plan) == 10**12
    assert sum(fm.cost(plan).read.values()) == 10**12
    with pytest.raises(fm.NoMemoryError) as caught:
        fm.materialize(plan)
    assert caught.value.needed == 10**12
    net = nn.ParameterDict(
        {f"t{i}": nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), False) for i in range(count)}
    )
    with pytest.raises(fm.NoMemoryError):
        fm.load(net, path)
    assert all(p.is_meta for p in net.parameters())
    assert (
        fm.materialize(fm.at("t0", lambda _, e: fm.expr.index(e, ((0, 10),)))(fm.keep("t0")(plan)))["t0"].tolist()
        == [0] * 10
    )


# -- 85 ----------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(600, 40)
        self.c = nn.Linear(3, 3)


def cut(path: Path) -> None:
    os.truncate(path, 5000)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def overwritten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))


def plans(net: nn.Module, path: Path) -> tuple[fm.StateDictPlan, fm.LoadPlan]:
    plan = fm.scan(path)
    return plan, fm.checked(fm.plan_load(fm.module_spec(net), plan))


def streamed(net: nn.Module, plan: fm.StateDictPlan, load: fm.LoadPlan) -> None:
    for _ in fm.stream(plan):
        pass


READERS: dict[str, Callable[[nn.Module, fm.StateDictPlan, fm.LoadPlan], object]] = {
    "materialize": lambda net, plan, load: fm.materialize(plan),
    "stream": streamed,
    "fill": lambda net, plan, load: fm.fill(plan, {k: torch.zeros_like(v) for k, v in net.state_dict().items()}),
    "swap": lambda net, plan, load: fm.apply(load, net),
    "in_place": lambda net, plan, load: fm.apply(load, net, commit="in_place"),
    "in_place after a reading": lambda net, plan, load: fm.apply(load, net, commit="in_place", preflight="read"),
}


@pytest.mark.parametrize("change", [cut, emptied, overwritten])
@pytest.mark.parametrize("how", READERS)
def test_85_a_source_that_changes_at_any_read_is_a_typed_error(
    how: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    path = tmp_path / "model.safetensors"
    tensors = {key: value.clone() for key, value in Net().state_dict().items()}
    steps = 0
    while True:
        save_file(tensors, path)
        os.utime(path, ns=(10**18, 10**18))
        net = Net()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        plan, load = plans(net, path)
        calls = 0

        def changing(fd: int, buffers: Any, offset: int, at: int = steps + 1) -> int:
            nonlocal calls
            calls += 1
            if calls == at:
                change(path)
            return preadv(fd, buffers, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", changing)
            try:
                READERS[how](net, plan, load)
                raised = None
            except fm.ApplyError as error:
                raised = error
        if calls <= steps:
            assert raised is None
            break
        assert isinstance(raised, fm.ChangedError | fm.StalePlanError | fm.ActionError)
        after = net.state_dict()
        touched = {key for key in before if not torch.equal(before[key], after[key])}
        assert touched <= set(getattr(raised, "torn", ())) | set(getattr(raised, "done", ()))
        steps += 1
    assert steps >= 2
