"""The engine against the limits of the machine and against its peers: `python -m tests.benchmarks engine`.

One process measures, interleaved: what the machine can do (`limits`), how others load and save (`peers`), and funcmodel
(`ours`), in the cases of `cases`, `saving_cases` and, with `--cuda`, `gpu_cases`. It prints Markdown: the table of what
the engine must show, then every contender of every case. A peer that is missing or fails is a row with the reason.
"""

import argparse
import json
import shlex
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import cases, gpu_cases, peers, saving_cases
from tests.benchmarks.measure import Case, Control, Result, Sampler, run, warm
from tests.benchmarks.model import Shape, World
from tests.benchmarks.report import case_json, machine, markdown
from tests.benchmarks.targets import judged, targets

CASES: Mapping[str, Callable[[World], Case]] = {**cases.CASES, **saving_cases.CASES, **gpu_cases.CASES}
WARM = 6  # times the model: about what a run holds at once


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks engine", description=__doc__)
    parser.add_argument("--size", type=float, default=1.0, metavar="GB", help="of the model (default 1)")
    parser.add_argument("--reps", type=int, default=5, help="runs of every contender (default 5)")
    parser.add_argument("--case", nargs="+", choices=[*CASES], metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--without", nargs="+", default=[], metavar="PACKAGE", help="peers to leave out")
    parser.add_argument("--cuda", action="store_true", help="the cases of CUDA too")
    parser.add_argument("--folder", type=Path, help="where to write; decides which file system is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="what is printed")
    parser.add_argument("--gate", action="store_true", help="exit code 1 if a target that was measured is not met")
    return parser.parse_args(arguments)


def measured(chosen: argparse.Namespace) -> dict[str, Any]:
    """The report, as it is written to JSON."""
    names = chosen.case or [*CASES]
    report: dict[str, Any] = {"size": chosen.size, "reps": chosen.reps, "cases": {}}
    results: dict[str, dict[str, Result]] = {}
    counts: dict[str, int] = {}
    why_not = {name: reason for name in names if (reason := _not_measured(name, chosen))}
    sampler, control = Sampler(), Control()
    try:
        with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="benchmark-") as folder:
            world = World(Path(folder), chosen.size)
            report["machine"] = machine(world.root)
            warm(round(WARM * chosen.size * 1e9))
            for name in names:
                if name in why_not:
                    report["cases"][name] = {"title": name, "reason": why_not[name], "contenders": {}}
                    continue
                case = CASES[name](world)
                print(f"{name}: {case.title}", file=sys.stderr, flush=True)
                found = run(case, chosen.reps, sampler, control)
                results[name] = {result.name: result for result in found}
                counts[name] = case.count or 1
                report["cases"][name] = case_json(case, found)
    finally:
        sampler.close()
    wanted = [target for target in targets(Shape.of(chosen.size).tensors()) if target.case in names]
    report["rows"] = [judged(target, results, counts, why_not) for target in wanted]
    return report


def _not_measured(name: str, chosen: argparse.Namespace) -> str | None:
    if name not in gpu_cases.CASES:
        return None
    return gpu_cases.available() if chosen.cuda else "not measured: --cuda was not given"


def main(arguments: Sequence[str]) -> int:
    chosen = options(arguments)
    peers.LEFT_OUT.update(chosen.without)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or gigabytes of checkpoints would stay behind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peers, about themselves
        report = measured(chosen)
    report["command"] = shlex.join(["python", "-m", "tests.benchmarks", "engine", *arguments])
    text = markdown(report)
    print(text, flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1))
    if chosen.markdown:
        chosen.markdown.write_text(text)
    return int(chosen.gate and any(row["met"] is False for row in report["rows"]))
