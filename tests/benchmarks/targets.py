"""What the engine must show, as arithmetic on what was measured."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tests.benchmarks.measure import Result

MIB = 1 << 20
Results = Mapping[str, Mapping[str, Result]]
Of = Literal["min", "median", "ms", "us per tensor", "extra MiB"]
DIRECT = ("O_DIRECT, 1 thread", "O_DIRECT, 2 threads", "O_DIRECT, 4 threads", "O_DIRECT, 8 threads")
COPIED = ("O_DIRECT and a copy, 4 threads", "O_DIRECT and a copy, 8 threads")
BUILD = "transformers: building on meta"


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        row: what it is about.
        case: where it was measured.
        ours: our contender.
        bound: the ratio is at least this, or the time or memory is at most this.
        against: limit or peers; of several the best counts. Empty where the bound is absolute.
        of: ratios are of the minimum or the median of wall time; absolute values have a unit.
        less: a contender whose time is subtracted from each of `against`.
        limit: what moves the same bytes and does nothing else, in as many ways as were tried; the fastest tells what
            the ratio would be if funcmodel cost nothing.
    """

    row: str
    case: str
    ours: str
    bound: float
    against: tuple[str, ...] = ()
    of: Of = "min"
    less: str | None = None
    limit: tuple[str, ...] = ()


def targets(tensors: int) -> tuple[Target, ...]:
    """All of them, for a model of so many tensors."""
    name = "map into a meta module"
    preadv, state = ("preadv, all threads",), ("load_file + load_state_dict",)
    fresh = ("preadv into fresh memory, 1 thread", "preadv into fresh memory, all threads")
    cast = ("mapped copy_ into fresh memory, all threads",)
    one = ("raw write, 1 file", "raw write, 1 file, 2 threads", "raw write, 1 file, room allocated")
    one = (*one, "O_DIRECT write, 1 file, 2 threads")
    four = ("raw write, 4 files, in parallel", "raw write, 4 files, 1 thread")
    slow_peers = ("load_file(cuda)", "transformers", "fastsafetensors", "runai-model-streamer")
    mapped = [
        target
        for ours in ("apply, borrowed", "load, borrowed")
        for target in (
            Target(name, "map", ours, 1 + 0.01 * tensors, of="ms"),
            Target(name, "map", ours, 4, ("load_file + assign",)),
            Target(name, "map", ours, 10, ("transformers",), less=BUILD),
            Target(name, "map", ours, 100, ("accelerate",)),
        )
    ]
    return (
        *mapped,
        Target("hot, fresh memory", "fresh", "load into meta", 0.75, preadv, limit=fresh),
        Target("hot, fresh memory", "fresh", "load into meta", 2.5, ("load_file + clone",), limit=fresh),
        Target("hot, fresh memory", "fresh", "load into meta", 2, ("torch.load",), limit=fresh),
        Target("hot, existing parameters", "existing", "load in place", 0.85, preadv),
        Target("hot, existing parameters", "existing", "load in place", 1.15, state, limit=preadv),
        Target(
            *("hot, existing parameters, under load", "existing_busy", "load in place", 1.5, state),
            of="median",
            limit=preadv,
        ),
        Target("hot, float32 to bfloat16", "cast", "load in place", 0.9, ("mapped copy_, all threads",)),
        Target(
            *("hot, float32 to bfloat16", "cast", "load into meta", 1.5, ("transformers (fresh memory)",)),
            less=BUILD,
            limit=cast,
        ),
        Target("cold", "cold", "load in place", 0.9, DIRECT, limit=COPIED),
        Target("cold", "cold", "load in place", 1.4, state, limit=COPIED),
        Target(
            *("cold", "cold", "load in place", 1.4, ("transformers + touch (mapped)",)),
            less=BUILD,
            limit=COPIED,
        ),
        Target("many small tensors, load", "small_load", "apply", 5, of="us per tensor"),
        Target("many small tensors, load", "small_load", "apply", 4, ("load_file",)),
        Target("many small tensors, load", "small_load", "materialize, planned before", 5, of="us per tensor"),
        Target("many small tensors, load", "small_load", "materialize, planned before", 4, ("load_file",)),
        Target("many small tensors, save", "small_save", "apply", 6, of="us per tensor"),
        Target("many small tensors, save", "small_save", "apply", 6, ("save_file",)),
        Target("save, one file", "save_one", "save", 0.9, ("raw write, 1 file",)),
        Target("save, one file", "save_one", "save", 1.2, ("save_file",), limit=one),
        Target("save, 4 shards", "save_shards", "save", 0.9, ("raw write, 4 files, in parallel",)),
        Target("save, 4 shards", "save_shards", "save", 2, ("transformers save_pretrained",), limit=four),
        Target("extra peak memory", "memory", "load into meta", 64, of="extra MiB"),
        Target("extra peak memory", "memory", "load in place", 64, of="extra MiB"),
        Target("extra peak memory", "memory", "load in place, float32 to bfloat16", 64, of="extra MiB"),
        Target("extra peak memory", "memory", "save", 64, of="extra MiB"),
        Target("CUDA, hot", "cuda_hot", "load", 0.85, ("pinned H2D",)),
        Target("CUDA, hot", "cuda_hot", "load", 4, ("load_file(cuda)",), limit=("pinned H2D",)),
        Target("CUDA, hot", "cuda_hot", "load", 4, ("transformers",), limit=("pinned H2D",)),
        Target("CUDA, new process", "cuda_fresh", "load", 1, slow_peers),
    )


