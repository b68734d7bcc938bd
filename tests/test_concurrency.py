"""Many threads and many processes at once: each gets what it would get alone, and the process is what it was."""

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import funcmodel as fm
from tests.fingerprint import differences, fingerprint


class Tied(nn.Module):
    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.lstm = nn.LSTM(width, width)
        self.head = nn.Linear(width, width, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("angles", 1.0 / torch.arange(1, width), persistent=False)


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {key: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for key, t in tensors.items()}


def at_once(works: list[Callable[[], object]]) -> list[Any]:
    """The results of functions that start together, each in a thread; an error is a result."""
    results: list[Any] = [None] * len(works)
    barrier = threading.Barrier(len(works))

    def run(i: int, work: Callable[[], object]) -> None:
        barrier.wait()
        try:
            results[i] = work()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i, work)) for i, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    net = Tied()
    fm.save(net, tmp_path / "in", max_shard_size="20KB")
    return net, tmp_path / "in"


@pytest.mark.parametrize("commit", ["swap", "in_place"])
def test_law_50_four_threads_that_load_15_times_each_give_60_equal_tied_models(
    commit: Any, saved: tuple[nn.Module, Path]
) -> None:
    """Skeletons and real modules; nothing of the process is patched, and nothing of the models shared."""
    net, folder = saved
    other = Tied()
    expected = bits(net.state_dict())
    plain = fm.load(fm.skeleton(Tied), folder)

    def load() -> list[nn.Module]:
        into = (copy.deepcopy(other) if i % 2 else fm.skeleton(Tied) for i in range(15))
        return [fm.load(net, folder, commit=commit) for net in into]

    before = fingerprint(net, plain)
    results = at_once([load] * 4)
    assert differences(before, fingerprint(net, plain)) == []
    models = [model for result in results for model in result]
    assert len(models) == 60
    for model in models:
        assert model.head.weight is model.embed.weight
        assert bits(model.state_dict()) == expected
        assert torch.equal(model.angles, net.angles)
    storages = {t.untyped_storage().data_ptr() for model in models for t in model.state_dict().values()}
    assert len(storages) == 60 * len({t.data_ptr() for t in net.state_dict().values()})


def test_threads_that_do_different_things_do_not_meet(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """Constructions, loads, saves, plans, scans, conversions and failures, side by side."""
    net, folder = saved
    expected = bits(net.state_dict())
    rounds = 6
    torch.manual_seed(5)
    plan, spec = fm.scan(folder), fm.module_spec(net)
    rule = fm.Rename("embed.{*rest}", "tokens.{*rest}")

    def constructs() -> object:
        return [fm.skeleton(Tied, width).norm.running_var.tolist() for width in range(2, 2 + rounds)]

    def constructs_really() -> object:
        return [type(nn.Linear(3, 3).weight).__name__ + str(nn.Linear(3, 3).weight.device) for _ in range(rounds * 20)]

    def loads() -> object:
        return [bits(fm.load(fm.skeleton(Tied), folder).state_dict()) for _ in range(rounds)]

    def saves() -> object:
        where = tmp_path / str(threading.get_ident())
        found = []
        for i in range(rounds):
            fm.save(net, where, max_shard_size=("5GB", "20KB")[i % 2], durability="none")
            found.append(bits(fm.materialize(fm.spread(spec.tied)(fm.scan(where)))))
        return found

    def plans() -> object:
        return [fm.to_json(fm.checked(fm.plan_load(spec, plan))) for _ in range(rounds)]

    def scans() -> object:
        return [fm.scan(folder) for _ in range(rounds)]

    def converts() -> object:
        return [fm.convert(*fm.inverse(rule))(fm.convert(rule)(plan)) for _ in range(rounds)]

    def materializes() -> object:
        return [bits(fm.materialize(fm.cast("float16")(plan))) for _ in range(rounds)]

    def fails() -> object:
        found = []
        for _ in range(rounds):
            try:
                fm.load(nn.Linear(3, 3), folder)
            except fm.KeyMismatchError as error:
                found.append(error.report.missing_keys)
        return found

    works = [constructs, constructs_really, loads, saves, saves, plans, scans, converts, materializes, fails]
    alone = [work() for work in works]
    before = fingerprint(net)
    together = at_once(works)
    after = fingerprint(net)
    # `constructs_really` draws: the generator is the one thing that is theirs to change.
    assert set(differences(before, after)) <= {"generator of torch"}
    assert together == alone
    assert all(found == expected for found in together[2])
    assert all({**found} == expected for found in together[3])


PROCESSES = """
import os, sys, torch
import funcmodel as fm
from torch import nn
gate, open_gate = os.pipe()
children = []
for _ in range(8):
    child = os.fork()  # torch is imported once
    if not child:
        os.close(open_gate)
        os.read(gate, 1)
        try:
            for _ in range(5):
                net = fm.load(fm.skeleton(nn.Linear, 300, 200), sys.argv[1])
                assert torch.equal(net.weight, torch.full((200, 300), 3.0))
                assert torch.equal(net.bias, torch.arange(200.0))
            os._exit(0)
        finally:
            os._exit(1)
    children.append(child)
os.close(open_gate)  # they start together
print([os.waitpid(child, 0)[1] for child in children])
"""


def test_eight_processes_load_one_folder_at_once(tmp_path: Path) -> None:
    save_file({"weight": torch.full((200, 300), 3.0), "bias": torch.arange(200.0)}, tmp_path / "model.safetensors")
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    ran = subprocess.run([sys.executable, "-c", PROCESSES, str(tmp_path)], check=True, capture_output=True, text=True)
    assert ran.stdout == f"{[0] * 8}\n"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_threads_share_one_plan_and_one_source(saved: tuple[nn.Module, Path]) -> None:
    """Plans are values: threads that carry out the same one on modules of their own agree."""
    net, folder = saved
    plan = fm.checked(fm.plan_load(fm.module_spec(fm.skeleton(Tied)), fm.scan(folder)))
    results = at_once([lambda: bits(fm.apply(plan, fm.skeleton(Tied)).state_dict()) for _ in range(8)])
    assert results == [bits(net.state_dict())] * 8
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    truth = {k: v for name in set(index.values()) for k, v in load_file(folder / name).items()}
    assert all(results[0][key] == bits(truth)[key] for key in truth)


# What gives, keeps or closes descriptors, and what is between them and who asked for them.
HANDLING = ("open", "close", "extend", "append", "pop", "take", "_take", "_open", "_close", "_drop", "_create", "stage")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not show what is open")
def test_an_interrupt_just_after_a_file_was_opened_or_closed_leaves_none_open(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(3)}
    fm.save(tensors, tmp_path / "0", max_shard_size=16)
    before = sorted(os.listdir("/proc/self/fd"))
    interrupted = 0
    for at in range(1, 10_000):
        seen = 0

        def profile(frame: Any, event: str, what: Any) -> None:
            nonlocal seen
            name = frame.f_code.co_name if event == "return" else getattr(what, "__name__", "")
            ours = os.path.basename(frame.f_code.co_filename) in ("staging.py", "locks.py", "filesystem.py")
            if event in ("return", "c_return") and ours and name in HANDLING:
                seen += 1
                if seen == at:  # noqa: B023
                    raise KeyboardInterrupt

        sys.setprofile(profile)
        try:
            fm.save(tensors, tmp_path / "0", max_shard_size=16, durability="none")
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.setprofile(None)
        if seen < at:
            break
        assert sorted(os.listdir("/proc/self/fd")) == before
    assert interrupted > 50
    fm.save(tensors, tmp_path / "0")
    assert os.listdir(tmp_path / "0") == ["model.safetensors"]
