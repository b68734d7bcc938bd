"""The benchmarks of the engine run, and report every row and every contender. What they measure is not looked at."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.measure import Case, Contender, Control, Kind, Result, Sample, Sampler, run
from tests.benchmarks.targets import Target, judged

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("transformers", "accelerate", "huggingface_hub", "torch.distributed.checkpoint")  # slow to import
OPTIONAL = {"runai-model-streamer", "fastsafetensors"}

PROMISED = {  # row: the limits and peers that it is compared with
    "map into a meta module": {"load_file + assign", "transformers", "accelerate"},
    "hot, fresh memory": {"preadv, all threads", "load_file + clone", "torch.load"},
    "hot, existing parameters": {"preadv, all threads", "load_file + load_state_dict"},
    "hot, existing parameters, under load": {"load_file + load_state_dict"},
    "hot, float32 to bfloat16": {"mapped copy_, all threads", "transformers (fresh memory)"},
    "cold": {"O_DIRECT", "load_file + load_state_dict", "transformers + touch (mapped)"},
    "many small tensors, load": {"load_file"},
    "many small tensors, save": {"save_file"},
    "save, one file": {"raw write, 1 file", "save_file"},
    "save, 4 shards": {"raw write, 4 files, in parallel", "transformers save_pretrained"},
    "extra peak memory": set(),
    "CUDA, hot": {"pinned H2D", "load_file(cuda)", "transformers"},
    "CUDA, new process": {"load_file(cuda), transformers, fastsafetensors, runai-model-streamer"},
}
CONTENDERS = {  # case: how many there are at least, all kinds together
    "limits": 6,
    "map": 10,
    "fresh": 14,
    "existing": 8,
    "existing_busy": 4,
    "cast": 6,
    "cold": 10,
    "small_load": 8,
    "small_save": 6,
    "save_one": 9,
    "save_shards": 8,
    "memory": 9,
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("benchmarks")
    files = ["--json", str(folder / "report.json"), "--markdown", str(folder / "report.md")]
    options = ["--size", "0.01", "--reps", "2", "--folder", str(folder), *files, "--without", *LEFT_OUT]
    command = [sys.executable, "-m", "tests.benchmarks", "engine", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (folder / "report.md").read_text() in ran.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.md"]  # checkpoints are gone
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def positive(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def contenders(report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for case in CONTENDERS:
        for name, found in report["cases"][case]["contenders"].items():
            yield case, name, found


def excused(name: str, reason: str) -> bool:
    """Whether a contender may be missing: an optional package, one that was left out, or what is still to be built."""
    return name in OPTIONAL or any(f"--without {left}" in reason for left in LEFT_OUT) or "not built yet" in reason


def test_every_contender_is_measured_or_says_why_not(report: dict[str, Any]) -> None:
    for case, least in CONTENDERS.items():
        assert len(report["cases"][case]["contenders"]) >= least, case
    for case, name, found in contenders(report):
        if found["reason"] is not None:
            assert excused(name, found["reason"]), (case, name, found["reason"])
            continue
        assert all(positive(found[key]) for key in ("min", "median", "cpu", "gb_per_s")), (case, name)
        assert found["min"] <= found["median"], (case, name)
        assert found["peak_anonymous"] is None or found["peak_anonymous"] >= 0, (case, name)
        times = [sample[key] for sample in found["samples"] for key in ("wall", "control")]
        assert times, (case, name)
        assert all(map(positive, times)), (case, name)


def test_all_that_is_ours_is_measured(report: dict[str, Any]) -> None:
    ours = [(case, name, found) for case, name, found in contenders(report) if found["kind"] == "ours"]
    assert {case for case, _, _ in ours} == set(CONTENDERS) - {"limits"}
    assert all("samples" in found or "not built yet" in found["reason"] for _, _, found in ours)


def test_every_promised_row_has_a_verdict_or_a_reason(report: dict[str, Any]) -> None:
    against: dict[str, set[str]] = {}
    for row in report["rows"]:
        named = [name.partition(", ")[0] if "O_DIRECT" in name else name for name in row["against"]]
        against.setdefault(row["row"], set()).add(", ".join(dict.fromkeys(named)))
        if row["reason"] is None:
            assert math.isfinite(row["value"]), row
            assert row["value"] > 0 or row["of"] == "extra MiB", row
            assert row["met"] == (
                row["value"] >= row["bound"] if row["bound_is"] == "at least" else row["value"] <= row["bound"]
            )
        else:
            assert row["value"] is None, row
            assert row["met"] is None, row
    for row, promised in PROMISED.items():
        assert promised <= against[row], (row, against[row])


def test_peak_memory_is_seen(report: dict[str, Any]) -> None:
    memory = report["cases"]["memory"]["contenders"]
    assert memory["load into meta"]["peak_anonymous"] > 0.9 * report["cases"]["memory"]["nbytes"]
    assert memory["safetensors load(bytes)"]["peak_anonymous"] > 1.8 * report["cases"]["memory"]["nbytes"]


def test_the_machine_is_named(report: dict[str, Any]) -> None:
    about = report["machine"]
    assert about["cpu"]
    assert about["cores"] >= 1
    assert about["file_system"]
    assert about["versions"]["torch"]


def wrong(result: object) -> None:
    if result != "right":
        raise ValueError("the result is wrong")


class Odd(BaseException):
    """As DCP's own error is."""


