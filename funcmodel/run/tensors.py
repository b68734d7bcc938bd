"""Between records and torch: dtypes, specs, and the bytes of a tensor."""

from types import MappingProxyType
from typing import Final

import torch

from funcmodel.errors import PlanError
from funcmodel.records.devices import Device
from funcmodel.records.dtypes import DTYPES, DType, dtype
from funcmodel.records.tensors import TensorSpec, shared_spec

# An older torch lacks some dtypes; they are then refused when they are wanted, not when funcmodel is imported.
TORCH_DTYPES: Final = MappingProxyType(
    {d: t for d in DTYPES if d.torch and isinstance(t := getattr(torch, d.torch, None), torch.dtype)}
)
FROM_TORCH: Final = MappingProxyType({t: d for d, t in TORCH_DTYPES.items()})


def torch_dtype(kind: DType) -> torch.dtype:
    """The `torch.dtype` of a `DType`.

    Raises:
        PlanError: this torch cannot hold the type (for example `F6_E2M3`).
    """
    found = TORCH_DTYPES.get(kind)
    if found is None:
        raise PlanError(f"torch {torch.__version__} has no dtype for {kind.name}; leave such keys out with drop(...)")
    return found


def torch_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape that torch gives such a tensor: packed types count whole bytes along the last axis.

    Raises:
        PlanError: the last axis does not fill whole bytes.
    """
    pack = spec.dtype.pack
    if pack == 1:
        return spec.shape
    if not spec.shape or spec.shape[-1] % pack:
        raise PlanError(f"torch packs {pack} elements of {spec.dtype.name} in a byte, so it cannot hold {spec!r}")
    return (*spec.shape[:-1], spec.shape[-1] // pack)


def tensor_spec(tensor: torch.Tensor) -> TensorSpec:
    """Shape (in elements) and dtype of a tensor.

    Raises:
        PlanError: the tensor's dtype has no name here (quantized types of torch, for example).
    """
    kind = FROM_TORCH.get(tensor.dtype)
    if kind is None:
        try:
            kind = dtype(tensor.dtype)
        except ValueError as error:
            raise PlanError(f"no element type stands for {tensor.dtype}") from error
    shape = tuple(tensor.shape)
    return shared_spec(shape if kind.pack == 1 or not shape else (*shape[:-1], shape[-1] * kind.pack), kind)


def torch_device(device: Device) -> torch.device:
    """The `torch.device` of a `Device`."""
    return torch.device(repr(device))


def empty(spec: TensorSpec, device: Device) -> torch.Tensor:
    """An uninitialized contiguous tensor."""
    return torch.empty(torch_shape(spec), dtype=torch_dtype(spec.dtype), device=torch_device(device))


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it, writable.

    Raises:
        ValueError: the tensor is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(
            f"the bytes of a tensor with strides {tensor.stride()} do not lie in order; make it contiguous"
        )
    # Not reshape: a dimension of size 1 may have any stride, which a view of other element size refuses.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
