"""20,000 tensors of 2 KiB into a module on meta, planning included, against the two ways people write by hand."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import funcmodel as fm
from tests.benchmarks import Row, Times, timed

BLOCKS, LAYERS = 2_000, 10


def network() -> nn.Module:
    """2,000 blocks of 10 layers of one weight [16, 32]."""
    blocks = (nn.ModuleList(nn.Linear(32, 16, bias=False, device="meta") for _ in range(LAYERS)) for _ in range(BLOCKS))
    return nn.ModuleList(blocks)


def by_hand(net: nn.Module, path: Path) -> nn.Module:
    """What a careful user writes: no names are checked, nothing is planned, and memory stays mapped to the file."""
    parents = dict(net.named_modules())
    for key, tensor in load_file(path).items():
        parent, _, leaf = key.rpartition(".")
        parents[parent]._parameters[leaf] = nn.Parameter(tensor)
    return net


def by_state_dict(net: nn.Module, path: Path) -> nn.Module:
    net.load_state_dict(load_file(path), assign=True)
    return net


def rows(repeats: int = 5) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file({key: torch.randn(16, 32) for key in network().state_dict()}, path)
        plan = fm.scan(path)
        found = timed(
            {
                "load": (network, lambda net: fm.load(net, path)),
                "by hand": (network, lambda net: by_hand(net, path)),
                "materialize": (lambda: plan, fm.materialize),
                "load_file": (lambda: path, load_file),
            },
            repeats,
        )
        found |= timed({"load_state_dict": (network, lambda net: by_state_dict(net, path))}, 1)
        loaded, expected = fm.load(network(), path), load_file(path)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    return [*compared(found), *each(found)]


def compared(found: dict[str, Times]) -> list[Row]:
    load, hand, state = found["load"], found["by hand"], found["load_state_dict"]
    return [
        Row("load / load_file + loop over _parameters, CPU", load.cpu / hand.cpu, 1.0, "x"),
        Row("load / load_file + loop over _parameters, wall", load.wall / hand.wall, 1.0, "x"),
        Row("load / load_file + load_state_dict(assign=True), CPU", load.cpu / state.cpu, 0.2, "x"),
        Row("materialize / load_file, CPU", found["materialize"].cpu / found["load_file"].cpu, None, "x"),
    ]


def each(found: dict[str, Times]) -> list[Row]:
    count = BLOCKS * LAYERS
    return [Row(f"{name}, CPU per tensor", times.cpu / count * 1e6, None, "us") for name, times in found.items()]