def judged(target: Target, results: Results, counts: Mapping[str, int], why_not: Mapping[str, str]) -> dict[str, Any]:
    """A row of the report: the value, and whether it meets its bound; None, and a reason, where there is no value."""
    row: dict[str, Any] = {
        "row": target.row,
        "case": target.case,
        "ours": target.ours,
        "against": list(target.against),
        "of": target.of,
        "bound": target.bound,
        "bound_is": "at least" if target.against else "at most",
        "value": None,
        "at_limit": None,
        "met": None,
        "reason": why_not.get(target.case),
    }
    if row["reason"] is not None:
        return row
    case = results[target.case]
    needed = [target.ours, *([target.less] if target.less else [])]
    missing = [f"{name}: {case[name].reason}" for name in needed if not case[name].samples]
    others = [case[name] for name in target.against if case[name].samples]
    if target.against and not others:
        missing += [f"{name}: {case[name].reason}" for name in target.against]
    if missing:
        return row | {"reason": "; ".join(missing)}
    value = _value(target, case, others, counts.get(target.case, 1))
    met = value >= target.bound if target.against else value <= target.bound
    noisy = any(result.noisy() for result in (case[target.ours], *others))
    limits = [case[name] for name in target.limit if name in case and case[name].samples]
    at_limit = max((_value(target, case, others, 1, limit) for limit in limits), default=None)
    found = {"value": value, "at_limit": at_limit, "met": met, "noisy": noisy}
    return row | found | {"against": [other.name for other in others]}


def _value(
    target: Target, case: Mapping[str, Result], others: list[Result], count: int, ours: Result | None = None
) -> float:
    ours = ours or case[target.ours]
    absolute: Mapping[str, Callable[[], float]] = {
        "ms": lambda: ours.wall() * 1e3,
        "us per tensor": lambda: ours.wall() * 1e6 / count,
        "extra MiB": lambda: max(0.0, (ours.peak or 0) - held(ours)) / MIB,
    }
    if not others:
        return absolute[target.of]()
    less = case[target.less].wall(target.of) if target.less else 0.0
    best = min(other.wall(target.of) for other in others)
    return max(best - less, math.ulp(0.0)) / ours.wall(target.of)


def held(result: Result) -> int:
    """Bytes that a contender of the memory case leaves with its caller."""
    return result.nbytes if result.name.startswith("load into meta") else 0
