"""`materialize`, `stream`, `fill`, `evaluate`: expressions become tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, cast

import torch

from funcmodel.core.lowering import lowered
from funcmodel.core.shapes import spec_of
from funcmodel.errors import PlanError, ShapeError
from funcmodel.records.devices import Device
from funcmodel.records.dtypes import FLOAT32, DType
from funcmodel.records.expressions import (
    Call,
    Cast,
    Expr,
    FileRef,
    Full,
    Index,
    Live,
    Noise,
    Permute,
    Read,
    Reshape,
    Take,
)
from funcmodel.run.boxes import CHUNK, Box, box_of, chunks, counts, ranges, whole, widened
from funcmodel.run.checks import LiveTensors, check_destination, check_plan, function, has_call
from funcmodel.run.engine import (
    SLAB,
    SMALL,
    Piece,
    Source,
    jobs,
    memory,
    opened,
    perform,
    read_plain,
    require_memory,
    tensor_at,
)
from funcmodel.run.files import Digest
from funcmodel.run.formats import FORMATS, Format
from funcmodel.run.moves import constant, move, move_box, part, picked, placed
from funcmodel.run.tensors import byte_view, tensor_spec, torch_dtype, torch_shape


def materialize(
    plan: Mapping[str, Expr],
    *,
    device: str | torch.device | Device = "cpu",
    live: LiveTensors | None = None,
    formats: tuple[Format, ...] = FORMATS,
    digest: Digest = "ignore",
) -> dict[str, torch.Tensor]:
    """The tensors of a plan.

    Each owns its bytes: none is a view of a file, of a live tensor or of another. Tensors under 64 KiB may lie side by
    side in one block of at most 4 MiB, which is freed with the last of them. Peak memory is the result, 16 MiB of
    scratch, and what an opaque node (`Call`, `Noise`, a `Reshape` that cannot be read in place) needs while it runs.

    Args:
        plan: key to expression.
        device: where the tensors go.
        live: the tensors that `Live` leaves name.
        formats: the formats that files may have.
        digest: "check" first hashes every stored tensor of which the plan reads anything, and compares it with the
            digest that is recorded of it.

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
    if target.type != "cpu":
        return dict(stream(plan, device=target, live=live, formats=formats, digest=digest))
    require_memory(_held(plan))
    result: dict[str, Any] = dict.fromkeys(plan)
    plain = [(key, expr) for key, expr in plan.items() if type(expr) is Read]
    others = [(key, expr) for key, expr in plan.items() if type(expr) is not Read]
    with _evaluator(plan, live, formats, digest) as at:
        result.update(read_plain(plain, at.files))
        del plain
        for batch in _batches(others):
            result.update(at.batch(batch))
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

    Holds one tensor and about 20 MiB of buffers. Let go of each tensor before asking for the next (`del tensor`), or
    two are alive at once. Files are opened, all of them, when the first tensor is asked for, and checked once more
    after the last one; only an iteration that ends without an error is known to have seen one state of every file.

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
    with _evaluator(plan, live, formats, digest) as at:
        for batch in _batches(plan.items()):
            tensors = at.batch(batch)
            for key, _ in batch:
                yield key, tensors.pop(key) if target.type == "cpu" else tensors.pop(key).to(target)


