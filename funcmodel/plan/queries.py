"""Questions to plans and specs: how many bytes, how many parameters, and what applying takes."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from operator import itemgetter
from typing import Final, Literal, TypeAlias, assert_never

from attrs import evolve

from funcmodel.core.index import render_index
from funcmodel.core.lowering import below, has_call, leaves, nodes, reads, stored
from funcmodel.core.shapes import nbytes_of, spec_of
from funcmodel.core.wire import BLANK, render_header, with_digests
from funcmodel.errors import PlanError
from funcmodel.plan.routing import BUFFERS, GAP, PINNED, SMALL, span_of
from funcmodel.plan.sharding import writers
from funcmodel.records.actions import (
    Assign,
    Initialize,
    LoadAction,
    Move,
    Offload,
    Publish,
    SaveAction,
    Tie,
    WriteIndex,
    WriteShard,
    WriteText,
)
from funcmodel.records.devices import CPU, DISK, Device, device
from funcmodel.records.expressions import Call, Cast, Expr, Live, Noise, Read, Reshape
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import ModuleSpec, ParamSpec
from funcmodel.records.plans import LoadPlan, SavePlan, StateDictPlan
from funcmodel.records.reports import Cost
from funcmodel.records.routes import Into, Route, Routing

WRITTEN: Final = 16 << 20  # bytes of buffers for a file that is being written

_Way: TypeAlias = tuple[Expr, Device, Route | None]


def nbytes(plan: Mapping[str, Expr]) -> int:
    """Bytes of all tensors of a plan, each key for itself.

    Args:
        plan: key -> expression, for example a `StateDictPlan`.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> nbytes(StateDictPlan({"w": Live("w", TensorSpec([2, 3], "bfloat16"))}))
        12
    """
    return sum(nbytes_of(expr) for expr in plan.values())


def num_parameters(of: ModuleSpec | Mapping[str, Expr], *, which: Literal["all", "trainable"] = "all") -> int:
    """How many numbers there are: parameters of a module, or elements of a plan.

    Tied leaves count once, as does a parameter inside another's storage. Buffers do not count.

    Args:
        of: a module's spec, or key -> expression.
        which: "trainable" counts only leaves that require a gradient; a plan does not know them.

    Raises:
        PlanError: "trainable" of a plan.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> num_parameters(ModuleSpec(name="Net", params={"w": ParamSpec(spec=TensorSpec([2, 3], "float32"))}))
        6
    """
    if isinstance(of, ModuleSpec):
        owned = (leaf for _, leaf in _owned(of) if leaf.kind == "parameter")
        return sum(leaf.spec.numel for leaf in owned if which == "all" or leaf.requires_grad)
    if which != "all":
        raise PlanError("a plan does not say which of its tensors are trainable; ask the module's spec")
    return sum(spec_of(expr).numel for expr in of.values())


def footprint(spec: ModuleSpec) -> int:
    """Bytes that a module's parameters and buffers take, tied and overlapping leaves once.

    Example:
        >>> from funcmodel.records.tensors import TensorSpec
        >>> footprint(ModuleSpec(name="Net", params={"w": ParamSpec(spec=TensorSpec([2, 3], "float32"))}))
        24
    """
    return sum(leaf.spec.nbytes for _, leaf in _owned(spec) if leaf.kind != "extra_state")


def _owned(spec: ModuleSpec) -> Iterator[tuple[str, ParamSpec]]:
    """Leaves with elements of their own."""
    others = {key for group in spec.tied for key in group.keys[1:]}
    others.update(spec.views)
    return ((key, leaf) for key, leaf in spec.params.items() if key not in others)


# -- cost --------------------------------------------------------------------------------------------------------------


def cost(plan: StateDictPlan | LoadPlan | SavePlan, *, on: object = "cpu", routes: Routing | None = None) -> Cost:
    """What applying a plan takes, in bytes: a promise.

    `peak` is what stays, what is replaced only at the end (`commit="swap"` keeps a module's present tensors until then;
    leaves on meta have none), and on the CPU the largest tensor that is computed aside: arguments and result of a
    `Call`, what a reshape reorders, a draw in float32, the second of two names that must agree; of a save the largest
    tensor that is neither stored nor live as it is wanted. Where the routes say that tensors are overwritten
    (`routed(plan, commit="in_place")`), nothing is replaced, but all that a `Call` makes is there before the first byte
    is written. Buffers come on top: those that the routes name, or where there are no routes yet at most 64 MiB, and on
    the way to a GPU 128 MiB, of as many threads as `machine` says.

    A save has 16 MiB of buffers for each of the files that are written at once, of which there are up to 8, but only
    one where anything is computed; and 64 MiB are added where stored tensors are changed. Out of a GPU tensors pass
    through two pinned buffers of at most 8 MiB for each such file, and it makes pieces as large contiguous. Headers
    come on top while they are made: of 100,000 tensors they take about 30 MiB, with digests 160.

    Args:
        plan: the plan.
        on: the device that `materialize` is given, or that has the live tensors of a save. A `LoadPlan` names its own.
        routes: how a `StateDictPlan` is read, from `routing`; a `LoadPlan` may have its own.

    Example:
        >>> from funcmodel.records.expressions import FileRef
        >>> from funcmodel.records.tensors import TensorSpec
        >>> ref = FileRef("net.safetensors", "safetensors", 4120, "")
        >>> plan = StateDictPlan({"w": Read(ref, "w", TensorSpec([2, 3], "float32"), 4096)})
        >>> dict(cost(plan).read), dict(cost(plan, on="cuda:0").held)
        ({'net.safetensors': 24}, {cuda:0: 24})
    """
    match plan:
        case StateDictPlan():
            home = device(on)
            way = {} if routes is None else routes.routes
            lent = sum(nbytes_of(expr) for key, expr in plan.items() if way.get(key) == "map")
            ways = [(expr, home, way.get(key)) for key, expr in plan.items()]
            aside = max(map(_aside, plan.values()), default=0)
            if routes is not None and routes.into == "existing":
                aside += sum(nbytes_of(expr) for expr in plan.values() if has_call(expr))
            found = _cost(ways, {home: nbytes(plan) - lent}, aside, "fresh" if routes is None else routes.into)
            changed = {home} if any(stored(expr) is None for expr in plan.values()) else set[Device]()
            return _with_routes(found, routes, lent, changed)
        case LoadPlan():
            return _load_cost(plan)
        case SavePlan():
            return _save_cost(plan.actions, device(on))
        case _:
            assert_never(plan)


def _cost(
    ways: Iterable[_Way], held: Mapping[Device, int], aside: int, into: Into, more: Mapping[Device, int] | None = None
) -> Cost:
    peak = dict(held)
    for where, size in (*(more or {}).items(), (CPU, aside)):
        if size:
            peak[where] = peak.get(where, 0) + size
    peak.pop(DISK, None)
    read = _read(ways, into)
    return Cost(read=FrozenMap(read), held=FrozenMap(held), peak=FrozenMap(peak), cached=sum(read.values()))


def _read(ways: Iterable[_Way], into: Into) -> dict[str, int]:
    """Bytes read per file: of an expression, on its way to a device, by a route where one was chosen."""
    total: dict[str, int] = {}
    shared: list[Read] = []
    staged: set[object] = set()
    for expr, home, route in ways:
        passes = route == "stage" or home.type != "cpu"  # and is read once, wherever it goes
        if type(expr) is not Read:
            # Of tensors that exist nobody knows the strides, and what lies otherwise is read otherwise.
            if passes and into == "fresh" and not _stands_between(expr):
                made = (expr, home.type)
                if made in staged:
                    continue
                staged.add(made)
            for leaf, box in reads(expr):
                bits = prod(stop - start for start, stop in box) * leaf.spec.dtype.bits
                total[leaf.file.path] = total.get(leaf.file.path, 0) + bits // 8
            continue
        path, size = expr.file.path, expr.spec.nbytes
        if passes:
            place = (path, expr.offset, size)
            size = 0 if place in staged else size
            staged.add(place)
        elif route == "slab" or (route is None and size < SMALL):
            shared.append(expr)
        total[path] = total.get(path, 0) + size
    for path, size in _between(shared).items():
        total[path] += size
    return total


def _stands_between(expr: Expr) -> bool:
    """Whether files are read for something in it that is computed before it."""
    while type(expr) is Reshape or type(expr) is Cast:  # which write where the whole is wanted
        expr = expr.of
    return any(type(node) is Call or type(node) is Reshape for node in nodes(expr))


def _between(shared: Iterable[Read]) -> dict[str, int]:
    """Bytes per file that lie between small tensors that are read into shared memory, and are read with them."""
    places: dict[str, list[tuple[int, int]]] = {}
    for read in shared:
        if read.spec.nbytes:
            places.setdefault(read.file.path, []).append((read.offset, read.spec.nbytes))
    found = dict.fromkeys(places, 0)
    for path, parts in places.items():
        parts.sort(key=itemgetter(0))
        for (start, size), (following, _) in pairwise(parts):
            gap = following - start - size
            if 0 < gap <= GAP:
                found[path] += gap
    return found


def _aside(expr: Expr) -> int:
    """The largest number of bytes that `expr` needs beside the destination at once."""
    if type(expr) is Live or stored(expr) is not None:
        return 0
    found: dict[int, int] = {}
    for node in reversed([*nodes(expr)]):  # what it is made of comes first
        largest = max((found[id(inner)] for inner in below(node)), default=0)
        match node:
            case Call(_, args, spec):  # arguments wait for those that come after them
                held = 0
                for arg in args:
                    held += spec_of(arg).nbytes
                    largest = max(largest, held + found[id(arg)])
                largest = max(largest, held + spec.nbytes)
            case Noise(spec):
                largest = spec.numel * 4
            case Reshape(of):
                largest += spec_of(of).nbytes
        found[id(node)] = largest
    return found[id(expr)]


def _with_routes(found: Cost, routes: Routing | None, borrowed: int, changed: Collection[Device]) -> Cost:
    """The cost with what the routes add.

    Args:
        found: without them.
        routes: the routes.
        borrowed: bytes of tensors that are pages of files.
        changed: devices that cast, turn or pick what they receive. Each reader has a buffer there, and what is made of
            its content.
    """
    if routes is None:
        return found
    size = routes.buffers * routes.buffer
    readers = max(1, min(routes.threads, routes.buffers // (1 + routes.pinned)))
    scratch = {where: 2 * readers * routes.buffer for where in changed if where.type != "cpu"}
    peak = {where: found.peak.get(where, 0) + scratch.get(where, 0) for where in (*found.peak, *scratch)}
    buffers, pinned = (0, size) if routes.pinned else (size, 0)
    buffers += routes.threads * span_of(routes)
    cached = sum(size for path, size in found.read.items() if path not in routes.direct)
    return evolve(found, peak=FrozenMap(peak), borrowed=borrowed, buffers=buffers, pinned=pinned, cached=cached)


def _load_cost(plan: LoadPlan) -> Cost:
    held: dict[Device, int] = {}
    ways: list[_Way] = []
    aside = early = borrowed = 0
    changed: set[Device] = set()
    way = {} if plan.routing is None else plan.routing.routes
    for action in plan.actions:
        where, size, expr = _held(action)
        if expr is not None and stored(expr) is None:
            changed.add(where)
        if type(action) is Assign and way.get(action.key) == "map":
            borrowed += size
        elif size:
            held[where] = held.get(where, 0) + size
        if expr is not None:
            ways.append((expr, where, way.get(action.key)) if type(action) is Assign else (expr, CPU, "read"))
            aside = max(aside, _aside(expr) + (nbytes_of(expr) if isinstance(action, Tie) else 0))
            early += nbytes_of(expr) if has_call(expr) else 0
    if plan.routing is not None and plan.routing.into == "existing":
        found = _cost(ways, held, aside + early, "existing")
    else:
        found = _cost(ways, held, aside, "fresh", plan.replaced)
    return _with_routes(found, plan.routing, borrowed, changed)


def _held(action: LoadAction) -> tuple[Device, int, Expr | None]:
    """Device and bytes that an action leaves allocated, and what it reads."""
    match action:
        case Assign(_, expr, where):
            return where, nbytes_of(expr), expr
        case Offload(_, expr, copy):
            return DISK, nbytes_of(expr) if copy else 0, expr if copy else None
        case Initialize(device=where, nbytes=size) | Move(device=where, nbytes=size):
            return where, size, None
        case Tie(_, _, expr):
            return CPU, 0, expr
        case _:
            assert_never(action)


def _save_cost(actions: Sequence[SaveAction], home: Device) -> Cost:
    written: dict[str, int] = {}
    exprs: list[Expr] = []
    for action in actions:
        match action:
            case WriteShard(file, entries, metadata, digests):
                specs = {key: spec_of(expr) for key, expr in entries.items()}
                if digests != "none":
                    metadata = with_digests(metadata, dict.fromkeys(("", *specs), BLANK))
                written[file] = len(render_header(specs, metadata)[0]) + sum(spec.nbytes for spec in specs.values())
                exprs += entries.values()
            case WriteIndex(file, weight_map, metadata):
                written[file] = len(render_index(weight_map, metadata).encode("utf-8"))
            case WriteText(file, text):
                written[file] = len(text.encode("utf-8"))
            case Publish():
                pass
            case _:
                assert_never(action)
    made = [expr for expr in exprs if type(expr) is not Live and stored(expr) is None]
    reading = any(type(leaf) is Read for expr in made for leaf in leaves(expr))
    far = [] if home == CPU else [leaf.spec.nbytes for expr in exprs for leaf in leaves(expr) if type(leaf) is Live]
    passing = 0 if home == CPU else sum(expr.spec.nbytes for expr in exprs if type(expr) is Live)
    files = [written[action.file] for action in actions if isinstance(action, WriteShard)]
    at_once = writers(files, "computed" if made else "far" if far else "near") if files else 0
    peak = {home: at_once * 2 * min(PINNED, max(far, default=0))}
    peak[CPU] = max((nbytes_of(expr) + _aside(expr) for expr in made), default=0)
    read = _read(((expr, CPU, "read") for expr in exprs), "existing")
    return Cost(
        read=FrozenMap(read),
        peak=FrozenMap({where: size for where, size in peak.items() if size}),
        written=FrozenMap(written),
        buffers=at_once * WRITTEN + BUFFERS * reading,
        pinned=2 * min(at_once * PINNED, passing),
        cached=sum(read.values()) + sum(written.values()),
    )
