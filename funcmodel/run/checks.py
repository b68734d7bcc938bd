"""What can be checked before the first byte is read."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeAlias, cast

import torch

from funcmodel.core.lowering import nodes
from funcmodel.core.shapes import spec_of
from funcmodel.errors import PlanError, ShapeError, StalePlanError, TruncatedError
from funcmodel.records.expressions import (
    Call,
    Cast,
    Expr,
    FileRef,
    Full,
    Live,
    Noise,
    Read,
)
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.tensors import TORCH_DTYPES, tensor_spec

LiveTensors: TypeAlias = Mapping[str, torch.Tensor]


def check_plan(plan: Mapping[str, Expr], live: LiveTensors) -> list[FileRef]:
    """Refuse a plan that torch, the live tensors or the sizes of its files cannot carry.

    Returns:
        The files that it reads, each once or more often.

    Raises:
        PlanError: torch lacks a dtype, a live tensor is missing, or a `Call` cannot be imported.
        StalePlanError: a live tensor is not what was planned.
        TruncatedError: a stored tensor is planned behind the end of its file.
    """
    refs: dict[int, FileRef] = {}
    for key, expr in plan.items():
        for node in (expr,) if type(expr) is Read else nodes(expr):
            if type(node) is not Read:
                _check_node(key, node, live)
                continue
            spec, file = node.spec, node.file
            if spec.dtype not in TORCH_DTYPES:
                raise _unheld(key, spec)
            if not 0 <= node.offset <= file.nbytes - spec.nbytes:
                raise _behind(key, node)
            refs[id(file)] = file
    return list(refs.values())


def _behind(key: str, read: Read) -> TruncatedError:
    stop = read.offset + read.spec.nbytes
    return TruncatedError(
        f"{key}: {read.name!r} is planned at bytes {read.offset} to {stop} of {read.file.path}, which has "
        f"{read.file.nbytes}; scan the checkpoint again",
        code="DATA_TRUNCATED",
        path=read.file.path,
        expected=stop,
        found=read.file.nbytes,
    )


def _unheld(key: str, spec: TensorSpec) -> PlanError:
    return PlanError(
        f"{key}: torch {torch.__version__} has no dtype for {spec!r}; leave the key out with drop(...)", keys=(key,)
    )


def _check_node(key: str, node: Expr, live: LiveTensors) -> None:
    match node:
        case Live():
            _check_live(key, node, live)
        case Full(spec) | Noise(spec) | Call(_, _, spec):
            if spec.dtype not in TORCH_DTYPES:
                raise _unheld(key, spec)
            if type(node) is Call:
                function(key, node.fn)
            elif spec.dtype.pack > 1:
                raise PlanError(f"{key}: torch cannot compute in {spec.dtype.name}", keys=(key,))
        case Cast(of, dtype):
            if dtype not in TORCH_DTYPES:
                raise _unheld(key, TensorSpec((), dtype))
            if dtype.pack > 1 or spec_of(of).dtype.pack > 1:
                raise PlanError(
                    f"{key}: torch cannot cast {spec_of(of)!r} to {dtype.name}; leave the key as it is", keys=(key,)
                )
        case _:
            pass


def _check_live(key: str, leaf: Live, live: LiveTensors) -> None:
    tensor = live.get(leaf.key)
    if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta" or tensor.layout != torch.strided:
        found = f"a {tensor.layout} tensor on {tensor.device}" if isinstance(tensor, torch.Tensor) else repr(tensor)
        raise PlanError(
            f"{key}: needs a dense tensor with data under the live key {leaf.key!r}, found {found}; pass it in live=",
            keys=(key, leaf.key),
        )
    if tensor_spec(tensor) != leaf.spec:
        raise StalePlanError(
            f"live tensor {leaf.key!r} is {tensor_spec(tensor)!r}, was planned as {leaf.spec!r}; plan again",
            keys=(leaf.key,),
            expected=leaf.spec,
            found=tensor_spec(tensor),
        )


def function(key: str, name: str) -> Callable[..., Any]:
    """The function that a `Call` names.

    Raises:
        PlanError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise PlanError(
            f"{key}: the plan calls {name!r}, which cannot be imported ({error}); write 'pkg.mod:name'", keys=(key,)
        ) from error
    if not callable(found):
        raise PlanError(f"{key}: the plan calls {name!r}, which is no function", keys=(key,))
    return cast(Callable[..., Any], found)


def check_destination(key: str, expr: Expr, destinations: LiveTensors) -> torch.Tensor:
    """The tensor that `fill` may write `expr` to, detached.

    Raises:
        PlanError: there is none, or its elements are not memory of their own.
        ShapeError: its shape or dtype differ.
    """
    tensor = destinations.get(key)
    if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
        raise PlanError(f"{key}: there is no tensor with memory to write to; pass one in destinations", keys=(key,))
    found, expected = tensor_spec(tensor), spec_of(expr)
    if found != expected:
        raise ShapeError(
            f"{key}: the destination is {found!r}, the plan makes {expected!r}", key=key, expected=expected, found=found
        )
    strides = tensor.stride()
    if 0 in strides and any(stride == 0 and size > 1 for stride, size in zip(strides, tensor.shape, strict=True)):
        raise PlanError(f"{key}: elements of the destination share memory; write to its base instead", keys=(key,))
    if tensor.is_conj() or tensor.is_neg():
        raise PlanError(f"{key}: the destination is a lazy conjugate or negative; write to its base", keys=(key,))
    return tensor.detach()