def fill(
    plan: Mapping[str, Expr],
    destinations: LiveTensors,
    *,
    live: LiveTensors | None = None,
    formats: tuple[Format, ...] = FORMATS,
    digest: Digest = "ignore",
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

    Raises:
        ShapeError: a destination has another shape or dtype than its expression.
        PlanError: a destination is missing, on meta, or expanded; or as `materialize`.
        StalePlanError, ChangedError, DigestError, CheckpointError: as `materialize`.
    """
    into = {key: check_destination(key, expr, destinations) for key, expr in plan.items()}
    taken = {t.untyped_storage().data_ptr() for t in into.values()}
    source = {
        key: t.detach().clone() if t.device.type != "meta" and t.untyped_storage().data_ptr() in taken else t
        for key, t in (live or {}).items()
        if isinstance(t, torch.Tensor)
    }
    with _evaluator(plan, source, formats, digest) as at:
        early = {key: at.tensor(expr) for key, expr in plan.items() if type(expr) is not Read and has_call(expr)}
        work: dict[FileRef, list[Piece]] = {}
        for key, expr in plan.items():
            to = into[key]
            if type(expr) is Read and to.device.type == "cpu" and to.is_contiguous() and to.numel():
                work.setdefault(expr.file, []).append((expr.offset, byte_view(to)))
            elif key in early or to.device.type != "cpu":
                move(early.pop(key) if key in early else at.tensor(expr), to)
            else:
                at.write(expr, to)
        for pieces in work.values():
            pieces.sort(key=lambda piece: piece[0])
        perform(job for ref, pieces in work.items() for job in jobs(at.files[ref], pieces))
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
    plan: Mapping[str, Expr], live: LiveTensors | None, formats: tuple[Format, ...], digest: Digest
) -> "Iterator[_Evaluator]":
    """Check everything that can be checked without reading, open every file, and check them again at the end."""
    given = live or {}
    refs = check_plan(plan, given)
    with opened(refs, formats, plan.values(), digest) as files:
        yield _Evaluator(files, given)


def _held(plan: Mapping[str, Expr]) -> int:
    """Bytes of all tensors of a plan. The specs of stored tensors are shared, and computing their sizes is not free."""
    sizes: dict[int, int] = {}
    total = 0
    for expr in plan.values():
        if type(expr) is not Read:
            total += spec_of(expr).nbytes
            continue
        size = sizes.get(id(expr.spec))
        if size is None:
            size = sizes[id(expr.spec)] = expr.spec.nbytes
        total += size
    return total


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
        read = expr.of if type(expr) is Cast else expr
        nbytes = read.spec.nbytes if type(read) is Read else SMALL
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


# -- one expression into one destination -------------------------------------------------------------------------------


class _Evaluator:
    """Open files, live tensors, and a scratch buffer; belongs to one call, so threads share nothing."""

    def __init__(self, files: Mapping[FileRef, Source], live: LiveTensors) -> None:
        self.files = files
        self.live = live
        self._scratch = memoryview(b"")

    def batch(self, batch: Sequence[tuple[str, Expr]]) -> dict[str, torch.Tensor]:
        """Tensors of one batch of `_batches`."""
        if len(batch) == 1 and type(batch[0][1]) is not Read:
            return {batch[0][0]: self.tensor(batch[0][1])}
        reads = [(key, expr.of if type(expr) is Cast else expr) for key, expr in batch]
        found = read_plain(cast(list[tuple[str, Read]], reads), self.files)
        for key, expr in batch:
            if type(expr) is Cast:
                found[key] = found[key].to(torch_dtype(expr.dtype))
        return found

    def tensor(self, expr: Expr) -> torch.Tensor:
        """A fresh contiguous CPU tensor."""
        spec = spec_of(expr)
        shape, kind = torch_shape(spec), torch_dtype(spec.dtype)
        if spec.nbytes < SMALL:
            result = torch.empty(shape, dtype=kind, device="cpu")
        else:
            result = tensor_at(memory(spec.nbytes), 0, kind, shape)
        self.write(expr, result)
        return result

    def write(self, expr: Expr, to: torch.Tensor, casts: tuple[DType, ...] = ()) -> None:
        """Write `expr`, cast by `casts` one after the other, into a CPU tensor of its shape."""
        written = 0
        spec = spec_of(expr)
        for copy in lowered(expr):
            destination = part(to, copy.to, spec)
            self._write_chain(copy.of, destination, casts)
            written += destination.numel()
        if written != to.numel():
            raise PlanError(f"the copies of {type(expr).__name__} write {written} of {to.numel()} elements")

    def _write_chain(self, expr: Expr, to: torch.Tensor, casts: tuple[DType, ...]) -> None:
        """A chain without joins: casts are collected, permutations and picks move to the destination's side."""
        picks: list[tuple[int, ...] | None] = [None] * to.ndim
        while True:
            match expr:
                case Cast(of, dtype):
                    casts = (dtype, *casts)
                case Permute(of, dims):
                    if spec_of(of).dtype.pack > 1 and dims[-1] != len(dims) - 1:
                        raise PlanError(f"{spec_of(of)!r} packs elements along its last axis, which cannot be moved")
                    order = sorted(range(len(dims)), key=dims.__getitem__)
                    to = to.permute(order)
                    picks = [picks[i] for i in order]
                case Take(of, dim, indices):
                    old = picks[dim]
                    picks[dim] = indices if old is None else tuple(indices[i] for i in old)
                case _:
                    break
            expr = of
        leaf = expr.of if type(expr) is Index else expr
        spec = spec_of(leaf)
        at = expr.at if type(expr) is Index else tuple((0, n) for n in spec.shape)
        box = box_of(spec, at, picks)
        for axis, chosen in enumerate(at):
            if isinstance(chosen, int):
                to = to.unsqueeze(axis)
        self._write_leaf(leaf, box, to, casts)

    def _write_leaf(self, leaf: Expr, box: Box, to: torch.Tensor, casts: tuple[DType, ...]) -> None:
        match leaf:
            case Read():
                self._write_read(leaf, box, to, casts)
            case Live():
                move_box(self.live[leaf.key].detach().cpu(), box, to, casts)
            case Full(spec, value):
                move(constant(spec, value).expand(to.shape), to, casts)
            case Noise(spec, mean, std, seed):
                casts = casts if spec.dtype is FLOAT32 else (spec.dtype, *casts)
                generator = torch.Generator("cpu").manual_seed(seed)
                if not casts and box == whole(spec.shape) and to.is_contiguous():
                    to.normal_(mean, std, generator=generator)
                else:
                    draw = torch.empty(spec.shape, dtype=torch.float32, device="cpu")
                    move_box(draw.normal_(mean, std, generator=generator), box, to, casts)
            case Reshape(of):
                inner = torch_shape(spec_of(of))
                if box == whole(torch_shape(spec_of(leaf))) and to.is_contiguous():
                    self.write(of, to.view(inner), casts)
                else:
                    move_box(self.tensor(of).view(torch_shape(spec_of(leaf))), box, to, casts)
            case Call():
                move_box(self._called(leaf), box, to, casts)
            case _:
                move_box(self.tensor(leaf), box, to, casts)

    def _called(self, call: Call) -> torch.Tensor:
        args = [self.tensor(arg) for arg in call.args]
        with torch.no_grad():
            result = function(call.fn, call.fn)(*args, **call.static)
        if not isinstance(result, torch.Tensor) or result.device.type == "meta" or tensor_spec(result) != call.spec:
            found = tensor_spec(result) if isinstance(result, torch.Tensor) else type(result).__name__
            raise ShapeError(
                f"{call.fn} returned {found!r}, the plan declares {call.spec!r}; correct one of the two",
                key=call.fn,
                expected=call.spec,
                found=found,
            )
        return result.detach().cpu()

    def _write_read(self, read: Read, box: Box, to: torch.Tensor, casts: tuple[DType, ...]) -> None:
        shape, kind = torch_shape(read.spec), torch_dtype(read.spec.dtype)
        file = self.files[read.file]
        if not casts and to.is_contiguous() and widened(shape, kind.itemsize, box) == box:
            if to.numel():
                perform(jobs(file, _into(byte_view(to), read.offset, ranges(shape, kind.itemsize, box))))
            return
        for box_part, wide, place in chunks(shape, kind.itemsize, box):
            size = counts(wide)
            nbytes = prod(size) * kind.itemsize
            if len(self._scratch) < nbytes:
                self._scratch = memory(nbytes if nbytes < SMALL else max(nbytes, CHUNK))
            scratch = self._scratch[:nbytes]
            perform(jobs(file, _into(scratch, read.offset, ranges(shape, kind.itemsize, wide))))
            source = tensor_at(scratch, 0, kind, size)
            move(picked(source, box_part, wide), placed(to, place), casts)


def _into(where: memoryview, base: int, runs: Iterable[tuple[int, int]]) -> Iterator[Piece]:
    at = 0
    for first, size in runs:
        yield base + first, where[at : at + size]
        at += size
