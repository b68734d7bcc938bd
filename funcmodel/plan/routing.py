"""Which way every tensor of a plan takes from its file: a pure choice, from the plan, sizes, and what a probe found."""

from collections.abc import Iterable, Mapping
from typing import Final, Literal, TypeAlias

from attrs import evolve

from funcmodel.core.limits import check_choice
from funcmodel.core.lowering import byte_runs, leaves
from funcmodel.core.shapes import nbytes_of
from funcmodel.core.templates import Matcher, template
from funcmodel.errors import PlanError
from funcmodel.records.actions import Assign
from funcmodel.records.devices import CPU, Device, device
from funcmodel.records.expressions import Expr, Index, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.plans import LoadPlan
from funcmodel.records.routes import ROUTES, Machine, Memory, Route, Routing, Storage

Wanted: TypeAlias = Route | Mapping[str, Route] | None
Into: TypeAlias = Literal["fresh", "existing"]

SMALL: Final = 64 << 10  # smaller tensors share a slab
SLAB: Final = 4 << 20  # which is at most this large
GAP: Final = 4 << 10  # so much between two of them is read with them: a disk reads it anyway, a call takes longer
BUFFER: Final = 4 << 20  # one of the buffers through which passes what cannot be read in place
PINNED: Final = 8 << 20  # one of those on the way to a device
SPAN: Final = 8 << 20  # what each thread that reads past the page cache has to itself
PAGEABLE: Final = 256 << 20  # of less, none of those is pinned
FEW_PINNED: Final = 4  # up to MANY bytes so many are
MANY: Final = 1_500_000_000  # and from there on two for each thread
LARGE: Final = 32 << 20  # a file of which less is wanted is read through the page cache, cold or not
HOT: Final = 0.9  # a file of which so much is in the page cache is read from there
COLD: Final = 0.25  # and past it where it is less than this
DISK: Final = 4  # so many threads at least keep a disk busy, however few processors there are
UNKNOWN: Final = Machine()
_UNKNOWN: Final = Storage()


def routing(
    plan: Mapping[str, Expr],
    machine: Machine = UNKNOWN,
    *,
    on: object | Mapping[str, object] = "cpu",
    into: Into = "fresh",
    memory: Memory = "own",
    route: Wanted = None,
) -> Routing:
    """The routes of a plan.

    Args:
        plan: key to expression.
        machine: what a probe found of the machine and the plan's files.
        on: the device that the tensors go to; or key to device.
        into: "fresh" memory, or "existing" tensors that are overwritten.
        memory: "borrow" maps whatever stands in its file as it is wanted, instead of reading it: nothing is copied, and
            a file that is overwritten or cut short changes, or kills, who holds its tensors.
        route: one route for every key that can take it; or template to route, where a key that cannot is an error.

    Raises:
        PlanError: a route is asked for that a key cannot take, a template matches nothing, or memory is to be borrowed
            for tensors that exist.
        ValueError: there is no such route.

    Example:
        >>> from funcmodel.core.build import cast, read
        >>> from funcmodel.records.expressions import FileRef
        >>> from funcmodel.records.tensors import TensorSpec
        >>> ref = FileRef("net.safetensors", "safetensors", 1 << 20, "")
        >>> w = read(ref, "w", TensorSpec([256, 512], "float32"), 4096)
        >>> dict(routing({"w": w, "b": cast(w, "bfloat16")}).routes)
        {'w': 'read', 'b': 'transform'}
    """
    home = CPU if isinstance(on, Mapping) else device(on)
    homes = {key: device(on[key]) for key in plan} if isinstance(on, Mapping) else {}
    return _routing([(key, expr, homes.get(key, home)) for key, expr in plan.items()], machine, into, memory, route)


