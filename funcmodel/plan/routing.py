"""Which way every tensor of a plan takes from its file: a pure choice, from the plan, sizes, and what a probe found."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Final, Literal, TypeAlias

from attrs import evolve

from funcmodel.core.limits import check_choice
from funcmodel.core.lowering import byte_runs, reads, stored
from funcmodel.core.shapes import nbytes_of
from funcmodel.core.templates import Matcher, template
from funcmodel.errors import PlanError
from funcmodel.records.actions import Assign
from funcmodel.records.devices import CPU, Device, device
from funcmodel.records.expressions import Cast, Expr, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.plans import LoadPlan
from funcmodel.records.routes import ROUTES, Into, Machine, Memory, Route, Routing, Storage

Wanted: TypeAlias = Route | Mapping[str, Route] | None

SMALL: Final = 64 << 10  # smaller tensors share a slab
SLAB: Final = 4 << 20  # which is at most this large
GAP: Final = 4 << 10  # so much between two of them is read with them: a disk reads it anyway, a call takes longer
BUFFER: Final = 4 << 20  # one of the buffers through which passes what cannot be read in place
PINNED: Final = 8 << 20  # one of those on the way to a device
SPAN: Final = 8 << 20  # what each thread that reads past the page cache has to itself, at most
BUFFERS: Final = 64 << 20  # all of these together, but for those on the way to a device
BLOCK: Final = 4096  # past the page cache places, sizes and addresses are multiples of it, on every device in use
PAGEABLE: Final = 256 << 20  # of less, none of those is pinned
FEW_PINNED: Final = 4  # up to MANY bytes so many are
MANY: Final = 1_500_000_000  # and from there on two for each thread
LARGE: Final = 32 << 20  # a file of which less is wanted is read through the page cache, cold or not
FEW: Final = 64  # up to so many runs are read one by one, byte for byte
CALLS: Final = 4  # and up to so many, a call for each costs no more than to take them out of a mapping
SCATTERED: Final = 64 << 10  # bytes of a run from which on a call for it costs next to nothing
NEAR: Final = 8 << 10  # runs less than this apart are on pages that a disk reads together
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
        elif (read := stored(expr)) is None:
            routes[key] = "transform"
        elif not fresh:
            routes[key] = "read"
        else:
            routes[key] = "slab" if read.spec.nbytes < SMALL else "read"
    if route is not None:
        _overrule(routes, entries, machine, fresh, route)
    return _with_buffers(routes, entries, machine, into)


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
    read = stored(expr)
    if read is None:
        return "it is not stored as it is wanted"
    if route == "slab" and read.spec.nbytes > SLAB:
        return f"it has {read.spec.nbytes} bytes, a slab at most {SLAB}"
    return ""


def _unmappable(expr: Expr, machine: Machine) -> str:
    read = stored(expr)
    if read is None:
        return "it is not stored as it is wanted"
    if not machine.storage.get(read.file.path, _UNKNOWN).mappable:
        return f"{read.file.path} is compressed, not probed, or on a file system that does not map reliably"
    if read.offset % max(1, read.spec.dtype.bits // 8):
        return f"it starts at byte {read.offset} of its file, between two elements"
    return ""


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


def _with_buffers(
    routes: dict[str, Route], entries: list[tuple[str, Expr, Device]], machine: Machine, into: Into
) -> Routing:
    kinds = set(routes.values())
    changed = not kinds.isdisjoint(("transform", "stage"))
    mapped: tuple[str, ...] = ()
    sliced: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()
    if changed or any(found.direct and found.cached < HOT for found in machine.storage.values()):
        sizes, scattered = _read_sizes(entries, routes)
        direct = _past_the_cache(sizes, machine)
        if "transform" in kinds:
            mapped = tuple(sorted(path for path in {*sizes}.difference(direct) if _out_of_the_cache(path, machine)))
        if changed:
            sliced = tuple(sorted(path for path, far in scattered.items() if _mapped_for_slices(path, far, machine)))
    threads = max(DISK, machine.threads) if direct else machine.threads
    buffers, size, pinned = 0, BUFFER, False
    if "stage" in kinds:
        staged = [(nbytes_of(expr), home.type) for key, expr, home in entries if routes[key] == "stage"]
        size = BUFFER if all(kind == "cpu" for _, kind in staged) else PINNED
        buffers, pinned = staging(sum(nbytes for nbytes, kind in staged if kind == "cuda"), threads)
    elif "transform" in kinds:
        buffers = threads + 2  # one that is being used, and one that waits
    left = max(BUFFERS - buffers * size, BUFFERS // 4) // threads
    return Routing(
        routes=FrozenMap(routes),
        mapped=mapped,
        sliced=sliced,
        direct=direct,
        threads=threads,
        buffers=buffers,
        buffer=size if buffers else 0,
        pinned=pinned,
        span=min(SPAN, max(left // BLOCK, 1) * BLOCK) if direct else 0,
        into=into,
    )


def span_of(routes: Routing) -> int:
    """Bytes that each thread has for itself to read past the page cache, where anything is read past it.

    Example:
        >>> span_of(Routing(direct=("m.safetensors",))), span_of(Routing(direct=("m.safetensors",), span=4096))
        (8388608, 4096)
    """
    return (routes.span or SPAN) if routes.direct else 0


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


def _read_sizes(
    entries: Iterable[tuple[str, Expr, Device]], routes: Mapping[str, Route]
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that are read per file; and where many small runs are, how many more of them lie far apart than near."""
    sizes: dict[str, int] = {}
    scattered: dict[str, int] = {}
    for key, expr, _ in entries:
        if routes[key] == "map":
            continue
        source = expr.of if type(expr) is Cast else expr
        if type(source) is Read:
            sizes[source.file.path] = sizes.get(source.file.path, 0) + source.spec.nbytes
            continue
        for read, box in reads(expr):
            path, spec = read.file.path, read.spec
            sizes[path] = sizes.get(path, 0) + prod(stop - start for start, stop in box) * spec.dtype.bits // 8
            if spec.dtype.bits >= 8:
                runs = byte_runs(spec.shape, spec.dtype.bits, box)
                if len(runs) > CALLS and runs.nbytes < SCATTERED:
                    far = len(runs) if runs.strides[-1] > NEAR else -len(runs)
                    scattered[path] = scattered.get(path, 0) + far
    return sizes, scattered


def _past_the_cache(sizes: Mapping[str, int], machine: Machine) -> tuple[str, ...]:
    storage = {path: machine.storage.get(path, _UNKNOWN) for path in sizes}
    # Files that do not fit beside what the cache must keep would push themselves out of it while they are read.
    wanted = sum(size for path, size in sizes.items() if storage[path].cached < HOT)
    crowded = machine.available is not None and wanted > machine.available // 2
    return tuple(
        sorted(
            path
            for path, found in storage.items()
            if found.direct and sizes[path] >= LARGE and found.cached < (HOT if crowded else COLD)
        )
    )


def _mapped_for_slices(path: str, far: int, machine: Machine) -> bool:
    found = machine.storage.get(path, _UNKNOWN)
    # Out of a mapping a disk would bring all that lies between, too.
    return found.mappable and (found.cached >= HOT or far < 0)


def _out_of_the_cache(path: str, machine: Machine) -> bool:
    found = machine.storage.get(path, _UNKNOWN)
    return found.mappable and found.cached >= HOT
