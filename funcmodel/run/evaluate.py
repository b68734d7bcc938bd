"""`materialize`, `stream`, `fill`, `evaluate`: expressions become tensors."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from funcmodel.core.lowering import has_call, leaves, stored
from funcmodel.core.shapes import nbytes_of
from funcmodel.errors import PlanError
from funcmodel.plan.routing import GAP, LARGE, SLAB, SMALL, Wanted, routing
from funcmodel.records.devices import Device
from funcmodel.records.expressions import (
    Cast,
    Expr,
    FileRef,
    Read,
)
from funcmodel.records.routes import Memory, Routing
from funcmodel.run.boxes import whole
from funcmodel.run.checks import LiveTensors, check_destination, check_plan
from funcmodel.run.engine import opened, read_plain
from funcmodel.run.evaluator import Evaluator
from funcmodel.run.files import Digest
from funcmodel.run.formats import FORMATS, Format
from funcmodel.run.memory import Occupied, require_memory
from funcmodel.run.moves import move_box


def materialize(
    plan: Mapping[str, Expr],
    *,
    device: str | torch.device | Device = "cpu",
    live: LiveTensors | None = None,
    formats: tuple[Format, ...] = FORMATS,
    digest: Digest = "ignore",
    memory: Memory = "own",
    route: Wanted = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a plan.

    Each owns its bytes: none is a view of a live tensor or of another, nor of a file unless that is asked for. Tensors
    under 64 KiB, on a GPU under 1 MiB, may lie side by side in one block of at most 4 MiB, which is freed with the last
    of them. Peak memory is the result, the buffers that `routing` names, and what an opaque node (`Call`, `Noise`, a
    `Reshape` that cannot be read in place) needs while it runs. On a GPU it is the result and, where something is cast
    or turned there, for each thread one buffer and what is made of it.

    A GPU has the bits of the CPU, but for the payload of a NaN that is cast. What the current stream is given next
    finds the tensors complete; they are not waited for.

    Args:
        plan: key to expression.
        device: where the tensors go.
        live: the tensors that `Live` leaves name.
        formats: the formats that files may have.
        digest: "check" first hashes every stored tensor of which the plan reads anything, and compares it with the
            digest that is recorded of it.
        memory: "borrow" maps what stands in its file as it is wanted, instead of reading it. Such a tensor may be
            written to, which changes no file; but a file that another process overwrites changes it, and one that is
            cut short ends this process. Saves of funcmodel never do either.
        route: how tensors are read, instead of how `routing` would choose; see there.

    Returns:
        Key to tensor, in plan order.

    Raises:
        PlanError: torch lacks a dtype that is wanted, a live tensor is missing, or a `Call` cannot be imported.
        StalePlanError: a file or a live tensor is not what was planned.
        ChangedError: a file changed while it was read.
        DigestError: a stored tensor is not what was recorded, or nothing is recorded of it; `.findings` has them all.
        CheckpointError: a file cannot be read.
        NoMemoryError: the machine can never hold the result.
    """
    target = _torch_device(device)
    return materialize_routed(plan, _probed(plan, formats, target, memory, route), target, live, formats, digest)


