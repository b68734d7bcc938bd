"""State dict plans whose keys are chosen to be confused: prefixes of each other, odd characters, empty segments."""

from collections.abc import Sequence

from hypothesis import strategies as st

from funcmodel.records.dtypes import (
    BFLOAT16,
    BOOL,
    COMPLEX64,
    FLOAT8_E4M3,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT64,
    UINT8,
    DType,
)
from funcmodel.records.expressions import FileRef, Live, Read
from funcmodel.records.module import ModuleSpec, ParamSpec, TiedGroup
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec

DTYPES = (FLOAT32, BFLOAT16, FLOAT16, FLOAT64, FLOAT8_E4M3, INT64, INT8, UINT8, BOOL, COMPLEX64)
FLOATS = (FLOAT32, BFLOAT16, FLOAT16, FLOAT64)
FILE = FileRef("model.safetensors", "safetensors", 1 << 30, "0" * 32)

# A small alphabet of segments makes keys share, repeat and extend one another; the odd ones break naive patterns.
segments = st.sampled_from(
    (
        "a",
        "b",
        "model",
        "layers",
        "0",
        "1",
        "10",
        "weight",
        "bias",
        "",
        " ",
        "{i}",
        "{*k}",
        "}",
        "*",
        "é",
        "\u202e",
        "a b",
    )
)
keys = st.lists(segments, min_size=1, max_size=4).map(".".join)
plain_keys = st.lists(st.sampled_from(("a", "b", "norm", "0", "w")), min_size=1, max_size=3).map(".".join)


def specs(dtypes: Sequence[DType] = DTYPES, *, min_dims: int = 0, max_side: int = 6) -> st.SearchStrategy[TensorSpec]:
    shapes = st.lists(st.integers(0, max_side), min_size=min_dims, max_size=3)
    return st.builds(TensorSpec, shapes, st.sampled_from(tuple(dtypes)))


@st.composite
def plans(
    draw: st.DrawFn,
    names: st.SearchStrategy[str] = keys,
    dtypes: Sequence[DType] = DTYPES,
    *,
    min_size: int = 0,
    max_size: int = 7,
    min_dims: int = 0,
) -> StateDictPlan:
    """Plans of leaves, in memory or in a file; equal specs and repeated sources occur."""
    chosen = draw(st.lists(names, min_size=min_size, max_size=max_size, unique=True))
    entries = {}
    for number, key in enumerate(chosen):
        spec = draw(specs(dtypes, min_dims=min_dims))
        source = draw(st.sampled_from(("own", "own", "first")))
        name = key if source == "own" else chosen[0]
        stored = draw(st.booleans())
        entries[key] = Read(FILE, name, spec, 4096 + 1024 * number) if stored else Live(name, spec)
    return StateDictPlan(entries)


@st.composite
def tied_groups(draw: st.DrawFn, names: Sequence[str]) -> tuple[TiedGroup, ...]:
    """Disjoint groups of at least two of `names`."""
    rest = draw(st.permutations(list(names)))
    groups = []
    while len(rest) >= 2 and draw(st.booleans()):
        count = draw(st.integers(2, min(3, len(rest))))
        groups.append(TiedGroup(rest[:count]))
        rest = rest[count:]
    return tuple(groups)


def module_of(plan: StateDictPlan, *, name: str = "Net", tied: tuple[TiedGroup, ...] = ()) -> ModuleSpec:
    """The spec of a module that such a plan fits exactly."""
    params = {key: ParamSpec(spec=expr.spec) for key, expr in plan.items() if isinstance(expr, Live | Read)}
    return ModuleSpec(name=name, params=params, tied=tied)