def routed(
    plan: LoadPlan,
    machine: Machine = UNKNOWN,
    *,
    commit: Literal["swap", "in_place"] = "swap",
    memory: Memory = "own",
    route: Wanted = None,
) -> LoadPlan:
    """A load plan whose `routing` says which way every tensor takes.

    Args:
        plan: from `plan_load`.
        machine: what a probe found of the machine and the plan's files.
        commit: how it will be applied; "in_place" overwrites tensors that exist.
        memory: as in `routing`.
        route: as in `routing`.

    Raises:
        PlanError: a route is asked for that a key cannot take, or a template matches nothing.

    Example:
        >>> from funcmodel.core.build import full
        >>> from funcmodel.records.tensors import TensorSpec
        >>> plan = LoadPlan((Assign("w", full(TensorSpec([2], "float32"), 1.0), CPU),))
        >>> dict(routed(plan).routing.routes)
        {'w': 'transform'}
    """
    check_choice("commit", commit, ("swap", "in_place"))
    into: Into = "fresh" if commit == "swap" else "existing"
    entries = [(a.key, a.expr, a.device) for a in plan.actions if type(a) is Assign]
    return evolve(plan, routing=_routing(entries, machine, into, memory, route))


def _routing(
    entries: list[tuple[str, Expr, Device]], machine: Machine, into: Into, memory: Memory, route: Wanted
) -> Routing:
    check_choice("memory", memory, ("own", "borrow"))
    check_choice("into", into, ("fresh", "existing"))
    fresh = into == "fresh"
    if memory == "borrow" and not fresh:
        raise PlanError("tensors that exist keep their own memory, so nothing can be borrowed; use commit='swap'")
    routes: dict[str, Route] = {}
    borrow = memory == "borrow"
    for key, expr, home in entries:
        if home is not CPU and home.type != "cpu":
            routes[key] = "stage"
        elif borrow and not obstacle("map", expr, home, machine):
            routes[key] = "map"
        elif type(expr) is not Read:
            routes[key] = "transform"
        elif not fresh:
            routes[key] = "read"
        else:
            routes[key] = "slab" if expr.spec.nbytes < SMALL else "read"
    if route is not None:
        _overrule(routes, entries, machine, fresh, route)
    return _with_buffers(routes, entries, machine)


def obstacle(route: Route, expr: Expr, on: Device, machine: Machine, *, fresh: bool = True) -> str:
    """Why a tensor cannot take a route; empty where it can.

    Example:
        >>> from funcmodel.core.build import full
        >>> from funcmodel.records.tensors import TensorSpec
        >>> obstacle("map", full(TensorSpec([2], "float32"), 1.0), CPU, Machine())
        'it is not stored as it is wanted'
    """
    if route == "stage":
        return ""
    if on.type != "cpu":
        return f"it goes to {on!r}, which only 'stage' reaches"
    if route == "transform":
        return ""
    if not fresh and route != "read":
        return "it goes into a tensor that exists"
    if route == "map":
        return _unmappable(expr, machine)
    if type(expr) is not Read:
        return "it is not stored as it is wanted"
    if route == "slab" and expr.spec.nbytes > SLAB:
        return f"it has {expr.spec.nbytes} bytes, a slab at most {SLAB}"
    return ""


