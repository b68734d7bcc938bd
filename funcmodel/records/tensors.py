"""`TensorSpec`: shape and dtype of a tensor that may not exist, and sizes in bytes."""

from collections.abc import Iterable
from functools import lru_cache
from math import prod
from typing import Final

from attrs import field, frozen

from funcmodel.records.dtypes import DType, dtype

_UNITS: Final = {
    **{"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}


def _shape(value: Iterable[int]) -> tuple[int, ...]:
    shape = tuple(map(int, value))
    if shape and min(shape) < 0:
        raise ValueError(f"a dimension is negative: {list(shape)}")
    return shape


@frozen(repr=False)
class TensorSpec:
    """Shape and dtype. The shape counts *elements*: an `F4` tensor of 8 elements has shape (8,) and 4 bytes.

    Attributes:
        shape: sizes of the axes, in elements.
        dtype: the element type.
        nbytes: size in bytes, rounded up to a whole byte; kept, because plans ask 100,000 tensors several times.

    Example:
        >>> s = TensorSpec([4, 8], "bfloat16")
        >>> s, s.numel, s.nbytes
        ([4, 8] bfloat16, 32, 64)
    """

    shape: tuple[int, ...] = field(converter=_shape)
    dtype: DType = field(converter=dtype)
    nbytes: int = field(init=False, eq=False)

    @nbytes.default
    def _(self) -> int:
        return (prod(self.shape) * self.dtype.bits + 7) // 8

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def __repr__(self) -> str:
        return f"{list(self.shape)} {self.dtype.name}"


@lru_cache(maxsize=4096)
def shared_spec(shape: tuple[int, ...], dtype: DType) -> TensorSpec:
    """The spec of a shape and a dtype: the same record each time, since a model has few shapes and many tensors.

    Example:
        >>> from funcmodel.records.dtypes import dtype
        >>> shared_spec((4, 8), dtype("bfloat16")) is shared_spec((4, 8), dtype("bfloat16"))
        True
    """
    return TensorSpec(shape, dtype)


def parse_size(size: int | str) -> int:
    """A size in bytes from a number or text: decimal units (KB, MB, GB, TB) or binary ones (KiB, MiB, GiB, TiB).

    Raises:
        ValueError: not a size, or negative.

    Example:
        >>> parse_size("5GB"), parse_size("1.5 KiB"), parse_size("12"), parse_size(7)
        (5000000000, 1536, 12, 7)
    """
    if isinstance(size, int) and not isinstance(size, bool):
        number, unit = str(size), ""
    else:
        text = str(size).strip()
        number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
        unit = text[len(number) :].strip().upper()
    try:
        nbytes = int(number) * _UNITS[unit] if number.isdigit() else int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"not a size: {size!r}; write bytes as an int, or for example '5GB' or '512MiB'") from None
    if nbytes < 0:
        raise ValueError(f"a size cannot be negative: {size!r}")
    return nbytes


def format_size(nbytes: int) -> str:
    """A size in bytes as text, in decimal units with at most two decimals.

    Example:
        >>> format_size(13_480_000_000), format_size(512), format_size(0)
        ('13.48 GB', '512 B', '0 B')
    """
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"
