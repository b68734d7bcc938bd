"""What was measured: JSON with every raw sample, Markdown with the ratios; and the machine it was measured on."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.measure import Case, Result
from tests.benchmarks.targets import MIB

PACKAGES = (
    *("funcmodel", "torch", "safetensors", "transformers", "accelerate", "huggingface_hub", "numpy"),
    *("fastsafetensors", "runai-model-streamer"),
)


def machine(folder: Path) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "file_system": _file_system(folder),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _line(path: str, name: str) -> str | None:
    lines = (line.partition(":") for line in (_read(path) or "").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)


def _file_system(folder: Path) -> str | None:
    """The type of the mount that holds a folder."""
    mounts = [line.split() for line in (_read("/proc/mounts") or "").splitlines()]
    holding = [(mount[1], mount[2]) for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    return max(holding, key=lambda mount: len(mount[0]), default=(None, None))[1]


def case_json(case: Case, results: Sequence[Result]) -> dict[str, Any]:
    return {
        "title": case.title,
        "nbytes": case.nbytes,
        "tensors": case.count,
        "contenders": {result.name: _result_json(result) for result in results},
    }


def _result_json(result: Result) -> dict[str, Any]:
    known = {"kind": result.kind, "reason": result.reason, "nbytes": result.nbytes}
    if not result.samples:
        return known
    return known | {
        "min": result.wall(),
        "median": result.wall("median"),
        "cpu": result.cpu(),
        "gb_per_s": result.nbytes / result.wall() / 1e9,
        "peak_anonymous": result.peak,
        "noisy": result.noisy(),
        "samples": [vars(sample) for sample in result.samples],
    }


def markdown(report: Mapping[str, Any]) -> str:
    return "\n".join([*_machine_lines(report), *_target_lines(report["rows"]), *_case_lines(report["cases"])]) + "\n"


def _machine_lines(report: Mapping[str, Any]) -> Iterator[str]:
    about, versions = report["machine"], report["machine"]["versions"]
    yield f"`{report['command']}`"
    yield ""
    yield (
        f"{about['cpu']}, {about['cores']} cores, {about['memory_gb']} GB, Linux {about['kernel']}, "
        f"{about['file_system']}, huge pages `{about['huge_pages']}`, GPU: {about['gpu'] or 'none'}, "
        f"load average at the start {about['load_average']:.1f}. "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + f". {report['reps']} "
        "repetitions, interleaved. In the first table a ratio above 1 means that funcmodel is faster; its "
        "last column is the ratio that bare system calls would have, the fastest of all ways that were tried. "
        "In the others the last columns are times divided by ours. Samples beside which something else used "
        "the machine are left out, except where ~ or (noisy) says that most were such."
    )
    yield ""


def _target_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| case | funcmodel | against | of | value | target | met | at the limit |"
    yield "|---|---|---|---|---:|---:|---|---:|"
    for row in rows:
        against = ", ".join(row["against"]) or "absolute"
        sign = "≥" if row["bound_is"] == "at least" else "≤"
        value = "-" if row["value"] is None else f"{row['value']:.3g}"
        met = row["reason"] or ("yes" if row["met"] else "**no**") + (" (noisy)" if row["noisy"] else "")
        bound = f"{sign} {row['bound']:g}"
        limit = "" if row["at_limit"] is None else f"{row['at_limit']:.3g}"
        yield f"| {row['row']} | {row['ours']} | {against} | {row['of']} | {value} | {bound} | {met} | {limit} |"
    yield ""


def _case_lines(cases: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, case in cases.items():
        yield f"### {name}: {case['title']}"
        yield ""
        if case.get("reason"):
            yield case["reason"]
            yield ""
            continue
        ours = [n for n, found in case["contenders"].items() if _compared(name, found)]
        columns = ["contender", "min s", "median s", "CPU s", "GB/s", "peak MiB", *(f"/ {n}" for n in ours)]
        yield "| " + " | ".join(columns) + " |"
        yield "|---|" + "---:|" * (len(columns) - 1)
        for contender, found in case["contenders"].items():
            cells = _cells(found, [case["contenders"][n]["min"] for n in ours])
            label = {"ours": f"**{contender}**", "limit": f"*{contender}*"}.get(found["kind"], contender)
            yield f"| {label} | " + " | ".join(cells) + " |"
        yield ""


def _compared(case: str, found: Mapping[str, Any]) -> bool:
    return found["kind"] == "ours" and "min" in found and case != "memory"


def _cells(found: Mapping[str, Any], ours: Sequence[float]) -> list[str]:
    if "min" not in found:
        return [found["reason"], *[""] * (4 + len(ours))]
    peak = "-" if found["peak_anonymous"] is None else f"{found['peak_anonymous'] / MIB:.0f}"
    times = [f"{found[name]:.4f}" for name in ("min", "median", "cpu")]
    times[0] += " ~" * found["noisy"]
    ratios = [f"{found['min'] / mine:.2f}" for mine in ours]
    return [*times, f"{found['gb_per_s']:.2f}", peak, *ratios]
