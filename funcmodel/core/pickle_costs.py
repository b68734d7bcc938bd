"""What the values of a pickle cost in memory, and which of them it will need again."""

import re
from typing import Any, Final

# What CPython 3.11 to 3.14 allocates, at most, in bytes: with the header of the collector, and space to grow.
SLOT: Final = 10  # of a list or of the stack
LIST, DICT, RECORD = 72, 80, 112
FIRST_ITEM, FIRST_KEY = 48, 200
KEY: Final = 72  # while a dict grows, with the table that it leaves
KEPT: Final = 256  # an entry of the memo, and its identity
_RECALLS: Final = re.compile(rb"j(?=(.{4}))", re.DOTALL)
_MOST_RECALLS: Final = 1 << 16


def recalled(data: bytes) -> frozenset[int] | None:
    """What a pickle may recall from its memo beside the first 256, or more; None where that is too much to count.

    Most of what is remembered is never recalled, and need not be kept.

    Example:
        >>> sorted(recalled(b"...j" + bytes((1, 2, 0, 0)) + b"."))
        [513]
    """
    found: set[int] = set()
    for match in _RECALLS.finditer(data):
        found.add(int.from_bytes(match[1], "little"))
        if len(found) > _MOST_RECALLS:
            return None
    return frozenset(found)


def cost(value: Any) -> int:
    """Bytes of a text, of bytes, of a number or of a tuple, at most.

    Example:
        >>> cost(7), cost(2.5), cost("name") >= "name".__sizeof__()
        (0, 32, True)
    """
    kind = type(value)
    if kind is int:
        return 0 if -5 <= value <= 256 else 48 if -(2**60) < value < 2**60 else 48 + value.bit_length() // 8
    if kind is str or kind is bytes or (kind is tuple and value):
        return int(value.__sizeof__()) + 32
    return 32 if kind is float else 0
