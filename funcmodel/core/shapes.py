"""Expression to `TensorSpec`: every shape and dtype is known before anything is read."""

from typing import assert_never

from funcmodel.records.dtypes import DType
from funcmodel.records.expressions import (
    At,
    Call,
    Cast,
    Concat,
    Expr,
    Full,
    Index,
    Live,
    Noise,
    Permute,
    Read,
    Reshape,
    Stack,
    Take,
)
from funcmodel.records.tensors import TensorSpec, shared_spec


def spec_of(expr: Expr) -> TensorSpec:
    """Shape and dtype of the tensor that `expr` stands for.

    Args:
        expr: any expression whose parts fit, as the constructors of `core.build` guarantee.

    Returns:
        the spec; for a leaf and a `Call` the very record that it holds.

    Example:
        >>> from funcmodel.records.expressions import Cast, Live, Stack
        >>> x = Live("x", TensorSpec([2, 3], "float32"))
        >>> spec_of(Cast(Stack((x, x), 1), "bfloat16"))
        [2, 2, 3] bfloat16
    """
    if expr.__class__ is Read or expr.__class__ is Live or isinstance(expr, Full | Noise | Call):
        return expr.spec
    return shared_spec(tuple(shape_of(expr)), dtype_of(expr))


def nbytes_of(expr: Expr) -> int:
    """Bytes of the tensor that `expr` stands for.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> nbytes_of(Live("x", TensorSpec([4, 3], "float32")))
        48
    """
    return expr.spec.nbytes if type(expr) is Read else spec_of(expr).nbytes


def shape_of(expr: Expr) -> tuple[int, ...]:
    """Shape of the tensor that `expr` stands for, without making a spec.

    Example:
        >>> from funcmodel.records.expressions import Index, Live
        >>> shape_of(Index(Live("x", TensorSpec([4, 3], "float32")), (2, (0, 2))))
        (2,)
    """
    if expr.__class__ is Read:  # by far the most frequent; a class test costs a tenth of a match
        return expr.spec.shape
    if expr.__class__ is Index:
        return selected(expr.at)
    match expr:
        case Read() | Live() | Full() | Noise() | Call():
            return expr.spec.shape
        case Index(_, at):
            return selected(at)
        case Cast(of):
            return shape_of(of)
        case Permute(of, dims):
            shape = shape_of(of)
            return tuple([shape[d] for d in dims])
        case Take(of, dim, indices):
            shape = shape_of(of)
            return (*shape[:dim], len(indices), *shape[dim + 1 :])
        case Reshape(_, shape):
            return shape
        case Concat(parts, dim):
            shape = shape_of(parts[0])
            return (*shape[:dim], sum([shape_of(p)[dim] for p in parts]), *shape[dim + 1 :])
        case Stack(parts, dim):
            shape = shape_of(parts[0])
            return (*shape[:dim], len(parts), *shape[dim:])
    assert_never(expr)


def dtype_of(expr: Expr) -> DType:
    """Dtype of the tensor that `expr` stands for, without making a spec.

    Example:
        >>> from funcmodel.records.expressions import Cast, Live
        >>> dtype_of(Cast(Live("x", TensorSpec([4, 3], "float32")), "F16"))
        float16
    """
    if expr.__class__ is Read:
        return expr.spec.dtype
    match expr:
        case Read() | Live() | Full() | Noise() | Call():
            return expr.spec.dtype
        case Cast(_, dtype):
            return dtype
        case Index(of) | Permute(of) | Take(of) | Reshape(of):
            return dtype_of(of)
        case Concat(parts) | Stack(parts):
            return dtype_of(parts[0])
    assert_never(expr)


def selected(at: At) -> tuple[int, ...]:
    """Shape that the slicing `at` leaves.

    Example:
        >>> selected((3, (2, 5), (0, 4)))
        (3, 4)
    """
    return tuple([a[1] - a[0] for a in at if a.__class__ is tuple])
