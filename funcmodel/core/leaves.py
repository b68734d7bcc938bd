"""Smart constructors of leaves, and of `Call`, the escape hatch. Public through `core.build`."""

from collections.abc import Callable, Iterable, Sequence
from operator import index as as_int
from typing import Any

from funcmodel.core.casts import holds
from funcmodel.errors import PlanError, ShapeError
from funcmodel.records.expressions import Call, Expr, FileRef, Full, Live, Noise, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec


def read(file: FileRef, name: str, spec: TensorSpec, offset: int) -> Read:
    """A stored tensor: `spec.nbytes` bytes at `offset` of `file`.

    Args:
        file: the file, one shared record for all of its tensors.
        name: the tensor's name in the file.
        spec: shape and dtype as stored.
        offset: first byte, from the start of the file.

    Raises:
        ShapeError: the bytes do not lie within the file, or the elements do not fill whole bytes.

    Example:
        >>> read(FileRef("a.safetensors", "safetensors", 208, ""), "x", TensorSpec([4, 8], "float32"), 80).offset
        80
    """
    if offset < 0 or offset + spec.nbytes > file.nbytes:
        raise ShapeError(
            f"{name} in {file.path}: {spec.nbytes} bytes at {offset} do not lie within the file's {file.nbytes} bytes",
            expected=file.nbytes,
            found=offset + spec.nbytes,
        )
    return Read(file, name, whole_bytes(spec), offset)


def whole_bytes(spec: TensorSpec) -> TensorSpec:
    """`spec`, if its elements fill whole bytes, as those of every tensor in a file or in memory do.

    Raises:
        ShapeError: they do not.

    Example:
        >>> whole_bytes(TensorSpec([2], "F4"))
        [2] float4_e2m1fn_x2
    """
    if spec.dtype.bits % 8 and spec.numel * spec.dtype.bits % 8:
        raise ShapeError(f"{spec!r} does not end on a whole byte; nothing can hold such a tensor", found=spec)
    return spec


def live(key: str, spec: TensorSpec) -> Live:
    """A tensor in memory, supplied under `key` when the plan is applied.

    Raises:
        ShapeError: the elements do not fill whole bytes.

    Example:
        >>> live("x", TensorSpec([4, 8], "float32"))
        Live(key='x', spec=[4, 8] float32)
    """
    return Live(key, whole_bytes(spec))


def full(spec: TensorSpec, value: float | int | bool | complex) -> Full:
    """A constant tensor.

    Args:
        spec: shape and dtype.
        value: a number of the dtype's kind; a float may be rounded to the dtype, anything else must fit exactly.

    Raises:
        ShapeError: the dtype cannot stand for the value.

    Example:
        >>> full(TensorSpec([2], "bfloat16"), 1).value
        1.0
        >>> full(TensorSpec([2], "int8"), 128)
        Traceback (most recent call last):
            ...
        funcmodel.errors.ShapeError: 128 is no value of int8; choose another value or dtype
    """
    rounds = spec.dtype.kind in ("float", "complex") and (
        spec.dtype.kind == "complex" or not isinstance(value, complex)
    )
    if not rounds and not holds(spec.dtype, value):
        raise ShapeError(f"{value!r} is no value of {spec.dtype.name}; choose another value or dtype", found=value)
    return constant(spec, value)


def noise(spec: TensorSpec, *, mean: float = 0.0, std: float = 1.0, seed: int = 0) -> Noise:
    """A normal draw by a generator of its own.

    Args:
        spec: shape and dtype, a floating-point one.
        mean: of the distribution.
        std: its standard deviation, not negative.
        seed: of the draw; equal expressions are equal tensors.

    Raises:
        ShapeError: the dtype is not a floating-point one, or `std` is negative.

    Example:
        >>> noise(TensorSpec([2, 2], "float16"), std=0.02, seed=1).std
        0.02
    """
    if spec.dtype.kind != "float" or not std >= 0:
        raise ShapeError(
            f"noise of {spec!r} with standard deviation {std}: expected a floating-point dtype and no negative "
            "deviation",
            found=spec,
        )
    return Noise(spec, float(mean), float(std), as_int(seed))


def constant(spec: TensorSpec, value: float | int | bool | complex) -> Full:
    """A constant whose value has the Python type of its dtype's kind.

    Example:
        >>> constant(TensorSpec([2], "float32"), 1).value
        1.0
    """
    match spec.dtype.kind:
        case "float":
            assert not isinstance(value, complex)
            value = float(value)
        case "int":
            assert not isinstance(value, complex)
            value = int(value)
        case "bool":
            value = bool(value)
        case "complex":
            value = complex(value)
    return Full(spec, value)


def call(
    fn: str | Callable[..., Any],
    args: Iterable[Expr],
    spec: TensorSpec,
    **static: str | int | float | bool | Sequence[int] | None,
) -> Call:
    """The result of a function that has no node of its own.

    Args:
        fn: a module-level function or its name as "pkg.mod:name"; called with one tensor per argument and `static` as
            keywords, when the plan is applied.
        args: the expressions of its tensor arguments.
        spec: shape and dtype of its result, which are checked when the plan is applied.
        **static: further arguments; they are part of the plan, so they are plain values.

    Raises:
        PlanError: `fn` is not at module level, so that its name would not find it.
        ShapeError: the elements of the result do not fill whole bytes.

    Example:
        >>> spec = TensorSpec([2], "float32")
        >>> call("torch:neg", [live("x", spec)], spec).fn
        'torch:neg'
    """
    name = fn if isinstance(fn, str) else f"{fn.__module__}:{fn.__qualname__}"
    module, colon, attribute = name.partition(":")
    if not colon or not all(p.isidentifier() for p in module.split(".")) or not attribute.isidentifier():
        raise PlanError(
            f"{name!r} names no module-level function; write 'pkg.mod:name' or pass such a function", fn=name
        )
    fixed = {k: tuple(v) if isinstance(v, list) else v for k, v in static.items()}
    return Call(name, tuple(args), whole_bytes(spec), FrozenMap(fixed))
