"""Fresh tensors on a device: large ones alone, small ones packed, so that one copy brings many."""

from collections.abc import Iterable
from itertools import accumulate
from operator import mul
from typing import Final

import torch
from attrs import frozen

from funcmodel.plan.routing import SLAB
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.memory import ALIGNED, memory, tensor_at
from funcmodel.run.tensors import torch_dtype, torch_shape

ALONE: Final = 1 << 20  # from here on a tensor has memory of its own
CUDA_ALIGNED: Final = 512  # as the allocator of torch aligns there


@frozen(eq=False)
class Home:
    """A fresh tensor, and where its bytes lie.

    Attributes:
        tensor: contiguous, not initialized. Its version counter is its own, whatever it shares memory with.
        flat: the bytes of the block that it lies in.
        at: its first byte there.
    """

    tensor: torch.Tensor
    flat: torch.Tensor
    at: int


def homes(wanted: Iterable[tuple[str, TensorSpec]], device: torch.device) -> dict[str, Home]:
    """Fresh tensors, those that share a block side by side in the order in which they are given.

    Must be called by the thread, and with the stream, that will use them.

    Raises:
        PlanError: torch has no such dtype.
        NoMemoryError: there is no memory for them on the CPU. On another device torch says so in its own way.
    """
    found: dict[str, Home] = {}
    step = alignment(device)
    members: list[tuple[str, int, torch.dtype, tuple[int, ...]]] = []
    top = 0
    for key, spec in wanted:
        kind, shape, nbytes = torch_dtype(spec.dtype), torch_shape(spec), spec.nbytes
        if nbytes >= ALONE or not nbytes:
            tensor = _alone(shape, kind, nbytes, device)
            found[key] = Home(tensor, flat_bytes(tensor), 0)
            continue
        start = -(-top // step) * step
        if start + nbytes > SLAB:
            _allocate(members, top, device, found)
            members, start = [], 0
        members.append((key, start, kind, shape))
        top = start + nbytes
    _allocate(members, top, device, found)
    return found


def alignment(device: torch.device) -> int:
    """What the first byte of a tensor is a multiple of."""
    return CUDA_ALIGNED if device.type == "cuda" else ALIGNED


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, shared with it."""
    # Not reshape: a dimension of size 1 may have any stride, which a view of other element size refuses.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _alone(shape: tuple[int, ...], kind: torch.dtype, nbytes: int, device: torch.device) -> torch.Tensor:
    if device.type == "cpu" and nbytes:
        return tensor_at(memory(nbytes), 0, kind, shape)
    return torch.empty(shape, dtype=kind, device=device)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(shape[:0:-1], mul, initial=1))[::-1] if shape else ()


def _allocate(
    members: list[tuple[str, int, torch.dtype, tuple[int, ...]]], top: int, device: torch.device, found: dict[str, Home]
) -> None:
    if not members:
        return
    flat = _alone((top,), torch.uint8, top, device)
    storage = flat.untyped_storage()
    for key, start, kind, shape in members:
        tensor = torch.empty(0, dtype=kind, device=device)
        tensor.set_(storage, start // kind.itemsize, shape, _strides(shape))
        found[key] = Home(tensor, flat, start)
