"""Values that no file holds, constants and noise, written where they are wanted: on a device without a copy here."""

from typing import Final

import torch

from funcmodel.records.dtypes import FLOAT32, DType
from funcmodel.records.expressions import Full, Noise
from funcmodel.run.boxes import Box, whole
from funcmodel.run.moves import constant, move, move_box
from funcmodel.run.tensors import torch_dtype

# Numbers that are drawn at a time. A multiple of 16: torch draws so many at once, so parts are the parts of the whole.
_DRAWN: Final = 1 << 20


def write_full(leaf: Full, to: torch.Tensor, casts: tuple[DType, ...]) -> None:
    """Fill a tensor with a constant, which is cast on the CPU."""
    value = constant(leaf.spec, leaf.value)
    if to.is_cpu:
        move(value.expand(to.shape), to, casts)
        return
    for kind in casts:
        value = value.to(torch_dtype(kind))
    move(value.to(to.device).expand(to.shape), to)


def write_noise(leaf: Noise, box: Box, to: torch.Tensor, casts: tuple[DType, ...]) -> None:
    """Draw a tensor on the CPU and write a box of it: every device gets the same bits."""
    spec = leaf.spec
    casts = casts if spec.dtype is FLOAT32 else (spec.dtype, *casts)
    generator = torch.Generator("cpu").manual_seed(leaf.seed)
    everything = box == whole(spec.shape) and to.is_contiguous()
    if everything and not casts and to.is_cpu:
        to.normal_(leaf.mean, leaf.std, generator=generator)
    elif everything and to.numel() >= 2 * _DRAWN:
        _write_parts(leaf, to.view(-1), casts, generator)
    else:
        draw = torch.empty(spec.shape, dtype=torch.float32, device="cpu")
        move_box(draw.normal_(leaf.mean, leaf.std, generator=generator), box, to, casts)


def _write_parts(leaf: Noise, to: torch.Tensor, casts: tuple[DType, ...], generator: torch.Generator) -> None:
    starts = range(0, to.numel() - _DRAWN, _DRAWN)  # the last part is the larger one: fewer than 16 are drawn otherwise
    for start in starts:
        stop = start + _DRAWN if start != starts[-1] else to.numel()
        draw = torch.empty(stop - start, dtype=torch.float32, device="cpu")
        draw.normal_(leaf.mean, leaf.std, generator=generator)
        move_box(draw, whole(draw.shape), to[start:stop], casts)