def materialize_routed(
    plan: Mapping[str, Expr],
    routes: Routing,
    device: torch.device | Mapping[str, torch.device],
    live: LiveTensors | None,
    formats: tuple[Format, ...],
    digest: Digest,
) -> dict[str, torch.Tensor]:
    """`materialize`, by routes that were chosen before; `routes` may know of more keys than the plan has.

    Several devices are filled side by side.
    """
    result: dict[str, Any] = dict.fromkeys(plan)
    way = dict(routes.routes.items())  # which is faster to ask, up to 100,000 times
    homes = device if isinstance(device, Mapping) else None
    home = torch.device("cpu") if isinstance(device, Mapping) else device
    near = home.type == "cpu"
    held = 0
    plain: dict[str, Read] = {}
    parts: dict[str, Read] = {}
    mapped: list[tuple[str, Expr]] = []
    staged: dict[torch.device, list[tuple[str, Expr]]] = {}
    others: list[tuple[str, Expr]] = []
    for key, expr in plan.items():
        taken = way[key]
        if homes is not None:
            home = homes[key]
            near = home.type == "cpu"
        if near and type(expr) is Read and (taken == "slab" or taken == "read"):
            plain[key] = expr
            held += expr.spec.nbytes
            continue
        if taken == "map":
            mapped.append((key, expr))
            continue
        if near and (taken == "slab" or taken == "read") and (read := stored(expr)) is not None:
            parts[key] = read
            held += read.spec.nbytes
            continue
        if near:
            held += nbytes_of(expr)
        if taken == "stage" or not near:
            staged.setdefault(home, []).append((key, expr))
        else:
            others.append((key, expr))
    require_memory(held)
    with _evaluator(plan, live, formats, digest, routes) as at:
        result.update(at.mapped(mapped))
        result.update(read_plain(plain, at.files, way, routes.threads, GAP))
        result.update(read_plain(parts, at.files, way, routes.threads))  # of which nothing beside them is read
        del plain, parts
        for home, entries in staged.items():
            result.update(at.staged(entries, home))
        for batch in _batches(others):
            result.update(at.batch(batch))
        at.finish()
    return result


