"""What a conversion between two dtypes can do to the numbers."""

from functools import cache
from math import copysign, frexp, isinf, isnan, ldexp
from typing import Final

from funcmodel.records.dtypes import (
    BFLOAT16,
    FLOAT4,
    FLOAT6_E2M3,
    FLOAT6_E3M2,
    FLOAT8_E4M3_FNUZ,
    FLOAT8_E5M2,
    FLOAT8_E5M2_FNUZ,
    FLOAT8_E8M0,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    DType,
)
from funcmodel.records.reports import Loss

INFINITE: Final = frozenset({FLOAT8_E5M2, FLOAT16, BFLOAT16, FLOAT32, FLOAT64})
ONE_ZERO: Final = frozenset({FLOAT8_E4M3_FNUZ, FLOAT8_E5M2_FNUZ})
NO_NAN: Final = frozenset({FLOAT4, FLOAT6_E2M3, FLOAT6_E3M2})
_OWN_PART: Final = {"complex32": FLOAT16, "complex64": FLOAT32, "complex128": FLOAT64}


@cache
def loss(source: DType, target: DType) -> Loss:
    """What converting from `source` to `target` can lose.

    Returns:
        "exact": every value survives, infinities and signed zeros included (a NaN stays a NaN, its payload may not);
        "rounding": values move to a neighbor, at the edges of the range to 0 or infinity;
        "range": values far outside the target's range exist (also negative ones, infinities and zero, where the
        target has none); "kind": the result is of another kind (float, int, bool, complex), except that ints as
        floats are judged by their values.

    Example:
        >>> from funcmodel.records.dtypes import FLOAT32, INT32, INT64
        >>> loss(BFLOAT16, FLOAT32), loss(FLOAT32, BFLOAT16), loss(FLOAT32, FLOAT16), loss(FLOAT32, INT64)
        ('exact', 'rounding', 'range', 'kind')
    """
    if source is target:
        return "exact"
    if source.kind == target.kind == "complex":
        return loss(_OWN_PART[source.name], _OWN_PART[target.name])
    if source.kind == target.kind == "float":
        return _float_loss(source, target)
    if source.kind == target.kind == "int":
        fits = source.largest <= target.largest and (target.signed or not source.signed)
        return "exact" if fits else "range"
    if source.kind == "int" and target.kind == "float":
        if source.largest > target.largest or not target.signed:
            return "range"
        return "exact" if source.precision <= target.precision else "rounding"
    return "kind"


def _float_loss(source: DType, target: DType) -> Loss:
    # The largest values of two types with one largest exponent differ by rounding, as those of float32 and bfloat16.
    if frexp(source.largest)[1] > frexp(target.largest)[1]:
        return "range"
    if (source.signed and not target.signed) or (source in INFINITE and target not in INFINITE):
        return "range"
    # No rule for NaN: every dtype that has one also has values beyond the range of those that have none.
    within = source.precision <= target.precision and source.largest <= target.largest
    # A value is exact in `target` if its last bit is: the smallest positive values bound it from below.
    same_zeros = target not in ONE_ZERO or source in ONE_ZERO or not source.signed
    return "exact" if within and source.tiniest >= target.tiniest and same_zeros else "rounding"


def exact_cast(source: DType, target: DType) -> bool:
    """Whether every value of `source` is a value of `target`.

    Example:
        >>> from funcmodel.records.dtypes import FLOAT32, INT8
        >>> exact_cast(INT8, BFLOAT16), exact_cast(FLOAT32, BFLOAT16)
        (True, False)
    """
    return loss(source, target) == "exact"


def holds(dtype: DType, value: float | int | bool | complex) -> bool:
    """Whether `value` is exactly a value of `dtype`.

    Example:
        >>> from funcmodel.records.dtypes import INT8
        >>> holds(BFLOAT16, 0.5), holds(BFLOAT16, 0.1), holds(INT8, 128), holds(INT8, 3.0)
        (True, False, False, True)
    """
    if dtype.kind == "complex":
        part = _OWN_PART[dtype.name]
        return _float_holds(part, value.real) and _float_holds(part, value.imag)
    if isinstance(value, complex):
        return False
    if dtype.kind == "float":
        return _float_holds(dtype, value)
    if isinstance(value, float) and not value.is_integer():
        return False
    if value == 0 and copysign(1.0, value) < 0:
        return False
    limit = 1 << dtype.precision
    return (-limit if dtype.signed else 0) <= value < limit


def _float_holds(dtype: DType, value: float | int) -> bool:
    if isinstance(value, int):
        if abs(value) > dtype.largest or int(float(value)) != value:
            return False
        value = float(value)
    if isnan(value):
        return dtype not in NO_NAN
    if isinf(value):
        return dtype in INFINITE
    negative = copysign(1.0, value) < 0
    if value == 0:
        return dtype is not FLOAT8_E8M0 and not (negative and dtype in ONE_ZERO)
    if abs(value) > dtype.largest or (negative and not dtype.signed):
        return False
    return (value / max(ldexp(1.0, frexp(value)[1] - dtype.precision), dtype.tiniest)).is_integer()
