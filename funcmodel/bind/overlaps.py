"""Which tensors share memory: the same elements, part of another's elements, or nothing although they interleave."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias

import torch
from attrs import frozen

from funcmodel.errors import PlanError
from funcmodel.records.module import TiedGroup, ViewSpec

Tensors: TypeAlias = Sequence[Any]

_PLAIN: Final = torch.Tensor.__torch_dispatch__  # of tensors that lie in memory of their own


@frozen
class Overlaps:
    """Alias classes, and leaves that are views into others."""

    tied: tuple[TiedGroup, ...]
    views: dict[str, ViewSpec]


def overlaps(keys: Sequence[str], tensors: Sequence[torch.Tensor | None]) -> Overlaps:
    """Alias classes and views among tensors; on meta and without elements only objects count.

    Args:
        keys: names, in the order that decides which key of a class stands first.
        tensors: the tensor of each; None takes no part.

    Raises:
        PlanError: two tensors share elements and neither holds the other, or their dtypes differ.
    """
    objects: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    spans: list[tuple[int, int]] = []
    for position, tensor in enumerate(tensors):
        if tensor is None:
            continue
        first = objects.setdefault(id(tensor), position)
        if first != position:
            groups.setdefault(first, [first]).append(position)
        elif not tensor.is_meta and (pointer := _pointer(tensor)):
            spans.append((pointer, position))
    stored: set[int] = set()
    views: dict[int, ViewSpec] = {}
    for cluster in _clusters(spans, tensors):
        apart: list[int] = []
        for alike in _alike(cluster, tensors):
            apart.append(alike[0])
            if len(alike) > 1:
                stored.add(alike[0])
                groups[alike[0]] = sorted(p for one in alike for p in groups.pop(one, [one]))
        for position, view in _views(apart, keys, tensors):
            views.update(dict.fromkeys(groups.get(position, (position,)), view))
    return Overlaps(
        tuple(
            TiedGroup(tuple(keys[p] for p in groups[first]), "storage" if first in stored else "identity")
            for first in sorted(groups)
        ),
        {keys[p]: views[p] for p in sorted(views)},
    )


def _pointer(tensor: torch.Tensor) -> int:
    """Address of the first element; 0 where there is no memory."""
    if tensor.layout is not torch.strided or type(tensor).__torch_dispatch__ is not _PLAIN or not tensor.numel():
        return 0
    return tensor.data_ptr()


def _clusters(spans: list[tuple[int, int]], tensors: Tensors) -> Iterator[list[int]]:
    """Runs of positions whose address ranges overlap, of at least two, each in order."""
    spans.sort()
    cluster: list[int] = []
    end = 0
    for start, position in spans:
        if start >= end:
            if len(cluster) > 1:
                yield sorted(cluster)
            cluster = []
        cluster.append(position)
        end = max(end, start + _extent(tensors[position]))
    if len(cluster) > 1:
        yield sorted(cluster)


def _alike(cluster: list[int], tensors: Tensors) -> Iterable[list[int]]:
    """The cluster in groups of tensors that cover the same elements in the same way."""
    same: dict[object, list[int]] = {}
    for position in cluster:
        tensor = tensors[position]
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, _lazy(tensor))
        same.setdefault(place, []).append(position)
    return same.values()


def _lazy(tensor: torch.Tensor) -> tuple[bool, bool]:
    """Whether the tensor's values are the conjugates or the negatives of what its memory holds."""
    return tensor.is_conj(), tensor.is_neg()


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _views(apart: list[int], keys: Sequence[str], tensors: Tensors) -> Iterator[tuple[int, ViewSpec]]:
    """The tensors that lie inside a larger one; those that only interleave are independent."""
    bases: list[tuple[str, torch.Tensor, torch.Tensor | None]] = []
    for position in sorted(apart, key=lambda p: (-tensors[p].nbytes, p)):
        key, tensor = keys[position], tensors[position]
        for base_key, base, held in bases:
            shared = _shared(tensor, base, held)
            if shared == "none":
                continue
            offset = tensor.data_ptr() - base.data_ptr()
            other = tensor.dtype != base.dtype or _lazy(tensor) != _lazy(base) or offset % tensor.element_size()
            if shared == "part" or other:
                raise PlanError(
                    f"{key!r} and {base_key!r} share elements and neither is a view of the other of its own dtype; "
                    "give one of them memory of its own",
                    keys=(base_key, key),
                )
            yield position, ViewSpec(base_key, tuple(tensor.stride()), offset // tensor.element_size())
            break
        else:
            bases.append((key, tensor, None if _is_dense(tensor) else _held(tensor)))


def _is_dense(tensor: torch.Tensor) -> bool:
    return _extent(tensor) == tensor.numel() * tensor.element_size()


def _held(tensor: torch.Tensor) -> torch.Tensor:
    """One flag per byte of the tensor's extent: whether the tensor holds it."""
    flags = torch.zeros(_extent(tensor), dtype=torch.bool)
    _bytes_of(tensor, flags, 0).fill_(True)
    return flags


def _bytes_of(tensor: torch.Tensor, flags: torch.Tensor, offset: int) -> torch.Tensor:
    size = tensor.element_size()
    steps = tuple(step * size for step in tensor.stride())
    return flags.as_strided((*tensor.shape, size), (*steps, 1), offset)


def _shared(tensor: torch.Tensor, base: torch.Tensor, held: torch.Tensor | None) -> Literal["none", "part", "all"]:
    """How much of `tensor` lies in `base`; `held` are the bytes of a base that has gaps."""
    offset, extent = tensor.data_ptr() - base.data_ptr(), _extent(tensor)
    if tensor.device != base.device or offset + extent <= 0 or offset >= _extent(base):
        return "none"
    inside = offset >= 0 and offset + extent <= _extent(base)
    if held is None:
        return "all" if inside else "part"
    before, after = max(0, -offset), max(0, offset + extent - len(held))
    flags = _bytes_of(tensor, torch.nn.functional.pad(held, (before, after)), offset + before)
    return "all" if bool(flags.all()) else "part" if bool(flags.any()) else "none"