def _unmappable(expr: Expr, machine: Machine) -> str:
    found = mapped_range(expr)
    if found is None:
        return "it is not stored as it is wanted"
    read, start, _ = found
    if not machine.storage.get(read.file.path, _UNKNOWN).mappable:
        return f"{read.file.path} is compressed, not probed, or on a file system that does not map reliably"
    if start % max(1, read.spec.dtype.bits // 8):
        return f"it starts at byte {start} of its file, between two elements"
    return ""


def mapped_range(expr: Expr) -> tuple[Read, int, int] | None:
    """The stored tensor, first byte and size of an expression whose bytes stand in one piece in a file, or None.

    Example:
        >>> from funcmodel.core.build import narrow, read
        >>> from funcmodel.records.expressions import FileRef
        >>> from funcmodel.records.tensors import TensorSpec
        >>> w = read(FileRef("f", "safetensors", 4096, ""), "w", TensorSpec([4, 8], "float32"), 128)
        >>> mapped_range(narrow(w, 0, 1, 3))[1:], mapped_range(narrow(w, 1, 0, 3))
        ((160, 64), None)
    """
    if type(expr) is Read:
        return expr, expr.offset, expr.spec.nbytes
    if type(expr) is not Index or type(expr.of) is not Read or expr.of.spec.dtype.pack > 1:
        return None
    read = expr.of
    box = tuple([(a, a + 1) if isinstance(a, int) else a for a in expr.at])
    runs = byte_runs(read.spec.shape, read.spec.dtype.bits, box)
    return (read, read.offset + runs.start, runs.nbytes) if len(runs) == 1 else None


def _overrule(
    routes: dict[str, Route],
    entries: list[tuple[str, Expr, Device]],
    machine: Machine,
    fresh: bool,
    route: Route | Mapping[str, Route],
) -> None:
    if isinstance(route, str):
        check_choice("route", route, ROUTES)
        for key, expr, home in entries:
            if not obstacle(route, expr, home, machine, fresh=fresh):
                routes[key] = route
        return
    for text, wanted in route.items():
        check_choice("route", wanted, ROUTES)
        matcher = Matcher([template(text)])
        chosen = [entry for entry in entries if matcher.first(entry[0]) is not None]
        if not chosen:
            raise PlanError(f"route {wanted!r} for {text!r}: no key matches; correct the template", keys=(text,))
        for key, expr, home in chosen:
            if why := obstacle(wanted, expr, home, machine, fresh=fresh):
                raise PlanError(f"{key!r} cannot take the route {wanted!r}: {why}", keys=(key,))
            routes[key] = wanted


def _with_buffers(routes: dict[str, Route], entries: list[tuple[str, Expr, Device]], machine: Machine) -> Routing:
    kinds = set(routes.values())
    changed = not kinds.isdisjoint(("transform", "stage"))
    mapped: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()
    if changed or any(found.direct and found.cached < HOT for found in machine.storage.values()):
        sizes = _read_sizes(entries, routes)
        direct = tuple(sorted(path for path, size in sizes.items() if _past_the_cache(path, size, machine)))
        if changed:
            mapped = tuple(sorted(path for path in {*sizes}.difference(direct) if _out_of_the_cache(path, machine)))
    threads = max(DISK, machine.threads) if direct else machine.threads
    buffers, size, pinned = 0, BUFFER, False
    if "stage" in kinds:
        size = PINNED
        crossing = [expr for key, expr, home in entries if routes[key] == "stage" and home.type == "cuda"]
        buffers, pinned = staging(sum(nbytes_of(expr) for expr in crossing), threads)
    elif "transform" in kinds:
        buffers = threads + 2  # one that is being used, and one that waits
    return Routing(
        routes=FrozenMap(routes),
        mapped=mapped,
        direct=direct,
        threads=threads,
        buffers=buffers,
        buffer=size if buffers else 0,
        pinned=pinned,
    )


def staging(nbytes: int, threads: int) -> tuple[int, bool]:
    """How many buffers there are on the way to a GPU, and whether they are pinned.

    Out of pinned memory a GPU takes about 50 GB/s, out of other memory 10, so pinning saves 0.08 s per GB. It costs: a
    system pins 1 to 1.8 GB/s. So 4 buffers, 32 MiB, are 19 to 34 ms, which 0.25 to 0.4 GB earn; 16 buffers, 128 MiB,
    are 75 to 130 ms, which 0.9 to 1.6 GB earn. Out of memory that is not pinned nothing is copied beside the calling
    thread, so one buffer for each is enough.

    Args:
        nbytes: what goes there.
        threads: how many read.

    Example:
        >>> staging(100 << 20, 8), staging(1 << 30, 8), staging(8 << 30, 8)
        ((8, False), (4, True), (16, True))
    """
    if nbytes < PAGEABLE:
        return threads, False
    return (min(FEW_PINNED, 2 * threads) if nbytes < MANY else 2 * threads), True


def _read_sizes(entries: Iterable[tuple[str, Expr, Device]], routes: Mapping[str, Route]) -> dict[str, int]:
    """Bytes of the stored tensors that are read, whole or in part, per file."""
    sizes: dict[str, int] = {}
    for key, expr, _ in entries:
        if routes[key] == "map":
            continue
        for read in (expr,) if type(expr) is Read else leaves(expr):
            if type(read) is Read:
                path = read.file.path
                sizes[path] = sizes.get(path, 0) + read.spec.nbytes
    return sizes


def _past_the_cache(path: str, size: int, machine: Machine) -> bool:
    found = machine.storage.get(path, _UNKNOWN)
    if not found.direct or size < LARGE:
        return False
    # A file that does not fit beside what the cache must keep would push itself out of it while it is read.
    crowded = machine.available is not None and size > machine.available // 2 and found.cached < HOT
    return found.cached < COLD or crowded


def _out_of_the_cache(path: str, machine: Machine) -> bool:
    found = machine.storage.get(path, _UNKNOWN)
    return found.mappable and found.cached >= HOT
