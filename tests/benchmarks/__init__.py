"""Measurements against a limit or a peer. Not part of a plain test run: `python -m tests.benchmarks`.

What is compared runs interleaved in one process, and the minimum counts: other work on the machine only ever adds.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple


class Row(NamedTuple):
    """One measurement: `value` must not be above `limit`, where there is one."""

    what: str
    value: float
    limit: float | None
    unit: str


class Times(NamedTuple):
    """Minimum over the repetitions, in seconds."""

    cpu: float
    wall: float


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Keep what exists out of the garbage collector's sight, so that a case pays for its own objects only."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(
    cases: Mapping[str, tuple[Callable[[], object], Callable[..., object]]], repeats: int = 5
) -> dict[str, Times]:
    """Every case `repeats` times, in turns. A case is what prepares its argument, untimed, and what is timed."""
    best: dict[str, Times] = {}
    for _ in range(repeats):
        for name, (prepare, act) in cases.items():
            given = prepare()
            with frozen_heap():
                wall, cpu = time.perf_counter(), time.process_time()
                result = act(given)
                found = Times(time.process_time() - cpu, time.perf_counter() - wall)
            del result, given
            best[name] = Times(*map(min, zip(best.get(name, found), found, strict=True)))
    return best


def table(title: str, rows: list[Row]) -> str:
    """The rows as text, those above their limit marked."""
    wide = max(len(row.what) for row in rows)
    lines = [title]
    for row in rows:
        limit = "" if row.limit is None else f"  limit {row.limit:g} {row.unit}"
        mark = "  ABOVE" if row.limit is not None and row.value > row.limit else ""
        lines.append(f"  {row.what:<{wide}}  {row.value:8.3f} {row.unit}{limit}{mark}")
    return "\n".join(lines)
