"""Real processes: writers that are killed, writers and readers that meet, and the system calls that they make."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import funcmodel as fm
from funcmodel.errors import BusyError, ChangedError, CheckpointError, SaveError, StalePlanError
from funcmodel.run.faults import changes, counted, faulty, restore
from funcmodel.run.faults import disk as held
from funcmodel.run.filesystem import REAL, FileSystem
from funcmodel.run.locks import FolderLocks
from funcmodel.run.scan import scan_checkpoint
from tests.transitions import LEFT, NIGHTLY, folder, unmarked

KILLS = 200 if NIGHTLY else 20
READS = 10_000 if NIGHTLY else 500
MEGABYTES = 200
SHARD = 40 << 20

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["funcmodel.api", "funcmodel.run.faults", "safetensors.torch", "tests.test_kill"])


def started(target: Callable[..., None], *args: object) -> tuple[ForkServerProcess, Connection]:
    """A process forked from one that has torch already, and the end of a pipe whose other end it gets first."""
    mine, its = PROCESSES.Pipe()
    process = PROCESSES.Process(target=target, args=(its, *args), daemon=True)
    process.start()
    its.close()
    return process, mine


def ended(process: ForkServerProcess) -> int | None:
    process.join(60)
    assert process.exitcode is not None
    code = process.exitcode
    process.close()
    return code


# -- killed at any time ------------------------------------------------------------------------------------------------


def large(side: int) -> dict[str, Tensor]:
    """Tensors of 8 MiB, each of its own value."""
    count = MEGABYTES * 10**6 // (8 << 20) + 1
    return {f"layers.{i}.weight": torch.full((1 << 21,), side * 1000.0 + i) for i in range(count)}


def side_of(tensors: Mapping[str, Tensor]) -> set[int]:
    """Which sides a state dict holds tensors of: one, if it is no mixture."""
    found = set()
    for key, tensor in tensors.items():
        value = float(tensor[0])
        assert bool((tensor == value).all()), f"{key} is torn"
        assert value % 1000 == int(key.split(".")[1])
        found.add(int(value // 1000))
    return found


def resave(pipe: Connection, source: str, into: str) -> None:
    torch.set_num_threads(1)
    pipe.send("go")
    fm.save(source, into, max_shard_size=SHARD)
    pipe.send("done")


def read_shards(where: Path) -> dict[str, Tensor]:
    """What an index leads to, by safetensors' own reader."""
    weight_map = json.loads((where / "model.safetensors.index.json").read_text())["weight_map"]
    return {key: t for file in set(weight_map.values()) for key, t in safetensors.torch.load_file(where / file).items()}


def test_a_writer_killed_at_any_time_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    sources = {}
    for side in (1, 2):
        sources[side] = str(tmp_path / f"source{side}")
        fm.save(large(side), sources[side], max_shard_size=SHARD, durability="none")
    into = tmp_path / "ckpt"
    shutil.copytree(sources[1], into)
    now, drawn, longest = 1, random.Random(3), 0.0
    deaths = {"old": 0, "new": 0}
    for kill in range(-1, KILLS):  # the first one only shows how long a save takes
        other = 3 - now
        process, pipe = started(resave, sources[other], str(into))
        assert pipe.recv() == "go"
        begun = os.times().elapsed
        # Most of the time goes into bytes; the end, where names change, gets half of the kills.
        moment = longest * (drawn.uniform(0, 1) if kill % 2 else drawn.uniform(0.85, 1.05))
        if pipe.poll(moment if kill >= 0 else 60):
            assert pipe.recv() == "done"
            longest = max(longest, os.times().elapsed - begun)
        os.kill(process.pid or 0, signal.SIGKILL)
        code = ended(process)
        (found,) = side_of(fm.materialize(fm.scan(into)))
        if kill % 4 == 0:
            assert side_of(read_shards(into)) == {found}
        assert found in (now, other)
        if code == -signal.SIGKILL:
            deaths["new" if found == other else "old"] += 1
        now = found
    assert deaths["old"]
    fm.save(sources[now], into, max_shard_size=SHARD)
    assert side_of(read_shards(into)) == {now}
    assert not [name for name in os.listdir(into) if name.startswith(LEFT)]
    assert len(os.listdir(into)) == len(scan_checkpoint(into).files) + 1


