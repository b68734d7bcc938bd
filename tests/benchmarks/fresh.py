"""One load in a process of its own: `python -m tests.benchmarks.fresh HOW FOLDER DEVICE` prints its seconds as JSON.

Imports, the device's context and the module without weights come before the clock starts; everything else, and so the
cost of pinning memory for the first time, is timed.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch as st
import torch

from tests.benchmarks import ours, peers
from tests.benchmarks.measure import Timing, Unavailable
from tests.benchmarks.model import Shape, llama

ROOT = Path(__file__).parents[2]
UNAVAILABLE = 3


def _module(folder: Path) -> torch.nn.Module:
    made = json.loads((folder / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    return llama(Shape(*(made[name] for name in sizes)))


def _funcmodel(folder: Path, device: str) -> Callable[[], Any]:
    act, module = ours.load(folder / "model.safetensors", device_map=device), _module(folder)
    return lambda: act(module)


def _load_file(folder: Path, device: str) -> Callable[[], Any]:
    return lambda: st.load_file(folder / "model.safetensors", device=device)


def _transformers(folder: Path, device: str) -> Callable[[], Any]:
    act = peers.from_pretrained(folder, device_map=device)
    peers.transformers_build(folder)(None)  # imports the class
    return lambda: act(None)


def _fastsafetensors(folder: Path, device: str) -> Callable[[], Any]:
    act = peers.fastsafetensors_load(folder / "model.safetensors", device)
    return lambda: act(None)


def _runai(folder: Path, device: str) -> Callable[[], Any]:
    act = peers.runai_load(folder / "model.safetensors", device)
    return lambda: act(None)


HOW: dict[str, Callable[[Path, str], Callable[[], Any]]] = {
    "funcmodel": _funcmodel,
    "load_file": _load_file,
    "transformers": _transformers,
    "fastsafetensors": _fastsafetensors,
    "runai_model_streamer": _runai,
}


def in_new_process(how: str, folder: Path, device: str) -> Callable[[Any], Timing]:
    """An act that starts a process per run and returns what that measured."""
    command = [sys.executable, "-m", "tests.benchmarks.fresh", how, str(folder), device]

    def act(_: Any) -> Timing:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
            raise Unavailable(last) if ran.returncode == UNAVAILABLE else RuntimeError(last)
        return Timing(**json.loads(ran.stdout.splitlines()[-1]))

    return act


def main() -> int:
    how, folder, device = sys.argv[1:]
    try:
        act = HOW[how](Path(folder), device)
    except Unavailable as error:
        print(error, file=sys.stderr)
        return UNAVAILABLE
    on_device = torch.device(device).type == "cuda"
    torch.ones(1, device=device).add_(1)
    if on_device:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    found = act()
    if on_device:
        torch.cuda.synchronize()
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))
    del found
    return 0


if __name__ == "__main__":
    sys.exit(main())
