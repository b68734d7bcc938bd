"""Copies from memory to memory: bits where the dtype stays, numbers where it is cast."""

from collections.abc import Sequence
from itertools import accumulate, product
from math import prod
from typing import Final

import numpy as np
import torch

from funcmodel.errors import PlanError
from funcmodel.records.dtypes import DType
from funcmodel.records.expressions import At
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.boxes import Box, Place, counts, indices, packed, parts, whole
from funcmodel.run.tensors import torch_dtype

_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def move(source: torch.Tensor, to: torch.Tensor, casts: Sequence[DType] = ()) -> None:
    """Copy through `casts`, one after the other; without casts the bits are copied, not the numbers."""
    if casts:
        for kind in casts[:-1]:
            source = source.to(torch_dtype(kind))
        to.copy_(source)
        return
    if not to.is_contiguous():  # torch has a fast transposition, into contiguous memory only
        order = sorted(range(to.ndim), key=to.stride, reverse=True)
        to, source = to.permute(order), source.permute(order)
    bits = _BITS.get(to.dtype.itemsize)
    if bits is None or source.is_conj() or source.is_neg():
        to.copy_(source)
    else:  # copy_ turns a bool of 2 into 1, and does not know packed types
        to.view(bits).copy_(source.view(bits))


def move_box(source: torch.Tensor, box: Box, to: torch.Tensor, casts: Sequence[DType] = ()) -> None:
    """Copy a box of a tensor in memory, of whichever device; temporaries stay within a few chunks.

    From one device to another what the CPU holds is cast there, so the bits are the CPU's.
    """
    everything = whole(source.shape)
    near = source.device == to.device
    if near and len(casts) < 2 and all(len(runs) == 1 for runs in box):
        move(picked(source, box, everything), to, casts)
        return
    size = max(source.element_size(), *(kind.bits // 8 for kind in casts), 1)
    for part, place in parts(size, box):
        piece = picked(source, part, everything)
        if near:
            move(piece, placed(to, place), casts)
        else:
            _carry(piece, placed(to, place), casts)


def cut(source: memoryview, start: int, shape: Sequence[int], itemsize: int, box: Box, to: memoryview) -> None:
    """Copy the bytes of a box, in row-major order, in this thread alone.

    Args:
        source: bytes, among them those of a row-major tensor.
        start: its first byte.
        shape: its shape.
        itemsize: bytes of an element.
        box: what is copied.
        to: as many bytes as that has.
    """
    kind = np.dtype(f"V{itemsize}")
    stored = np.frombuffer(source, kind, prod(shape), start).reshape(shape)
    wanted = np.frombuffer(to, kind).reshape(counts(box))
    ends = [[*accumulate(length for _, length in runs)] for runs in box]
    for chosen in product(*(range(len(runs)) for runs in box)):
        here = tuple(slice(runs[i][0], sum(runs[i])) for i, runs in zip(chosen, box, strict=True))
        there = tuple(slice(last[i] - runs[i][1], last[i]) for i, runs, last in zip(chosen, box, ends, strict=True))
        np.copyto(wanted[there], stored[here])


def _carry(source: torch.Tensor, to: torch.Tensor, casts: Sequence[DType]) -> None:
    """As `move`, between devices; a contiguous copy of the source is made."""
    if source.is_cpu:
        for kind in casts:
            source = source.to(torch_dtype(kind))
        casts = ()
    bits = _BITS.get(source.dtype.itemsize)
    if bits is None or source.is_conj() or source.is_neg():
        source = source.contiguous().to(to.device)
    else:
        source = source.view(bits).contiguous().to(to.device).view(source.dtype)
    move(source, to, casts)


def picked(source: torch.Tensor, box: Box, given: Box) -> torch.Tensor:
    """The box `box` of a stored tensor, out of `source`, which is the box `given` of it."""
    for axis, (runs, held) in enumerate(zip(box, given, strict=True)):
        if runs == held:
            continue
        if len(runs) == len(held) == 1:
            source = source.narrow(axis, runs[0][0] - held[0][0], runs[0][1])
            continue
        if len(held) == 1:
            rows = [i - held[0][0] for i in indices(runs)]
        else:
            position = {i: at for at, i in enumerate(indices(held))}
            rows = [position[i] for i in indices(runs)]
        source = _selected(source, axis, torch.tensor(rows, dtype=torch.int64, device=source.device))
    return source


def _selected(source: torch.Tensor, axis: int, rows: torch.Tensor) -> torch.Tensor:
    bits = _BITS.get(source.dtype.itemsize)
    if bits is None or source.is_conj() or source.is_neg():
        return source.index_select(axis, rows)
    return source.view(bits).index_select(axis, rows).view(source.dtype)


def placed(to: torch.Tensor, place: Place) -> torch.Tensor:
    """The part of a destination that starts, on each axis, at `place[axis][0]` and is `place[axis][1]` long."""
    for axis, (start, size) in enumerate(place):
        if size != to.shape[axis]:
            to = to.narrow(axis, start, size)
    return to


def part(to: torch.Tensor, at: At, spec: TensorSpec) -> torch.Tensor:
    """The part of a destination of `spec` that one lowered copy writes.

    Raises:
        PlanError: elements of a packed type that do not fill whole bytes.
    """
    axis, last = 0, len(at) - 1
    for i, of in enumerate(at):
        if isinstance(of, int):
            if i == last:
                packed(1, spec)
            to = to.select(axis, of)
            continue
        start, stop = (packed(of[0], spec), packed(of[1], spec)) if i == last else of
        if stop - start != to.shape[axis]:
            to = to.narrow(axis, start, stop - start)
        axis += 1
    return to


def constant(spec: TensorSpec, value: complex) -> torch.Tensor:
    """A 0-dim tensor.

    Raises:
        PlanError: the dtype cannot hold the value.
    """
    try:
        return torch.full((), value, dtype=torch_dtype(spec.dtype), device="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise PlanError(f"{value!r} is no {spec.dtype.name}: {error}") from error