# -- writers and readers -----------------------------------------------------------------------------------------------


def small(side: int) -> dict[str, Tensor]:
    return {f"layers.{i}.weight": torch.full((2048,), side * 1000.0 + i) for i in range(12)}


class Stack(nn.Module):
    """What holds the small tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LayerNorm(2048, bias=False) for _ in range(12)])


def write_on(pipe: Connection, into: str, side: int, limits: tuple[int | None, ...]) -> None:
    """Save again and again until told to stop; then say how often that went well, and how often another was busy."""
    torch.set_num_threads(1)
    saved = busy = 0
    pipe.send("go")
    while not pipe.poll():
        try:
            fm.save(small(side), into, max_shard_size=limits[saved % len(limits)], durability="none")
            saved += 1
        except BusyError:
            busy += 1
    pipe.send((saved, busy))


def test_a_reader_beside_two_writers_never_sees_a_mixture(tmp_path: Path) -> None:
    fm.save(small(1), tmp_path, max_shard_size="30KB")
    writers = [
        started(write_on, str(tmp_path), 1, ("30KB", None)),
        started(write_on, str(tmp_path), 2, ("50KB", "30KB", None)),
    ]
    for _, pipe in writers:
        assert pipe.recv() == "go"
    seen: set[int] = set()
    good = late = 0
    while good < READS:
        try:
            if good % 5:
                sides = side_of(fm.materialize(fm.scan(tmp_path)))
            else:
                sides = side_of(fm.load(Stack(), tmp_path).state_dict())
        except (ChangedError, StalePlanError, CheckpointError):
            late += 1  # the files went while they were read: that is said, and the next read is as good
            assert late < 20 * READS
            continue
        assert len(sides) == 1
        seen |= sides
        good += 1
    done = []
    for process, pipe in writers:
        pipe.send("stop")
        done.append(pipe.recv())
        assert ended(process) == 0
    assert seen == {1, 2}
    assert all(saved for saved, _ in done)
    assert sum(busy for _, busy in done)
    assert len(side_of(fm.materialize(fm.scan(tmp_path)))) == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith(LEFT)]


def test_a_second_writer_is_told_who_the_first_one_is(tmp_path: Path) -> None:
    fm.save(small(1), tmp_path)
    before = held(tmp_path)
    first = FolderLocks(REAL)
    assert first.take(str(tmp_path))
    try:
        with pytest.raises(BusyError) as raised:
            fm.save(small(2), tmp_path)
        assert raised.value.committed == "no"
        assert str(os.getpid()) in raised.value.owner
        assert {name: data for name, data in held(tmp_path).files.items() if not name.startswith(LEFT)} == before.files
    finally:
        first.release()
    fm.save(small(2), tmp_path)
    assert side_of(fm.materialize(fm.scan(tmp_path))) == {2}


def save_once(pipe: Connection, into: str, side: int) -> None:
    torch.set_num_threads(1)
    pipe.send("ready")
    pipe.recv()
    try:
        fm.save(small(side), into, max_shard_size=None if side % 2 else "30KB", durability="none")
        pipe.send("saved")
    except BusyError:
        pipe.send("busy")


def test_of_eight_processes_that_save_into_one_folder_one_wins_whole(tmp_path: Path) -> None:
    writers = {side: started(save_once, str(tmp_path / "out"), side) for side in range(1, 9)}
    for _, pipe in writers.values():
        assert pipe.recv() == "ready"
    for _, pipe in writers.values():
        pipe.send("go")
    said = {side: pipe.recv() for side, (_, pipe) in writers.items()}
    assert all(ended(process) == 0 for process, _ in writers.values())
    (winner,) = side_of(fm.materialize(fm.scan(tmp_path / "out")))
    assert said[winner] == "saved"
    assert set(said.values()) <= {"saved", "busy"}
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(LEFT)]


# -- the interface is honest -------------------------------------------------------------------------------------------

# Every way to change a disk, also those that a save does not use: if one of them appears, the test must see it.
TRACED = (
    "open,openat,openat2,creat,write,writev,pwrite64,pwritev,pwritev2,copy_file_range,sendfile,splice,truncate,ftruncate,"
    "fallocate,fsync,fdatasync,sync_file_range,syncfs,sync,chmod,fchmod,fchmodat,chown,fchown,flock,rename,renameat,"
    "renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,setxattr,fsetxattr,utimensat"
)
NAMES = {"openat": "open", "pwritev2": "pwritev", "rename": "replace", "renameat": "replace", "renameat2": "replace"}
FAULTS = {
    "replace": ("rename,renameat,renameat2", errno.EDQUOT),
    "fsync": ("fsync", errno.EIO),
    "pwritev": ("pwritev,pwritev2", errno.ENOSPC),
}


def attempt(into: Path, filesystem: FileSystem) -> list[str]:
    """A save over a single file in three shards, and how it ends."""
    try:
        fm.save(small(2), into, max_shard_size="40KB", texts={"config.json": "{}"}, filesystem=filesystem)
    except SaveError as error:
        return [type(error).__name__, error.committed]
    return ["saved", "yes"]


def script(root: str) -> None:
    """What runs under strace: a save that goes well, and one for each fault; prints the calls of the first."""
    filesystem, calls = counted(REAL)
    attempt(Path(root, "well"), filesystem)
    ends = {name: attempt(Path(root, name), REAL) for name in FAULTS}
    print(json.dumps({"calls": [(call.name, call.path) for call in calls if changes(call)], "ends": ends}))


def in_process(root: Path) -> tuple[dict[str, list[str]], list[str]]:
    """How the same saves end with `faulty`, and what makes strace inject the same faults into one process."""
    ends, injections = {}, []
    filesystem, calls = counted(REAL)
    attempt(root / "well", filesystem)
    past = [call.name for call in calls]
    for name, (system, code) in FAULTS.items():
        at = ([call.name for call in calls].count(name) + 1) // 2
        injections += ["-e", f"inject={system}:error={errno.errorcode[code]}:when={past.count(name) + at}"]
        failing = faulty(REAL, at, code, only=lambda call, name=name: call.name == name)  # type: ignore[misc]
        filesystem, more = counted(failing)
        ends[name] = attempt(root / name, filesystem)
        past += [call.name for call in more]
    return ends, injections


def system_calls(log: str, below: str) -> list[tuple[str, str]]:
    """The calls in a log of `strace -y` that change something below a folder, as `FileSystem` names them."""
    found = []
    for line in log.splitlines():
        match = re.match(rf'(?:\d+ +)?(\w+)\((?:AT_FDCWD\S*, )?(?:\d+<|")({re.escape(below)}[^">]*)', line)
        if match and (match[1] not in ("open", "openat") or re.search("O_CREAT|O_TRUNC", line)):
            found.append((NAMES.get(match[1], match[1]), match[2]))
    return found


def test_the_system_calls_are_those_of_the_interface_and_fail_alike() -> None:
    strace = shutil.which("strace")
    if not strace or subprocess.run([strace, "-f", "-e", "trace=none", "true"], capture_output=True).returncode:
        pytest.skip("strace is not there, or may not trace")
    cases = ("well", *FAULTS)
    with folder() as root:
        for name in cases:
            fm.save(small(1), root / name)
        before = {name: held(root / name) for name in cases}
        ends, injections = in_process(root)
        after = {name: unmarked(held(root / name)) for name in cases}
    with folder() as root:
        for name in cases:
            restore(before[name], root / name)
        log = root / "log"
        traced = [
            strace,
            "-f",
            "--seccomp-bpf",
            "-y",
            "-s",
            "4096",
            "-o",
            str(log),
            "-e",
            f"trace={TRACED}",
            *injections,
        ]
        ran = subprocess.run(
            [*traced, sys.executable, "-c", f"from tests.test_kill import script; script({str(root)!r})"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        said = json.loads(ran.stdout)
        assert system_calls(log.read_text(), str(root / "well")) == [tuple(call) for call in said["calls"]]
        assert said["calls"]
        assert said["ends"] == ends
        assert {name: unmarked(held(root / name)) for name in cases} == after
