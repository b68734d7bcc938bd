"""`python -m tests.benchmarks [name ...]`: a table of each measurement; exit code 1 if one is above its limit.

`python -m tests.benchmarks engine [option ...]` has options and a report of its own; see `engine`.
"""

import subprocess
import sys
from pathlib import Path

from tests.benchmarks import Row, digests, durability, planning, small_tensors, table, ways

MEASUREMENTS = {
    "small_tensors": ("20,000 tensors of 2 KiB into a module on meta (ours / peer)", small_tensors.rows),
    "digests": ("digests of 218 MB in 4,012 tensors", digests.rows),
    "durability": ("the price of a save that is a transaction, wall time", durability.rows),
    "ways": ("many tensors, step by step", ways.rows),
    "planning": ("planning 100,000 tensors on meta, CPU-seconds", planning.rows),
}


def above(row: Row) -> bool:
    return row.limit is not None and row.value > row.limit


def main() -> int:
    if sys.argv[1:2] == ["engine"]:
        from tests.benchmarks import engine  # what it compares with takes seconds to import

        return engine.main(sys.argv[2:])
    chosen = sys.argv[1:] or [*MEASUREMENTS, "saving"]
    failed = False
    for name in chosen:
        if name == "saving":  # each case in a process of its own
            script = Path(__file__).with_name("saving.py")
            failed |= subprocess.run([sys.executable, script], check=False).returncode != 0
            continue
        title, measure = MEASUREMENTS[name]
        found = measure()
        print(table(title, found), flush=True)
        failed |= any(map(above, found))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
