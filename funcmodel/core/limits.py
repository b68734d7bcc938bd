"""What a reader accepts at most: `Limits`, and what can be a tensor's name."""

import unicodedata
from typing import Final

from attrs import frozen


@frozen(kw_only=True)
class Limits:
    """What a reader accepts at most; each guards against bytes that would cost much and mean nothing.

    Attributes:
        header_bytes: length of a safetensors header; safetensors itself refuses more than the default.
        index_bytes: size of an index file, or of the file of digests beside another.
        config_bytes: size of a `config.json`, whose whole value is built.
        ndim: dimensions of a tensor.
        name_chars: length of a tensor's name.
        json_depth: nesting of a header or an index.
        int_digits: digits of an integer in a header or an index.
    """

    header_bytes: int = 100_000_000
    index_bytes: int = 256_000_000
    config_bytes: int = 4_000_000
    ndim: int = 64
    name_chars: int = 4096
    json_depth: int = 16
    int_digits: int = 20


LIMITS: Final = Limits()


def accepted(nbytes: int) -> Limits:
    """The limits for a file that is, by its fingerprint, the one that a scan accepted: nothing in it outgrows it.

    Args:
        nbytes: size of the file in bytes.

    Example:
        >>> accepted(1000).ndim
        1000
    """
    return Limits(header_bytes=nbytes, ndim=nbytes, name_chars=nbytes)


def check_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse an option that is none of its choices: a misspelled one must not be taken for the weaker one.

    Raises:
        ValueError: it is none of them.

    Example:
        >>> check_choice("durability", "ful", ("full", "none"))
        Traceback (most recent call last):
        ...
        ValueError: durability='ful': expected one of 'full', 'none'
    """
    if value not in choices:
        raise ValueError(f"{option}={value!r}: expected one of {', '.join(map(repr, choices))}")


def name_error(name: str, limits: Limits = LIMITS) -> tuple[str, str] | None:
    r"""Why a text cannot be a tensor's name: a code and words; None where it can.

    Example:
        >>> name_error("a..b/../c"), name_error("a\nb")
        (None, ('NAME_CONTROL', 'its name holds the control character U+000A'))
    """
    if not name:
        return "NAME_EMPTY", "its name is empty"
    if len(name) > limits.name_chars:
        return "NAME_TOO_LONG", f"its name has {len(name)} characters, at most {limits.name_chars} are read"
    for character in name:
        category = unicodedata.category(character)
        if category == "Cc":
            return "NAME_CONTROL", f"its name holds the control character U+{ord(character):04X}"
        if category == "Cs":
            return "BAD_UTF8", "its name holds half a character (a lone surrogate)"
    return None
