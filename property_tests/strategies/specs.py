"""Modules and state dicts as data, without torch: ties, both kinds of buffers, empty modules, overlaps, extra state."""

from attrs import evolve, frozen
from hypothesis import strategies as st

from funcmodel.records.devices import CPU, Device
from funcmodel.records.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT64, UINT8
from funcmodel.records.expressions import Expr, FileRef, Full, Live, Noise, Read
from funcmodel.records.module import ModuleSpec, ParamSpec, SubmoduleSpec, TiedGroup, ViewSpec
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec

FILE = FileRef("ckpt/model.safetensors", "safetensors", 1 << 20, "0" * 32)
OTHER = FileRef("ckpt/other.safetensors", "safetensors", 1 << 20, "1" * 32)
FLOATS = (FLOAT32, BFLOAT16, FLOAT16)
DEVICES = st.sampled_from([None, CPU, Device("cuda", 0), Device("cuda", 1)])

# Few draws per module keep examples cheap: paths, shapes and leaves are drawn whole.
_PATHS = [
    "layers.0",
    "layers.1",
    "layers.10.attn",
    "layers.10.norm",
    "encoder.0.w1",
    "head",
    "norm",
    "é.a b",
    "layers.2",
]
_LEAVES = ["weight", "bias", "scale", "running_mean", "inv_freq"]
_SHAPES = [(), (0,), (1,), (3,), (4, 2), (2, 4), (0, 3), (2, 1, 3)]
_SUBMODULES = [SubmoduleSpec(c, i) for c in ("Block", "Linear") for i in (None, "reset_parameters", "_init_weights")]
_PARAMETERS = [
    ParamSpec(spec=TensorSpec(shape, dtype), requires_grad=grad)
    for shape in _SHAPES
    for dtype in FLOATS
    for grad in (True, False)
]
_BUFFERS = [
    ParamSpec(
        spec=TensorSpec(shape, dtype), kind="buffer", persistent=saved, device=CPU, requires_grad=False, random_seed=s
    )
    for shape in _SHAPES[:5]
    for dtype in (FLOAT32, INT64)
    for saved in (True, False)
    for s in (None, 7)
]

tensor_specs = st.sampled_from([TensorSpec(shape, dtype) for shape in _SHAPES for dtype in (*FLOATS, INT64)])


@st.composite
def module_specs(
    draw: st.DrawFn, *, devices: st.SearchStrategy[Device | None] = DEVICES, odd: bool = True
) -> ModuleSpec:
    """A module: nested, some submodules without a leaf, both kinds of buffers, ties across parents.

    `odd` adds what most modules lack: overlapping leaves, extra state, a buffer outside the state dict on meta.
    """
    device = draw(devices)
    modules = {"": SubmoduleSpec("Net")}
    for path in draw(st.lists(st.sampled_from(_PATHS), unique=True, max_size=5)):
        segments = path.split(".")
        for end in range(1, len(segments) + 1):
            modules.setdefault(".".join(segments[:end]), draw(st.sampled_from(_SUBMODULES)))
    params: dict[str, ParamSpec] = {}
    opaque = []
    for module in modules:
        dot = f"{module}." if module else ""
        for leaf in draw(st.lists(st.sampled_from(_LEAVES), unique=True, max_size=3)):
            found = draw(st.sampled_from(_PARAMETERS if leaf in ("weight", "bias", "scale") else _BUFFERS))
            meta = odd and leaf == "inv_freq" and device is None
            params[dot + leaf] = evolve(found, device=device) if found.kind == "parameter" or meta else found
    extra = draw(st.sampled_from(["none", "none", "tensor", "opaque"])) if odd else "none"
    if extra == "tensor":
        params["_extra_state"] = ParamSpec(spec=TensorSpec((5,), UINT8), kind="extra_state", device=CPU)
    elif extra == "opaque":
        opaque.append("_extra_state")
    params, tied = draw(with_ties(params))
    views = draw(with_views(params, tied)) if odd else {}
    return ModuleSpec(name="Net", params=params, modules=modules, tied=tied, views=views, opaque=tuple(opaque))


@st.composite
def with_ties(draw: st.DrawFn, params: dict[str, ParamSpec]) -> tuple[dict[str, ParamSpec], tuple[TiedGroup, ...]]:
    """Some leaves become one: each other member of a group takes the first one's spec, kind and device.

    A buffer may be in the state dict under one of its names and outside under another.
    """
    free = [key for key, leaf in params.items() if leaf.kind != "extra_state"]
    groups = []
    params = dict(params)
    while len(free) >= 2 and draw(st.integers(0, 2)) == 0:
        members = draw(st.lists(st.sampled_from(free), unique=True, min_size=2, max_size=3))
        members.sort(key=list(params).index)
        for key in members:
            inside = params[key].persistent or params[members[0]].kind == "parameter"
            params[key] = evolve(params[members[0]], persistent=inside)
            free.remove(key)
        groups.append(TiedGroup(members, draw(st.sampled_from(["identity", "storage"]))))
    return params, tuple(groups)


