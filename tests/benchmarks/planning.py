"""Planning at scale: 100,000 tensors on meta, every step and every transform with up to 100 rules, in CPU-seconds."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import funcmodel as fm
from tests.benchmarks import Row, timed

STAGES, BLOCKS, LAYERS = 10, 1_000, 5
LEAVES = ("weight", "bias")
TEMPLATES = [f"{s}.{{i}}.{n}.{leaf}" for s in range(STAGES) for n in range(LAYERS) for leaf in LEAVES]
PLAN_LIMIT, TRANSFORM_LIMIT = 3.0, 1.5


def network() -> nn.Module:
    """10 stages of 1,000 blocks of 5 layers of two leaves each: 100,000 tensors."""

    def block() -> nn.Module:
        return nn.ModuleList(nn.Linear(8, 8, device="meta") for _ in range(LAYERS))

    return nn.ModuleList(nn.ModuleList(block() for _ in range(BLOCKS)) for _ in range(STAGES))


def renames() -> list[fm.Rename]:
    return [fm.Rename(text, f"net.stages.{text}") for text in TEMPLATES]


def transforms(
    plan: fm.StateDictPlan, spec: fm.ModuleSpec
) -> dict[str, tuple[Callable[[fm.StateDictPlan], object], fm.StateDictPlan]]:
    """Name to (transform, the plan it is given)."""
    keys = list(plan)
    prefixed = fm.StateDictPlan({f"model.{key}": expr for key, expr in plan.items()})
    ties = [fm.TiedGroup((key, f"alias.{key}")) for key in keys[::2]]
    aliased = fm.StateDictPlan({**plan, **{f"alias.{key}": plan[key] for key in keys[::2]}})
    layout = {text: 0 if n % 2 else 1 for n, text in enumerate(t for t in TEMPLATES if t.endswith("weight"))}
    stack = [fm.Stacked(f"{s}.{{i}}.{n}.{leaf}", f"{s}.all.{n}.{leaf}", over="i") for s, n, leaf in split()]
    merged = [merge(s, leaf) for s in range(STAGES) for leaf in LEAVES]
    transposed = [fm.Transpose(text) for text in TEMPLATES if text.endswith("weight")]
    return {
        "convert, 100 renames": (fm.convert(*renames()), plan),
        "convert, 100 stacks of 1,000": (fm.convert(*stack), plan),
        "convert, 20 merges of 5": (fm.convert(*merged), plan),
        "convert, 50 transposes": (fm.convert(*transposed), plan),
        "keep, 50 templates": (fm.keep(*TEMPLATES[::2]), plan),
        "drop, 50 templates": (fm.drop(*TEMPLATES[::2]), plan),
        "cast": (fm.cast("bfloat16"), plan),
        "cast where": (fm.cast("bfloat16", where="{*m}.weight"), plan),
        "at": (fm.at("{*m}.weight", lambda key, e: fm.expr.cast(e, "float64")), plan),
        "overlay": (fm.overlay(plan), plan),
        "like": (fm.like(spec), plan),
        "aligned": (fm.aligned(spec), prefixed),
        "dedupe, 50,000 ties": (fm.dedupe(ties), aliased),
        "spread, 50,000 ties": (fm.spread(ties), plan),
        "tp_slice, 50 templates": (fm.tp_slice(layout, rank=1, world_size=2), plan),
    }


def split() -> list[tuple[int, int, str]]:
    return [(s, n, leaf) for s in range(STAGES) for n in range(LAYERS) for leaf in LEAVES]


def merge(stage: int, leaf: str) -> fm.Merge:
    return fm.Merge([f"{stage}.{{i}}.{n}.{leaf}" for n in range(LAYERS)], f"{stage}.{{i}}.all.{leaf}", dim=0)


def rows(repeats: int = 5) -> list[Row]:
    net = network()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        zeros = {"weight": torch.zeros(8, 8), "bias": torch.zeros(8)}
        save_file({key: zeros[key.rpartition(".")[2]].clone() for key in net.state_dict()}, path)
        plan, spec = fm.scan(path), fm.module_spec(net)
        loading = fm.plan_load(spec, plan)
        steps = timed(
            {
                "scan": (lambda: path, fm.scan),
                "module_spec": (lambda: net, fm.module_spec),
                "plan_load": (lambda: spec, lambda spec: fm.plan_load(spec, plan)),
                "checked": (lambda: loading, fm.checked),
            },
            repeats,
        )
    total = Row("scan + module_spec + plan_load + checked", sum(t.cpu for t in steps.values()), PLAN_LIMIT, "s")
    cases = transforms(plan, spec)
    found = timed({name: ((lambda given=given: given), act) for name, (act, given) in cases.items()}, repeats)
    return [
        *(Row(name, times.cpu, None, "s") for name, times in steps.items()),
        total,
        *(Row(name, times.cpu, TRANSFORM_LIMIT, "s") for name, times in found.items()),
    ]
