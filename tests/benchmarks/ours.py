"""funcmodel's contenders: the public functions as a user calls them, and each of their steps alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import funcmodel as fm
from tests.benchmarks.model import Tensors

Act = Callable[[Any], Any]
STRICT, CAST = fm.LoadPolicy(), fm.LoadPolicy(dtype="module")


def load(path: Path, **options: Any) -> Act:
    """Scan, plan, check and apply: what a user calls. The argument is the module."""
    return lambda module: fm.load(module, path, **options)


def planned(module: nn.Module, path: Path, policy: fm.LoadPolicy = STRICT) -> fm.LoadPlan:
    """The plan alone."""
    dtype = "module" if policy.dtype == "module" else "file"
    return fm.checked(fm.plan_load(fm.module_spec(module), fm.scan(path), dtype=dtype), policy)


def plan(path: Path, policy: fm.LoadPolicy = STRICT) -> Act:
    return lambda module: planned(module, path, policy)


def apply() -> Act:
    """The argument is a plan and a module."""
    return lambda given: fm.apply(*given)


def plan_and_module(
    make: Callable[[], nn.Module], path: Path, **options: Any
) -> Callable[[], tuple[fm.LoadPlan, nn.Module]]:
    """What `apply` is given: a plan with its routes."""

    def prepare() -> tuple[fm.LoadPlan, nn.Module]:
        module = make()
        return fm.probed(planned(module, path), **options), module

    return prepare


def materialize(path: Path) -> Act:
    """Scanning included."""
    return lambda _: fm.materialize(fm.scan(path))


def materialize_plan() -> Act:
    return lambda source: fm.materialize(source)


def parts(path: Path) -> dict[str, fm.StateDictPlan]:
    """Plans of what is not stored as it is wanted; the keys are those of `small_network`."""
    whole = fm.scan(path)
    rows, columns = (fm.tp_slice({"{i}.{j}.weight": axis}, rank=1, world_size=2)(whole) for axis in (0, 1))
    stacked = fm.convert(fm.Stacked("{i}.{j}.weight", "{i}.weight", over="j"))(whole)
    return {"rows": rows, "columns": columns, "stacked by tens": stacked, "cast": fm.cast("float32")(whole)}


def save(source: nn.Module | Tensors, max_shard_size: int | None, durability: str) -> Act:
    return lambda into: fm.save(source, into, max_shard_size=max_shard_size, durability=durability)


def save_plan(tensors: Tensors) -> fm.SavePlan:
    """The plan of saving tensors as one file."""
    return fm.plan_save(live_plan(tensors), max_shard_size=None)


def live_plan(tensors: Tensors) -> fm.StateDictPlan:
    specs = {key: fm.TensorSpec(list(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in tensors.items()}
    return fm.StateDictPlan({key: fm.Live(key, spec) for key, spec in specs.items()})


def apply_save(made: fm.SavePlan, tensors: Tensors) -> Act:
    return lambda into: fm.apply(made, into, live=tensors, durability="none")