@st.composite
def with_views(draw: st.DrawFn, params: dict[str, ParamSpec], tied: tuple[TiedGroup, ...]) -> dict[str, ViewSpec]:
    """A buffer, now and then, that is the first elements of a parameter."""
    taken = {key for group in tied for key in group.keys}
    bases = [key for key, leaf in params.items() if leaf.kind == "parameter" and key not in taken and leaf.spec.ndim]
    buffers = [key for key, leaf in params.items() if leaf.kind == "buffer" and key not in taken and leaf.spec.ndim]
    if not bases or not buffers or draw(st.integers(0, 3)):
        return {}
    base, key = draw(st.sampled_from(bases)), draw(st.sampled_from(buffers))
    return {key: ViewSpec(base, (1,) * params[key].spec.ndim, 0)}


def leaf_expression(key: str, spec: TensorSpec, number: int) -> Expr:
    """A leaf expression of exactly this spec; four kinds take turns."""
    if number % 5 == 1:
        return Live(key, spec)
    if number % 5 == 2 and spec.dtype.kind == "float":
        return Full(spec, (0.0, 1.5, -2)[number % 3])
    if number % 5 == 3 and spec.dtype.kind == "float":
        return Noise(spec, 0.0, 0.02, number << 40)
    return Read((FILE, OTHER)[number % 2], key, spec, 4096 + 64 * number)


@frozen
class Case:
    """A module, a source, and what is wrong between them: nothing more and nothing less than these keys."""

    spec: ModuleSpec
    source: StateDictPlan
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    held_back: tuple[str, ...] = ()


@st.composite
def fitting_cases(draw: st.DrawFn, specs: st.SearchStrategy[ModuleSpec] | None = None) -> Case:
    """A source that holds every leaf of the state dict, of each tie some of the names (all with one expression)."""
    spec = draw(module_specs() if specs is None else specs)
    start = draw(st.integers(0, 9))
    saved = ((key, leaf.spec) for key, leaf in spec.params.items() if leaf.persistent)
    entries = {key: leaf_expression(key, found, at) for at, (key, found) in enumerate(saved, start)}
    held_back = []
    for group in spec.tied:
        names = [key for key in group.keys if key in entries]
        entries.update(dict.fromkeys(names, entries[names[0]]) if names else {})
        without = draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names) - 1)) if names else []
        held_back += without
        for key in without:
            del entries[key]
    order = draw(st.sampled_from([list(entries), sorted(entries), list(entries)[::-1]]))
    return Case(spec, StateDictPlan({key: entries[key] for key in order}), held_back=tuple(held_back))


def other_shape(spec: TensorSpec) -> TensorSpec:
    """A spec of another shape and the same dtype."""
    return TensorSpec((*spec.shape, 2) if spec.ndim < 3 else (spec.shape[0] + 1, *spec.shape[1:]), spec.dtype)


@st.composite
def cases(draw: st.DrawFn, specs: st.SearchStrategy[ModuleSpec] | None = None, *, mismatches: bool = True) -> Case:
    """A source with keys too few, too many, and of another shape."""
    fitting = draw(fitting_cases(specs))
    spec, entries = fitting.spec, dict(fitting.source)
    saved = {key: leaf for key, leaf in spec.params.items() if leaf.persistent}
    group_of = {key: [k for k in group.keys if k in saved] for group in spec.tied for key in group.keys}
    wanted = [key for key in saved if group_of.get(key, [key])[0] == key]
    some = st.lists(st.sampled_from(wanted), unique=True, max_size=3) if wanted else st.just([])
    gone = draw(some)
    bent = draw(some) if mismatches else []
    missing, mismatched = set(), []
    for key in gone:
        for name in group_of.get(key, [key]):
            entries.pop(name, None)
            missing.add(name)
    for key in set(bent) - set(gone):
        if spec.params[key].kind == "extra_state":
            continue
        held = [name for name in group_of.get(key, [key]) if name in entries]
        expr = Live("bent", other_shape(spec.params[key].spec))
        entries.update(dict.fromkeys(held, expr))
        mismatched.append(held[0])
    unexpected = []
    for key in draw(st.lists(st.sampled_from(["surplus", "layers.0.more", "head.inv", "z.0.weight"]), unique=True)):
        if key not in spec.params:
            entries[key] = leaf_expression(key, TensorSpec((2,), FLOAT32), len(key))
            unexpected.append(key)
    ordered = tuple(key for key in spec.params if key in missing)
    return Case(spec, StateDictPlan(entries), ordered, tuple(unexpected), tuple(mismatched), fitting.held_back)
