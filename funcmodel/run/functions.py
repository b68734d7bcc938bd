"""Functions that plans name in `Call` nodes. Each is pure: tensors in, one new tensor out."""

import torch

# Numbers widened at a time; bounds the extra memory of a function at 8 MiB for each accumulator.
_BLOCK = 1 << 20


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def mean(*tensors: torch.Tensor) -> torch.Tensor:
    """The elementwise mean of tensors of one shape and floating dtype, accumulated in float64.

    Args:
        tensors: at least one, all [*shape].

    Returns:
        A tensor [*shape] of the same dtype. The mean of two equal tensors is that tensor, bit for bit, for finite
        numbers of at most half the range.
    """
    first = tensors[0]
    result = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    flat, sources = result.view(-1), [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat.numel(), _BLOCK):
        block = slice(start, start + _BLOCK)
        total = sources[0][block].to(_wide(first.dtype), copy=True)
        for source in sources[1:]:
            total += source[block].to(total.dtype)
        flat[block] = (total / len(sources)).to(first.dtype)
    return result


def mean_rows(tensor: torch.Tensor, *, rows: int) -> torch.Tensor:
    """`rows` copies of the mean row of a tensor, accumulated in float64.

    Args:
        tensor: [n, *row] of floating dtype, n at least 1.
        rows: how many copies.

    Returns:
        A tensor [rows, *row] of the same dtype.
    """
    row = tensor.shape[1:]
    step = max(1, _BLOCK // max(1, row.numel()))
    total = torch.zeros(row, dtype=_wide(tensor.dtype), device=tensor.device)
    for start in range(0, len(tensor), step):
        total += tensor[start : start + step].to(total.dtype).sum(0)
    return (total / len(tensor)).to(tensor.dtype).expand(rows, *row).contiguous()
