"""One call's work: open files, what is computed at once, and what is still to be read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from operator import itemgetter
from typing import TYPE_CHECKING, Final, NamedTuple, cast

import torch

from funcmodel.core.lowering import as_box, byte_runs, joins, lowered, stored
from funcmodel.core.shapes import spec_of
from funcmodel.errors import PlanError, ShapeError
from funcmodel.plan.routing import BUFFER, FEW, PINNED, SMALL
from funcmodel.records.dtypes import DType
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
from funcmodel.records.routes import Route, Routing
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.boxes import Box, box_of, chunks, distinct, parts, ranges, scattered, whole, widened
from funcmodel.run.checks import LiveTensors, function
from funcmodel.run.engine import Piece, Source, jobs, perform, plain_file, read_plain
from funcmodel.run.memory import memory, tensor_at
from funcmodel.run.moves import move_box, part, placed
from funcmodel.run.tensors import byte_view, tensor_spec, torch_dtype, torch_shape

if TYPE_CHECKING:
    from funcmodel.run.buffers import Part
    from funcmodel.run.lanes import Lane
    from funcmodel.run.mapped import Held
    from funcmodel.run.passages import Passage
    from funcmodel.run.ring import Ring

_PIECE: Final = 256 << 20  # bytes that are computed out of a mapping between two looks at its lease


class _Boxed(NamedTuple):
    """A box of a stored tensor, where it goes, what happens to it on the way, and whether it is many small runs."""

    read: Read
    shape: tuple[int, ...]
    kind: torch.dtype
    box: Box
    to: torch.Tensor
    casts: tuple[DType, ...]
    small: bool


class Evaluator:
    """Open files, live tensors, and what is still to be read; belongs to one call, so threads share nothing.

    `write` does at once what needs no file, and notes the rest; `finish` reads it all, in the order of the files.
    """

    def __init__(self, files: Mapping[FileRef, Source], live: LiveTensors, routes: Routing) -> None:
        self.files = files
        self.live = live
        self._routes = routes
        self._mapped, self._sliced = frozenset(routes.mapped), frozenset(routes.sliced)
        self._pieces: dict[Source, list[Piece]] = {}
        self._boxes: list[_Boxed] = []
        self._parts: list[Part] = []
        self._passing: dict[torch.device, list[Passage]] = {}
        self._lanes: dict[torch.device, Lane] = {}
        self._rings: list[Ring] = []
        self._still: Held | None = None

    def mapped(self, wanted: Sequence[tuple[str, Expr]]) -> dict[str, torch.Tensor]:
        """Tensors that are pages of their files; those that read the same bytes are pages of two mappings."""
        found: dict[str, torch.Tensor] = {}
        if not wanted:
            return found
        from funcmodel.run.mapped import Mappings

        mappings: dict[int, Mappings] = {}
        standing: list[tuple[int, int, str, TensorSpec, Mappings]] = []
        for key, expr in wanted:
            read = stored(expr)
            if read is None or not read.spec.nbytes:
                spec = spec_of(expr)
                found[key] = torch.empty(torch_shape(spec), dtype=torch_dtype(spec.dtype), device="cpu")
                continue
            spec, start = read.spec, read.offset
            pages = mappings.get(id(read.file))
            if pages is None:
                file = plain_file(self.files[read.file])
                if file is None:
                    raise PlanError(f"{read.file.path} is decoded while it is read and cannot be mapped", keys=(key,))
                pages = mappings[id(read.file)] = Mappings(file)
            standing.append((start, start + spec.nbytes, key, spec, pages))
        standing.sort(key=itemgetter(0, 1))
        for start, stop, key, spec, pages in standing:
            where = pages.apart(start, stop)
            found[key] = tensor_at(where, start, torch_dtype(spec.dtype), torch_shape(spec))
        return found

    def staged(self, wanted: Sequence[tuple[str, Expr]], device: torch.device) -> dict[str, torch.Tensor]:
        """Tensors on a device, through the ring; what `finish` has yet to read is not in them."""
        from funcmodel.run.passages import Span
        from funcmodel.run.slabs import homes

        order = {ref: i for i, ref in enumerate(self.files)}
        # What is small lies on the device as it lies in the file, so that it takes one copy.
        standing = {key: read for key, expr in wanted if (read := stored(expr)) is not None}
        ordered = sorted(standing, key=lambda key: (order[standing[key].file], standing[key].offset))
        made = [(key, spec_of(expr)) for key, expr in wanted if key not in standing]
        found = homes([*((key, standing[key].spec) for key in ordered), *made], device)
        device = found[wanted[0][0]].tensor.device  # which has an index, where one can have one
        passing = self._passing.setdefault(device, [])
        for key, expr in wanted:
            home, read = found[key], standing.get(key)
            if read is None:
                self.write(expr, home.tensor, staged=True)
            elif home.tensor.numel():
                nbytes = read.spec.nbytes
                passing.append(Span(self.files[read.file], read.offset, nbytes, home.flat, home.at, padded=True))
        return {key: home.tensor for key, home in found.items()}

    def batch(self, batch: Sequence[tuple[str, Expr]]) -> dict[str, torch.Tensor]:
        """Tensors of one batch of `_batches`; what `finish` has yet to read is not in them."""
        if len(batch) == 1 and (type(batch[0][1]) is Cast or stored(batch[0][1]) is None):
            key, expr = batch[0]
            return {key: self._begun(expr)}
        reads = {key: stored(expr.of if type(expr) is Cast else expr) for key, expr in batch}
        routes: dict[str, Route] = {key: "slab" if len(batch) > 1 else "read" for key, _ in batch}
        found = read_plain(cast(dict[str, Read], reads), self.files, routes, self._routes.threads)
        for key, expr in batch:
            if type(expr) is Cast:
                found[key] = found[key].to(torch_dtype(expr.dtype))
        return found

    def tensor(self, expr: Expr, through: torch.device | None = None) -> torch.Tensor:
        """A fresh contiguous tensor, complete: on the CPU, or through the ring on a device."""
        inner = Evaluator(self.files, self.live, self._routes)
        if through is None:
            result = inner._begun(expr)
        else:
            inner._lanes, inner._rings = self._lanes, [self._ring()]
            result = inner.staged([("", expr)], through)[""]
        inner.finish()
        return result

    def _begun(self, expr: Expr) -> torch.Tensor:
        """A fresh contiguous CPU tensor; what it takes from files comes with `finish`."""
        spec = spec_of(expr)
        shape, kind = torch_shape(spec), torch_dtype(spec.dtype)
        if spec.nbytes < SMALL:
            result = torch.empty(shape, dtype=kind, device="cpu")
        else:
            result = tensor_at(memory(spec.nbytes), 0, kind, shape)
        self.write(expr, result)
        return result

    def finish(self) -> None:
        """Read what was noted."""
        pieces, self._pieces = self._pieces, {}
        boxes, self._boxes = self._boxes, []
        if boxes:
            self._compute(boxes)
        parts, self._parts = self._parts, []
        for found in pieces.values():
            found.sort(key=itemgetter(0))
        perform((job for source, found in pieces.items() for job in jobs(source, found)), self._routes.threads)
        if parts:
            from funcmodel.run.buffers import pass_through

            routes = self._routes
            pass_through(parts, threads=routes.threads, buffers=routes.buffers, nbytes=routes.buffer or BUFFER)
        passing, self._passing = self._passing, {}
        if any(passing.values()):
            still, self._still = self._still, None
            try:
                self._ring().run({self._lane(device): items for device, items in passing.items()})
            finally:
                if still is not None:
                    still.release()

    def _ring(self) -> "Ring":
        from funcmodel.run.ring import ring_of

        if not self._rings:
            self._rings.append(ring_of(self._routes))
        return self._rings[0]

    def _lane(self, device: torch.device) -> "Lane":
        from funcmodel.run.lanes import lane_to

        found = self._lanes.get(device)
        if found is None:
            found = self._lanes[device] = lane_to(device)
        return found

    def write(self, expr: Expr, to: torch.Tensor, casts: tuple[DType, ...] = (), *, staged: bool = False) -> None:
        """Write `expr`, cast by `casts` one after the other, into a tensor of its shape.

        Args:
            expr: what to write.
            to: where.
            casts: what happens to it on the way.
            staged: whether everything that is read passes through the ring, as all must that goes to another device.
        """
        plain = not casts and not staged and to.is_contiguous()
        if plain and (read := stored(expr)) is not None:
            self._note(read, byte_view(to))
            return
        if not joins(expr):
            if to.numel():
                self._write_chain(expr, to, casts, staged)
            return
        written = 0
        spec = spec_of(expr)
        flat: memoryview | None = None
        for copy in lowered(expr):
            if plain and spec.dtype.pack == 1 and (read := stored(copy.of)) is not None:
                place = byte_runs(spec.shape, spec.dtype.bits, as_box(copy.to))
                if len(place) == 1:
                    flat = byte_view(to) if flat is None else flat
                    self._note(read, flat[place.start : place.start + place.nbytes])
                    written += read.spec.numel
                    continue
            destination = part(to, copy.to, spec)
            self._write_chain(copy.of, destination, casts, staged)
            written += destination.numel()
        if written != to.numel():
            raise PlanError(f"the copies of {type(expr).__name__} write {written} of {to.numel()} elements")

    def _note(self, read: Read, where: memoryview) -> None:
        """Note what is to be read to one place."""
        if where:
            self._pieces.setdefault(self.files[read.file], []).append((read.offset, where))

    def _write_chain(self, expr: Expr, to: torch.Tensor, casts: tuple[DType, ...], staged: bool) -> None:
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
        self._write_leaf(leaf, box, to, casts, staged)

    def _write_leaf(self, leaf: Expr, box: Box, to: torch.Tensor, casts: tuple[DType, ...], staged: bool) -> None:
        match leaf:
            case Read():
                self._write_read(leaf, box, to, casts, staged)
            case Live():
                move_box(self.live[leaf.key].detach(), box, to, casts)
            case Full():
                from funcmodel.run.draws import write_full

                write_full(leaf, to, casts)
            case Noise():
                from funcmodel.run.draws import write_noise

                write_noise(leaf, box, to, casts)
            case Reshape(of):
                inner = torch_shape(spec_of(of))
                if box == whole(torch_shape(spec_of(leaf))) and to.is_contiguous():
                    self.write(of, to.view(inner), casts, staged=staged)
                else:
                    made = self.tensor(of, self._place(leaf, to, casts, staged))
                    move_box(made.view(torch_shape(spec_of(leaf))), box, to, casts)
            case Call():
                move_box(self._called(leaf), box, to, casts)
            case _:
                move_box(self.tensor(leaf, self._place(leaf, to, casts, staged)), box, to, casts)

    def _place(self, leaf: Expr, to: torch.Tensor, casts: tuple[DType, ...], staged: bool) -> torch.device | None:
        """Where to compute what cannot be read where it is wanted: there, if what follows gives the CPU's bits."""
        if not staged:
            return None
        from funcmodel.run.passages import exact

        return to.device if to.is_cpu or exact(spec_of(leaf).dtype, casts) else None

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

    def _write_read(self, read: Read, box: Box, to: torch.Tensor, casts: tuple[DType, ...], staged: bool) -> None:
        shape, kind = torch_shape(read.spec), torch_dtype(read.spec.dtype)
        if staged:
            from funcmodel.run.passages import passages

            most, cells = self._routes.buffer or PINNED, self._lane(to.device).cells
            small = scattered(shape, kind.itemsize, box)
            source, held = self._source(read, small=small), self._held_for(read, box) if small else None
            waiting = self._passing.setdefault(to.device, [])
            waiting += passages(source, read.offset, shape, kind, box, to, casts, most=most, cells=cells, held=held)
            return
        boxed = _Boxed(read, shape, kind, box, to, casts, scattered(shape, kind.itemsize, box))
        mapped = read.file.path in (self._sliced if boxed.small else self._mapped) and not read.offset % kind.itemsize
        if casts or not to.is_contiguous() or (mapped and boxed.small):
            in_place = False
        else:
            in_place = widened(shape, kind.itemsize, box) == box
        if in_place:
            if to.numel():
                pieces = self._pieces.setdefault(self._source(read, small=boxed.small), [])
                pieces.extend(_into(byte_view(to), read.offset, ranges(shape, kind.itemsize, box)))
        elif mapped:
            self._boxes.append(boxed)
        else:
            self._pass(boxed)

    def _source(self, read: Read, *, small: bool) -> Source:
        """Where it is read; past the page cache a small run would be a block, so many of them go through it."""
        source = self.files[read.file]
        return plain_file(source) or source if small else source

    def _held_for(self, read: Read, box: Box) -> "Held | None":
        """The mapping to take a box of many small runs out of, if its file can be held still."""
        file = plain_file(self.files[read.file])
        if file is None or read.file.path not in self._sliced or prod(map(len, distinct(box))) > FEW:
            return None
        from funcmodel.run.mapped import Held

        still = self._still = self._still or Held()
        return still if still.bytes_of(file) is not None else None

    def _pass(self, boxed: "_Boxed") -> None:
        """Note what is to pass through the buffers."""
        from funcmodel.run.buffers import Part

        read, shape, kind, box, to, casts, small = boxed
        source = self._source(read, small=small)
        self._parts += [
            Part(source, read.offset, shape, kind, box_part, wide, placed(to, place), casts)
            for box_part, wide, place in chunks(shape, kind.itemsize, box)
        ]

    def _compute(self, boxes: "list[_Boxed]") -> None:
        """Take boxes out of the mappings of their files, without a copy in between, while nobody can change these.

        What cannot be taken passes through the buffers, also where a part of it was taken already.
        """
        from funcmodel.run.mapped import held

        with held() as files:
            for boxed in boxes:
                read, shape, kind, box, to, casts, _ = boxed
                file = plain_file(self.files[read.file])
                for chunk, place in parts(kind.itemsize, box, _PIECE):
                    pages = None if file is None else files.bytes_of(file)
                    if pages is None:
                        self._pass(boxed)
                        break
                    move_box(tensor_at(pages, read.offset, kind, shape), chunk, placed(to, place), casts)


def _into(where: memoryview, base: int, runs: Iterable[tuple[int, int]]) -> Iterator[Piece]:
    at = 0
    for first, size in runs:
        yield base + first, where[at : at + size]
        at += size
