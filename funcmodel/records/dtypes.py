"""`DType`: an element type, with its exact width and every spelling of its name."""

from types import MappingProxyType
from typing import Any, Final, Literal

from attrs import frozen

Kind = Literal["float", "int", "bool", "complex"]


@frozen(eq=False, repr=False, kw_only=True)
class DType:
    """One element type. There is one object per type, so `is`, `==` and hash agree.

    Attributes:
        name: torch's name without `torch.`; for types torch lacks, the safetensors name in lower case.
        bits: exact width of one element in bits (4 for `F4`, of which two share a byte).
        kind: what the numbers are; a change of kind is never made silently.
        torch: the name in torch, or None where torch cannot hold it.
        safetensors: the name in a safetensors header, or None where the format lacks it.
        precision: significand bits including the hidden one (floats), value bits (ints).
        signed: whether negative values exist.
        largest: the largest finite value.
        tiniest: the smallest positive value (1 for ints).
        pack: how many elements one torch element holds (2 for `float4_e2m1fn_x2`).
    """

    name: str
    bits: int
    kind: Kind
    torch: str | None
    safetensors: str | None
    precision: int
    signed: bool = True
    largest: float
    tiniest: float = 1.0
    pack: int = 1

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> Any:
        return dtype, (self.name,)


def _float(name: str, bits: int, st: str | None, precision: int, largest: float, tiniest: float, **more: Any) -> DType:
    fields: dict[str, Any] = {"torch": name, **more}
    return DType(
        name=name,
        bits=bits,
        kind="float",
        safetensors=st,
        precision=precision,
        largest=largest,
        tiniest=tiniest,
        **fields,
    )


def _int(name: str, bits: int, st: str, signed: bool) -> DType:
    value_bits = bits - signed
    return DType(
        name=name,
        bits=bits,
        kind="int",
        torch=name,
        safetensors=st,
        precision=value_bits,
        signed=signed,
        largest=float(2**value_bits - 1),
    )


def _complex(name: str, bits: int, st: str | None, part: DType) -> DType:
    return DType(
        name=name,
        bits=bits,
        kind="complex",
        torch=name,
        safetensors=st,
        precision=part.precision,
        largest=part.largest,
        tiniest=part.tiniest,
    )


BOOL: Final = DType(
    name="bool", bits=8, kind="bool", torch="bool", safetensors="BOOL", precision=1, signed=False, largest=1.0
)
UINT8: Final = _int("uint8", 8, "U8", False)
INT8: Final = _int("int8", 8, "I8", True)
UINT16: Final = _int("uint16", 16, "U16", False)
INT16: Final = _int("int16", 16, "I16", True)
UINT32: Final = _int("uint32", 32, "U32", False)
INT32: Final = _int("int32", 32, "I32", True)
UINT64: Final = _int("uint64", 64, "U64", False)
INT64: Final = _int("int64", 64, "I64", True)
FLOAT4: Final = _float("float4_e2m1fn_x2", 4, "F4", 2, 6.0, 0.5, pack=2)
FLOAT6_E2M3: Final = _float("f6_e2m3", 6, "F6_E2M3", 4, 7.5, 2.0**-3, torch=None)
FLOAT6_E3M2: Final = _float("f6_e3m2", 6, "F6_E3M2", 3, 28.0, 2.0**-4, torch=None)
FLOAT8_E4M3: Final = _float("float8_e4m3fn", 8, "F8_E4M3", 4, 448.0, 2.0**-9)
FLOAT8_E4M3_FNUZ: Final = _float("float8_e4m3fnuz", 8, "F8_E4M3FNUZ", 4, 240.0, 2.0**-10)
FLOAT8_E5M2: Final = _float("float8_e5m2", 8, "F8_E5M2", 3, 57344.0, 2.0**-16)
FLOAT8_E5M2_FNUZ: Final = _float("float8_e5m2fnuz", 8, "F8_E5M2FNUZ", 3, 57344.0, 2.0**-17)
FLOAT8_E8M0: Final = _float("float8_e8m0fnu", 8, "F8_E8M0", 1, 2.0**127, 2.0**-127, signed=False)
FLOAT16: Final = _float("float16", 16, "F16", 11, 65504.0, 2.0**-24)
BFLOAT16: Final = _float("bfloat16", 16, "BF16", 8, 255.0 * 2.0**120, 2.0**-133)
FLOAT32: Final = _float("float32", 32, "F32", 24, (2.0**24 - 1) * 2.0**104, 2.0**-149)
FLOAT64: Final = _float("float64", 64, "F64", 53, 1.7976931348623157e308, 5e-324)
COMPLEX32: Final = _complex("complex32", 32, None, FLOAT16)
COMPLEX64: Final = _complex("complex64", 64, "C64", FLOAT32)
COMPLEX128: Final = _complex("complex128", 128, None, FLOAT64)

DTYPES: Final[tuple[DType, ...]] = (
    *(BOOL, UINT8, INT8, UINT16, INT16, UINT32, INT32, UINT64, INT64),
    *(FLOAT4, FLOAT6_E2M3, FLOAT6_E3M2),
    *(FLOAT8_E4M3, FLOAT8_E4M3_FNUZ, FLOAT8_E5M2, FLOAT8_E5M2_FNUZ, FLOAT8_E8M0),
    *(FLOAT16, BFLOAT16, FLOAT32, FLOAT64, COMPLEX32, COMPLEX64, COMPLEX128),
)

FROM_SAFETENSORS: Final = MappingProxyType({d.safetensors: d for d in DTYPES if d.safetensors is not None})

_SHORT: Final = {
    **{"half": FLOAT16, "float": FLOAT32, "double": FLOAT64, "fp16": FLOAT16, "bf16": BFLOAT16, "fp32": FLOAT32},
    **{"long": INT64, "int": INT32, "short": INT16, "cfloat": COMPLEX64, "cdouble": COMPLEX128},
}
_BY_SPELLING: Final[dict[str, DType]] = {
    **{d.name: d for d in DTYPES},
    **{f"torch.{d.torch}": d for d in DTYPES if d.torch},
    **FROM_SAFETENSORS,
    **_SHORT,
}


def dtype(value: object) -> DType:
    """The `DType` that a spelling names.

    Args:
        value: a `DType`, a `torch.dtype`, or a name as torch ("bfloat16", "torch.bfloat16"), safetensors ("BF16") or
            config files write it.

    Raises:
        ValueError: no element type has that name; nothing falls back to float32.

    Example:
        >>> dtype("BF16") is dtype("torch.bfloat16") is dtype("bfloat16")
        True
        >>> dtype("F4").bits
        4
    """
    if isinstance(value, DType):
        return value
    found = _BY_SPELLING.get(str(value))
    if found is None:
        raise ValueError(f"unknown dtype {value!r}; known: {', '.join(d.name for d in DTYPES)}")
    return found