def failing() -> str:
    raise OSError("this peer does not work here")


def failing_oddly() -> str:
    raise Odd("this peer does not work here")


def test_a_contender_that_fails_or_is_wrong_is_a_row_with_the_reason() -> None:
    def made(name: str, act: Callable[[], str]) -> Contender:
        return Contender(name, "peer", lambda: lambda _: act())

    contenders = [made("good", lambda: "right"), made("bad", lambda: "left"), made("broken", failing)]
    contenders.append(made("odd", failing_oddly))
    sampler = Sampler()
    try:
        found = run(Case("case", "title", 1, contenders, verify=wrong), 3, sampler, Control())
    finally:
        sampler.close()
    good, *others = found
    assert good.reason is None
    assert len(good.samples) == 3
    assert [bool(other.reason) for other in others] == [True, True, True]
    assert not any(other.samples for other in others)


def result(name: str, *samples: tuple[float, bool], kind: Kind = "peer") -> Result:
    return Result(name, kind, 1, [Sample(wall, wall, 1.0, flagged) for wall, flagged in samples])


def test_flagged_samples_count_only_where_most_are() -> None:
    assert result("a", (1.0, True), (2.0, False), (3.0, False)).wall() == 2.0
    assert result("a", (1.0, True), (2.0, True), (3.0, False)).wall() == 1.0


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (2.5, False)])
def test_a_ratio_is_of_the_best_peer_less_what_is_not_its_own(ours: float, met: bool) -> None:
    case = {"ours": result("ours", (ours, False), kind="ours")}
    case |= {name: result(name, (wall, False)) for name, wall in (("slow", 9.0), ("fast", 5.0), ("build", 1.0))}
    case["gone"] = Result("gone", "peer", 1, reason="not installed")
    case |= {name: result(name, (wall, False), kind="limit") for name, wall in (("raw", 0.5), ("other way", 2.0))}
    limits = ("raw", "other way", "not tried")
    target = Target("row", "case", "ours", 2, ("slow", "fast", "gone"), less="build", limit=limits)
    row = judged(target, {"case": case}, {}, {})
    assert row["at_limit"] == 4.0 / 0.5
    assert row["value"] == 4.0 / ours
    assert row["met"] is met
    alone = judged(Target("row", "case", "ours", 2, ("gone",)), {"case": case}, {}, {})
    assert (alone["value"], alone["met"]) == (None, None)
    assert alone["reason"]
