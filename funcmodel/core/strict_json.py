"""JSON read strictly: no duplicate names, no endless numbers, no bottomless nesting, no bytes that are not UTF-8."""

import json
import re
from collections.abc import Callable
from typing import Any, Final, Literal, NoReturn

from funcmodel.errors import CheckpointError

Fail = Callable[[str, str], CheckpointError]
"""Makes the error from a code ("BAD_JSON", ...) and what was found."""

_ALL: Final = bytes(range(256))
_NOT_STRUCTURE: Final = bytes(b for b in _ALL if b not in b'[]{}"')
_STRING_OR_BRACKET: Final = re.compile(rb'[\[{][^\[\]{}"]*+[\]}]|[\[\]{}]|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACES_AS_BRACKETS: Final = bytes.maketrans(b"{}", b"[]")
_DIGITS_ALIKE: Final = bytes(ord("0") if b in b"0123456789" else ord(" ") for b in _ALL)


def decoded(data: bytes, fail: Fail) -> str:
    r"""The text of UTF-8 bytes.

    Raises:
        CheckpointError: what `fail` makes of "BAD_UTF8".

    Example:
        >>> decoded(b'"\xc3\xa9"', lambda code, found: CheckpointError(found, code=code))
        '"é"'
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise fail("BAD_UTF8", f"byte {error.start} is not UTF-8") from error


def parsed(
    data: bytes,
    fail: Fail,
    *,
    depth: int = 16,
    digits: int = 20,
    nonfinite: Literal["refuse", "keep"] = "refuse",
    surrogates: Literal["refuse", "keep"] = "refuse",
    room: int | None = None,
) -> Any:
    r"""The value of a JSON text.

    Args:
        data: the text in UTF-8.
        fail: makes the error to raise from a code and what was found.
        depth: deepest nesting.
        digits: most digits of an integer.
        nonfinite: whether NaN and Infinity, which are no JSON but which Python writes, are values.
        surrogates: whether escapes such as "\ud800", which stand for no character, are text.
        room: most bytes of memory that the value may take; None for any.

    Raises:
        CheckpointError: what `fail` makes of "BAD_UTF8", "BAD_JSON", "JSON_DEPTH", "INT_TOO_LONG", "DUPLICATE_KEY",
            "NONFINITE_LITERAL" or, of what has too many values, "INDEX_TOO_LARGE".

    Example:
        >>> parsed(b'{"a": [1, 2]}', lambda code, found: CheckpointError(found, code=code))
        {'a': [1, 2]}
    """
    text = decoded(data, fail)
    if depth_exceeds(data, depth):
        raise fail("JSON_DEPTH", f"nested deeper than {depth} levels")
    if room is not None and weight(data) > room and weight(data, exact=True) > room:
        raise fail("INDEX_TOO_LARGE", f"{len(data)} bytes of JSON whose values take more than {room >> 20} MiB")

    def integer(literal: str) -> int | float:
        if len(literal) - (literal[0] == "-") > digits:
            raise fail("INT_TOO_LONG", f"an integer of {len(literal)} digits, at most {digits} are read")
        return -0.0 if literal == "-0" else int(literal)

    def constant(literal: str) -> Any:
        if nonfinite == "refuse":
            raise fail("NONFINITE_LITERAL", f"the literal {literal}, which is no JSON")
        return float(literal.replace("Infinity", "inf"))

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        return distinct(found, fail)

    # A hook per integer costs as much as all checks of a header's entry, so it is used only where it could matter.
    # "-0" is a float to other readers.
    plain = b"-0" not in data and b"0" * (digits + 1) not in data.translate(_DIGITS_ALIKE)
    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_int=int if plain else integer,
            parse_constant=constant,
        )
    except RecursionError as error:
        raise fail("JSON_DEPTH", "nested deeper than this interpreter's stack") from error
    except ValueError as error:
        raise fail("BAD_JSON", f"{error}") from error
    if surrogates == "refuse" and b"\\u" in data:
        _refuse_surrogates(value, fail)
    return value


def weight(data: bytes, *, exact: bool = False) -> int:
    r"""Bytes of memory that the value of a JSON text takes at most while it is made, told by its punctuation.

    Args:
        data: the text.
        exact: whether punctuation in strings does not count. That takes longer.

    Example:
        >>> weight(b'{"a": [1, 2]}') < 1000, weight(b"[" + b"{}," * 1_000_000) > 90_000_000
        (True, True)
        >>> weight(b'["' + b"," * 1000 + b'"]') > weight(b'["' + b"," * 1000 + b'"]', exact=True)
        True
    """
    lists, objects, commas, members = (data.count(mark) for mark in (b"[", b"{", b",", b":"))
    if exact:
        for found in _STRING.finditer(data):
            text = found[0]
            lists, objects = lists - text.count(b"["), objects - text.count(b"{")
            commas, members = commas - text.count(b","), members - text.count(b":")
    # A list and an object, twice, as they may be frozen; an item; a member with its pair, its name and its value.
    built = 200 * lists + 400 * objects + 90 * max(commas - members, 0) + 290 * members
    return built + 2 * len(data) * (1 if data.isascii() else 4)


def distinct(pairs: list[tuple[str, Any]], fail: Fail) -> dict[str, Any]:
    """The pairs of a JSON object as a dict.

    Raises:
        CheckpointError: what `fail` makes of "DUPLICATE_KEY".

    Example:
        >>> distinct([("a", 1)], lambda code, found: CheckpointError(found, code=code))
        {'a': 1}
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        _fail_duplicate(pairs, fail)
    return found


def _fail_duplicate(pairs: list[tuple[str, Any]], fail: Fail) -> NoReturn:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise fail("DUPLICATE_KEY", f"the name {name[:200]!r} stands twice in one object")
        seen.add(name)
    raise AssertionError("no duplicate")


def _refuse_surrogates(value: Any, fail: Fail) -> None:
    """Escapes may spell half a pair; other readers refuse such text, and no file name or UTF-8 can hold it."""
    try:
        json.dumps(value, ensure_ascii=False, default=lambda _: None).encode("utf-8")
    except UnicodeEncodeError as error:
        raise fail("BAD_JSON", "an escape that stands for half a character (a lone surrogate)") from error


def depth_exceeds(data: bytes, depth: int) -> bool:
    """Whether brackets outside strings nest deeper than `depth`, found without parsing.

    Counts up to the first bracket that closes nothing, where a parser stops too.

    Example:
        >>> depth_exceeds(b'{"a": [[]]}', 3), depth_exceeds(b'{"a": [[]]}', 2), depth_exceeds(b'"[[["', 0)
        (False, True, False)
    """
    plain = data
    if b"\\" in plain:  # an escaped quote ends no string
        plain = plain.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = plain.translate(_BRACES_AS_BRACKETS, _NOT_STRUCTURE)
    brackets = marks.replace(b'""', b"")
    if b'"' in brackets:  # some string holds brackets
        brackets = b"".join(marks.split(b'"')[::2])
    for _ in range(depth):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")  # the innermost pairs; what nests n deep is gone after n rounds
    return bool(brackets) and deeper(data, depth)


def deeper(data: bytes, depth: int, start: int = 0) -> bool:
    """`depth_exceeds` from byte `start` on, without a copy of the data; slow where there is much to count.

    Example:
        >>> deeper(b"x[[", 1, 1), deeper(b"[]][[", 1)
        (True, False)
    """
    level = 0
    for found in _STRING_OR_BRACKET.finditer(data, start):
        mark = found[0]
        if mark in (b"[", b"{"):
            level += 1
            if level > depth:
                return True
        elif mark in (b"]", b"}"):
            level -= 1
            if level < 0:
                return False
        elif level == depth and mark[0] != 34:  # brackets with none inside them
            return True
    return False
