"""Peak extra memory of saving, resharding and casting file to file, measured in a process of its own.

    python tests/benchmarks/saving.py [--megabytes 1000] [--json]

Anonymous memory is what counts: the page cache belongs to the system. It is sampled every millisecond by a thread while
the case runs; what was there before is subtracted. The limit is 64 MiB and one tensor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20
LIMIT = 64 * MIB
TENSORS = 8


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much anonymous memory a process has")


def peak_of(case: Callable[[], object]) -> int:
    """Highest anonymous memory while `case` runs, above what there was before, in bytes."""
    over = threading.Event()
    before = highest = anonymous()

    def sample() -> None:
        nonlocal highest
        while not over.wait(0.001):
            highest = max(highest, anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        case()
    finally:
        over.set()
        thread.join()
    return highest - before


def main_of_case(case: str, nbytes: int, folder: Path) -> dict[str, int | str]:
    import torch

    from funcmodel.core import build
    from funcmodel.plan.saving import plan_save
    from funcmodel.records.plans import StateDictPlan
    from funcmodel.run.scan import scan
    from funcmodel.run.tensors import tensor_spec
    from funcmodel.run.write import write

    rows = nbytes // TENSORS // 4096
    source = folder / "source"
    limit = nbytes // 3
    largest = rows * 4096
    if case in ("save", "save strided"):
        tensors = {f"layers.{i}.weight": torch.ones(rows, 1024) for i in range(TENSORS)}
        if case == "save strided":
            tensors = {key: tensor.t() for key, tensor in tensors.items()}
        plan = StateDictPlan({key: build.live(key, tensor_spec(t)) for key, t in tensors.items()})
        peak = peak_of(lambda: write(plan_save(plan, max_shard_size=limit), folder / "out", live=tensors))
    else:
        transforms: dict[str, Callable[[object], object]] = {
            "reshard": lambda e: e,
            "cast": lambda e: build.cast(e, "bfloat16"),  # type: ignore[arg-type]
            "widen": lambda e: build.cast(e, "float64"),  # type: ignore[arg-type]
            "transpose": lambda e: build.transpose(e),  # type: ignore[arg-type]
        }
        largest = {"cast": largest // 2, "widen": largest * 2}.get(case, largest)
        plan = StateDictPlan({key: transforms[case](e) for key, e in scan(source).items()})  # type: ignore[misc]
        peak = peak_of(lambda: write(plan_save(plan, max_shard_size=limit), folder / "out"))
    return {"case": case, "peak": peak, "tensor": largest}


def prepare(nbytes: int, folder: Path) -> None:
    """The source of the cases that go from file to file, made without funcmodel and by another process."""
    code = (
        "import safetensors.torch, sys, torch\n"
        "rows, count, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]\n"
        "tensors = {f'layers.{i}.weight': torch.full((rows, 1024), float(i)) for i in range(count)}\n"
        "safetensors.torch.save_file(tensors, file, {'format': 'pt'})\n"
    )
    (folder / "source").mkdir()
    file = folder / "source" / "model.safetensors"
    subprocess.run([sys.executable, "-c", code, str(nbytes // TENSORS // 4096), str(TENSORS), str(file)], check=True)


CASES = ("save", "save strided", "reshard", "cast", "widen", "transpose")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--megabytes", type=int, default=1000)
    options.add_argument("--json", action="store_true")
    options.add_argument("--case", choices=CASES)
    options.add_argument("--folder", type=Path)
    chosen = options.parse_args()
    nbytes = chosen.megabytes * 10**6
    if chosen.case:
        if not chosen.case.startswith("save"):
            prepare(nbytes, chosen.folder)
        print(json.dumps(main_of_case(chosen.case, nbytes, chosen.folder)))
        return 0
    found = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--megabytes", str(chosen.megabytes), "--folder", folder]
            ran = subprocess.run([*command, "--case", case], check=True, capture_output=True, text=True)
            found.append(json.loads(ran.stdout))
    if chosen.json:
        print(json.dumps(found))
    else:
        print(f"{chosen.megabytes} MB in {TENSORS} tensors; MiB of anonymous memory above the start")
        print(f"{'case':<14}{'peak':>8}{'limit':>8}")
        for row in found:
            print(f"{row['case']:<14}{row['peak'] / MIB:>8.1f}{(LIMIT + row['tensor']) / MIB:>8.1f}")
    return int(any(row["peak"] > LIMIT + row["tensor"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
