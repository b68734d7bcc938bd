"""Fresh memory on the CPU, and tensors on it."""

import mmap
import os
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from types import MappingProxyType
from typing import Final

import numpy as np
import torch

from funcmodel.errors import NoMemoryError

ALIGNED: Final = 64
PAGE: Final = 4096
_PAGES: Final = 64 << 10  # from here on
_HEAP: Final = 4 << 20  # up to here memory is made of pages of its own
# Faults on 4 KiB pages cost more than the copy from the page cache; Linux grants 2 MiB pages where it is asked.
_ADVICE: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)
_HARMLESS: Final = 1 << 30  # less than this is not compared with what the machine has
_SHARED: Final = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
# torch's dtype to numpy's; the types that numpy lacks are carried by integers of their size.
_NATIVE: Final = MappingProxyType({getattr(torch, name): np.dtype(name) for name in _SHARED if hasattr(torch, name)})
_CARRIER: Final = MappingProxyType({size: np.dtype(f"uint{8 * size}") for size in (1, 2, 4, 8)})


def memory(nbytes: int, step: int = ALIGNED) -> memoryview:
    """Fresh writable memory that lives as long as a view of it does; not zeroed.

    Args:
        nbytes: how much.
        step: it starts at a multiple of this, 64 or `PAGE`.

    Raises:
        NoMemoryError: the machine has not so much.
    """
    try:
        if _PAGES <= nbytes <= _HEAP:
            return memoryview(_pages(nbytes))
        # numpy asks for pages of 2 MiB from 4 MiB on, as we do below. It takes from the heap, whose pages a process
        # that loads once more need not fault in again; smaller blocks there would keep the heap from shrinking.
        spare = np.empty(nbytes + step, np.uint8)
    except (MemoryError, ValueError, OSError) as error:
        raise _no_memory(nbytes, None) from error
    start = -spare.__array_interface__["data"][0] % step
    return spare.data[start : start + nbytes]


def _pages(nbytes: int) -> mmap.mmap:
    """Memory that goes back to the system the moment it is let go of."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _ADVICE is not None:
        # Also of less than one huge page: what is mapped one after the other becomes one mapping to the system, which
        # then has room for them. Tensors of 1 MiB are filled in half the time.
        pages.madvise(_ADVICE)
    return pages


def require_memory(nbytes: int) -> None:
    """Refuse what no other program's end could make room for. The system itself may promise it, and kill later.

    Args:
        nbytes: of all tensors that will be alive at once.

    Raises:
        NoMemoryError: it is more than the machine has, or a control group of this process may have.
    """
    if nbytes < _HARMLESS:
        return
    from funcmodel.run.groups import memory_limits

    try:
        has = min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *memory_limits()])
        with open("/proc/meminfo", encoding="ascii") as file:
            has += sum(int(line.split()[1]) << 10 for line in file if line.startswith("SwapTotal:"))
    except (OSError, ValueError, AttributeError):
        return  # this system does not say
    if nbytes > has:
        raise _no_memory(nbytes, has)


def _no_memory(nbytes: int, has: int | None) -> NoMemoryError:
    found = "" if has is None else f", the machine has {has}"
    return NoMemoryError(
        f"{nbytes} bytes of tensors do not fit into memory{found}; take fewer keys, or stream them",
        needed=nbytes,
        available=has,
    )


class Occupied:
    """The memory of some tensors, on every device: what else lies in it?"""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._spans: dict[torch.device, list[tuple[int, int]]] = {}
        for tensor in tensors:
            self._spans.setdefault(tensor.device, []).append(_storage_span(tensor))
        for spans in self._spans.values():
            spans.sort()
            # Each start with the furthest stop of any span up to it, so that one look answers.
            stops = accumulate((stop for _, stop in spans), max)
            spans[:] = [(start, stop) for (start, _), stop in zip(spans, stops, strict=True)]

    def touches(self, tensor: torch.Tensor) -> bool:
        """Whether the storage of a tensor lies, in part, in that of one of them; tensors on meta lie nowhere."""
        spans = self._spans.get(tensor.device)
        if tensor.is_meta or not spans:
            return False
        start, stop = _storage_span(tensor)
        before = bisect_left(spans, (stop, 0))
        return before > 0 and spans[before - 1][1] > start


def _storage_span(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def tensor_at(where: memoryview, start: int, kind: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor on bytes of `where`. Its storage is its own: exact in size, with its own version counter.

    A view of one large tensor would do neither: an in-place change of a neighbor would count as a change of it.
    """
    if 0 in shape:
        return torch.empty(shape, dtype=kind, device="cpu")
    return tensors_at(where, (start,), kind, shape)[0]


def tensors_at(
    where: memoryview, starts: Iterable[int], kind: torch.dtype, shape: tuple[int, ...]
) -> list[torch.Tensor]:
    """As `tensor_at`, several of one dtype and shape, which has elements."""
    if len(shape) == 1:
        return [torch.frombuffer(where, dtype=kind, count=shape[0], offset=start) for start in starts]
    # By numpy, because torch.frombuffer makes one axis only and the view that gives it others costs twice as much.
    made, array = torch.from_numpy, np.ndarray
    native = _NATIVE.get(kind)
    if native is not None:
        return [made(array(shape, native, where, start)) for start in starts]
    carrier = _CARRIER[kind.itemsize]
    return [made(array(shape, carrier, where, start)).view(kind) for start in starts]