def stream(
    plan: Mapping[str, Expr],
    *,
    device: str | torch.device | Device = "cpu",
    live: LiveTensors | None = None,
    formats: tuple[Format, ...] = FORMATS,
    digest: Digest = "ignore",
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a plan, one after the other, in plan order.

    Holds one tensor and the buffers that `routing` names. Let go of each tensor before asking for the next (`del
    tensor`), or two are alive at once. Files are opened, all of them, when the first tensor is asked for, and checked
    once more after the last one; only an iteration that ends without an error is known to have seen one state of every
    file.

    Args:
        plan: key to expression.
        device: where the tensors go.
        live: the tensors that `Live` leaves name.
        formats: the formats that files may have.
        digest: as in `materialize`; everything is compared before the first tensor is made.

    Yields:
        Key and tensor, as `materialize` would give it.

    Raises:
        PlanError, StalePlanError, ChangedError, DigestError, CheckpointError: as `materialize`.
    """
    target = _torch_device(device)
    routes = _probed(plan, formats, target, "own", None)
    with _evaluator(plan, live, formats, digest, routes) as at:
        for batch in _batches(plan.items()):
            tensors = at.batch(batch) if target.type == "cpu" else at.staged(batch, target)
            at.finish()
            for key, _ in batch:
                yield key, tensors.pop(key)


def fill(
    plan: Mapping[str, Expr],
    destinations: LiveTensors,
    *,
    live: LiveTensors | None = None,
    formats: tuple[Format, ...] = FORMATS,
    digest: Digest = "ignore",
    route: Wanted = None,
) -> None:
    """Write the tensors of a plan into existing ones, of any strides and on any device.

    Every file is opened and every destination checked before the first byte is written. Live tensors that share
    memory with a destination are copied first, and `Call` nodes run first, so that no value depends on the order.

    Args:
        plan: key to expression.
        destinations: key to the tensor that is overwritten, one for each key of the plan.
        live: the tensors that `Live` leaves name.
        formats: the formats that files may have.
        digest: as in `materialize`; everything is compared before the first byte is written.
        route: as in `materialize`; a tensor that exists can be the target of "read", "transform" and "stage".

    Raises:
        ShapeError: a destination has another shape or dtype than its expression.
        PlanError: a destination is missing, on meta, or expanded; or as `materialize`.
        StalePlanError, ChangedError, DigestError, CheckpointError: as `materialize`.
    """
    fill_routed(plan, None, destinations, live, formats, digest, route)


def fill_routed(
    plan: Mapping[str, Expr],
    routes: Routing | None,
    destinations: LiveTensors,
    live: LiveTensors | None,
    formats: tuple[Format, ...],
    digest: Digest,
    route: Wanted = None,
) -> None:
    """`fill`, by routes that were chosen before; None chooses them now."""
    into = {key: check_destination(key, expr, destinations) for key, expr in plan.items()}
    if routes is None:
        homes = {tensor.device for tensor in into.values()}
        on = homes.pop() if len(homes) == 1 else {key: str(tensor.device) for key, tensor in into.items()}
        routes = _probed(plan, formats, on, "own", route, into="existing")
    tensors = {key: t for key, t in (live or {}).items() if isinstance(t, torch.Tensor)}
    taken = Occupied(into.values()) if tensors else None
    source = {key: t.detach().clone() if taken and taken.touches(t) else t for key, t in tensors.items()}
    with _evaluator(plan, source, formats, digest, routes) as at:
        early = {key: at.tensor(expr) for key, expr in plan.items() if has_call(expr)}
        for key, expr in plan.items():
            to = into[key]
            if key in early:
                done = early.pop(key)
                move_box(done, whole(done.shape), to)
            else:
                at.write(expr, to, staged=to.device.type != "cpu" or routes.routes[key] == "stage")
        at.finish()
    for tensor in into.values():
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def evaluate(
    expr: Expr,
    live: LiveTensors | None = None,
    *,
    formats: tuple[Format, ...] = FORMATS,
    digest: Digest = "ignore",
) -> torch.Tensor:
    """The tensor that one expression stands for, on the CPU. See `materialize`."""
    return materialize({"": expr}, live=live, formats=formats, digest=digest)[""]


# -- before the first byte ---------------------------------------------------------------------------------------------


@contextmanager
def _evaluator(
    plan: Mapping[str, Expr], live: LiveTensors | None, formats: tuple[Format, ...], digest: Digest, routes: Routing
) -> "Iterator[Evaluator]":
    """Check everything that can be checked without reading, open every file, and check them again at the end."""
    given = live or {}
    refs = check_plan(plan, given)
    with opened(refs, formats, plan.values(), digest, routes) as files:
        yield Evaluator(files, given, routes)


def _probed(
    plan: Mapping[str, Expr],
    formats: tuple[Format, ...],
    device: torch.device | Mapping[str, str],
    memory: Memory,
    route: Wanted,
    into: Literal["fresh", "existing"] = "fresh",
) -> Routing:
    """The routes of a plan on this machine."""
    from funcmodel.run.machine import machine

    found = machine(stored_files(plan.values()), formats=formats, **how_to_look(plan.values(), memory, route))
    on = str(device) if isinstance(device, torch.device) else device
    return routing(plan, found, on=on, into=into, memory=memory, route=route)


def how_to_look(exprs: Iterable[Expr], memory: Memory, route: Wanted) -> dict[str, Any]:
    """The arguments for `machine` of who wants it for these routes."""
    asked = memory == "borrow" or route is not None
    everything_maps = memory == "borrow" and route is None and all(type(expr) is Read for expr in exprs)
    return {"smallest": 0 if asked else LARGE, "look": "at file systems" if everything_maps else "at everything"}


def stored_files(exprs: Iterable[Expr]) -> list[FileRef]:
    """The files that expressions read, each once."""
    exprs = [*exprs]
    refs = {id(expr.file): expr.file for expr in exprs if type(expr) is Read}
    for expr in exprs:
        if type(expr) is not Read:
            refs.update((id(leaf.file), leaf.file) for leaf in leaves(expr) if isinstance(leaf, Read))
    return list(dict.fromkeys(refs.values()))


def _torch_device(device: str | torch.device | Device) -> torch.device:
    target = torch.device(repr(device) if isinstance(device, Device) else device)
    if target.type == "meta":
        raise PlanError("a tensor on meta has no value; name a device that holds bytes")
    return target


def _batches(plan: Iterable[tuple[str, Expr]]) -> Iterator[list[tuple[str, Expr]]]:
    """Consecutive small tensors together, up to 4 MiB; every other one alone."""
    batch: list[tuple[str, Expr]] = []
    size = 0
    for key, expr in plan:
        read = stored(expr.of if type(expr) is Cast else expr)
        nbytes = SMALL if read is None else read.spec.nbytes
        if nbytes >= SMALL:
            if batch:
                yield batch
            yield [(key, expr)]
            batch, size = [], 0
            continue
        if size + nbytes > SLAB:
            yield batch
            batch, size = [], 0
        batch.append((key, expr))
        size += nbytes
    if batch:
        yield batch
