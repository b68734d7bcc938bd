"""The entries of a safetensors header and the pairs of an index, one after the other; the JSON value is never built.

A header of 100 MB may describe a million tensors, or be made to cost a hundred times its size in memory before the flaw
at its end is found. Walking it with two patterns costs the time of the walk and the memory of what is kept.
"""

import re
from array import array
from collections.abc import Callable, Iterator, MutableMapping
from itertools import pairwise
from typing import Final, TypeAlias

from funcmodel.core.strict_json import Fail, parsed
from funcmodel.records.tensors import TensorSpec

Sized: TypeAlias = "tuple[TensorSpec, int] | None"
Entry: TypeAlias = "tuple[str, TensorSpec | None, int, int]"
"""A name, its spec, and its data_offsets; where the spec is None, from where to where its value stands in the text."""

# Possessive quantifiers throughout: nothing backtracks, so time is linear and no stack of states grows.
_WS: Final = rb"[ \t\n\r]*+"
_BODY: Final = rb'[^"\\\x00-\x1f]*+(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*+)*+'
_INT: Final = rb"(?:0|[1-9][0-9]{0,19}+)"
_NAME: Final = _WS + rb'"(' + _BODY + rb')"' + _WS + rb":" + _WS
# As safetensors writes it, and as json.dumps does. Kind and shape are one group: a key to specs that are known.
_USUAL: Final = re.compile(
    rb'"([^"\\\x00-\x1f]{0,4096}+)": ?\{"dtype": ?"([A-Z0-9_]++", ?"shape": ?\[[0-9, ]{0,4096}+)\], ?'
    rb'"data_offsets": ?\[(' + _INT + rb"), ?(" + _INT + rb")\]\}([,}]) ?"
)
# With its fields in any order and whitespace anywhere. A separator that is empty stands before the closing brace.
_ORDERED: Final = re.compile(
    _NAME
    + rb"\{"
    + _WS
    + rb'(?:(?:"dtype"WS:WS"([A-Z0-9_]++)"|"shape"WS:WS\[([0-9, \t\n\r]{0,4096}+)\]|'
    rb'"data_offsets"WS:WS\[WS(INT)WS,WS(INT)WS\])WS(,|(?=\}))WS){3}\}WS([,}])WS'.replace(b"WS", _WS).replace(
        b"INT", _INT
    )
)
_FLAT: Final = re.compile(
    _NAME + rb'(\{(?:[^"{}]++|"' + _BODY + rb'")*+\})' + _WS + rb"([,}])" + _WS
)  # any object without objects in it
_NAMED: Final = re.compile(_NAME)
_PAIR: Final = re.compile(_NAME + rb'"(' + _BODY + rb')"' + _WS + rb"([,}])")
_TEXT_TO_TEXT: Final = re.compile(
    _WS
    + rb"\{(?:"
    + _WS
    + rb"\}|(?:"
    + _NAME
    + rb'"'
    + _BODY
    + rb'"'
    + _WS
    + rb",)*+"
    + _NAME
    + rb'"'
    + _BODY
    + rb'"'
    + _WS
    + rb"\})"
)
_OPEN: Final = re.compile(_WS + rb"\{" + _WS + rb"(\}?)")
_SPACES: Final = re.compile(rb" *+")
_SIZES: Final = re.compile(_WS + rb"(?:" + _INT + _WS + rb"(?:," + _WS + _INT + _WS + rb")*+)?+")


def entries(
    header: bytes, at: int, *, spec: Callable[[str, list[int]], Sized], fail: Fail, longest: int = 4096
) -> Iterator[Entry]:
    """The members of a header's object in their order. What is not as usual is located, and left to judge.

    Args:
        header: the file's first bytes, up to the end of the header.
        at: where the object starts.
        spec: kind and shape to the spec and its size in bytes, None where that is no tensor.
        fail: makes the errors.
        longest: characters of a usual name.

    Raises:
        CheckpointError: what `fail` makes of "BAD_JSON", "BAD_UTF8", and "ENTRY_FIELDS" for a value that is no object,
            or holds one.

    Example:
        >>> text = b'{"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "x": {}}'
        >>> def spec(kind, shape):
        ...     return TensorSpec(shape, "uint8"), shape[0]
        >>> list(entries(text, 0, spec=spec, fail=lambda code, found: ValueError(code)))
        [('w', [2] uint8, 0, 2), ('x', None, 66, 68)]
    """
    opened = _OPEN.match(header, at)
    if opened is None:
        raise fail("BAD_JSON", "it is no object")
    at, last = opened.end(), opened[1] == b"}"
    known: dict[bytes, Sized] = {}
    usual = _USUAL.match
    while not last:
        found = usual(header, at)
        if found is None and (named := _NAMED.match(header, at)) and named.end(1) - named.start(1) > 6 * longest:
            raise fail("NAME_TOO_LONG", f"a name of {named.end(1) - named.start(1)} bytes, at most {longest} are read")
        if found is not None:
            raw, key, start, stop, mark = found.groups()
            sized = known.get(key) or _recalled(key, known, spec)
        else:
            found = _ORDERED.match(header, at)
            if found is not None:
                raw, kind, shape, start, stop, more, mark = found.groups()
                key = None if more or not (kind and shape is not None and start) else kind + b'"[' + shape
                sized = None if key is None else known.get(key) or _recalled(key, known, spec)
        if found is not None and sized is not None and (end := int(stop)) - (first := int(start)) == sized[1]:
            try:
                name = raw.decode("ascii")
            except UnicodeDecodeError:
                name = ""
            if name.isprintable() and 0 < len(name) <= longest and b"\\" not in raw and name != "__metadata__":
                at, last = found.end(), mark == b"}"
                yield name, sized[0], first, end
                continue
        found = _FLAT.match(header, at)
        if found is None:
            raise _unreadable(header, at, fail)
        at, last = found.end(), found[3] == b"}"
        yield text_of(found[1], fail), None, found.start(2), found.end(2)
    at = header.rfind(b"}", 0, at) + 1  # the patterns took whitespace of any kind after it
    rest = _SPACES.match(header, at)
    if rest is None or rest.end() != len(header):
        raise fail("BAD_JSON", f"its object ends at byte {at} and something other than spaces follows")


def _recalled(key: bytes, known: dict[bytes, Sized], spec: Callable[[str, list[int]], Sized]) -> Sized:
    """What a kind and a shape, as text, stand for."""
    kind, _, shape = key.partition(b'"')
    shape = shape[shape.index(b"[") + 1 :]
    if _SIZES.fullmatch(shape) is None:
        return None
    found = spec(kind.decode("ascii"), [int(size) for size in shape.split(b",")] if shape.strip() else [])
    if len(known) < 4096:
        known[key] = found
    return found


def _unreadable(header: bytes, at: int, fail: Fail) -> Exception:
    named = _NAMED.match(header, at)
    if named is None:
        return fail("BAD_JSON", f"at byte {at} no name of a tensor follows")
    value = header[named.end() : named.end() + 1]
    if value and value in b'{["-0123456789tfn':
        return fail("ENTRY_FIELDS", f"tensor {named[1][:80]!r} has no flat object of dtype, shape and data_offsets")
    return fail("BAD_JSON", f"at byte {named.end()} no value follows")


def text_of(body: bytes, fail: Fail) -> str:
    r"""The text of a JSON string, given what stands between its quotes.

    Raises:
        CheckpointError: what `fail` makes of "BAD_UTF8" or "BAD_JSON".

    Example:
        >>> text_of(b"a\\u0062", lambda *_: ValueError())
        'ab'
    """
    if b"\\" in body:
        return str(parsed(b'"' + body + b'"', fail))
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise fail("BAD_UTF8", f"byte {error.start} of a text is not UTF-8") from error


def pairs(
    data: bytes,
    at: int,
    into: MutableMapping[str, str] | None,
    fail: Fail,
    check: Callable[[str, str], object] | None = None,
) -> int | None:
    """Read an object from text to text.

    Args:
        data: JSON.
        at: where the object starts.
        into: receives the pairs; None only looks whether there are such, and of many, whether they can be kept.
        fail: makes the errors.
        check: of many that are not kept, is given each.

    Returns:
        Where the object ends; None where it is none from text to text.

    Raises:
        CheckpointError: what `fail` makes of "DUPLICATE_KEY", "BAD_UTF8" or "BAD_JSON".

    Example:
        >>> found = {}
        >>> pairs(b'{"a": "b", "c": ""}', 0, found, lambda *_: ValueError()), found
        (19, {'a': 'b', 'c': ''})
    """
    if into is None:
        whole = _TEXT_TO_TEXT.match(data, at)
        if whole is not None and len(whole[0]) > _MANY:
            _check_pairs(data, at, len(whole[0]), fail, check)
        return None if whole is None else whole.end()
    opened = _OPEN.match(data, at)
    if opened is None:
        return None
    at, last = opened.end(), opened[1] == b"}"
    shared: dict[bytes, str] = {}
    while not last:
        found = _PAIR.match(data, at)
        if found is None:
            return None
        raw, value, mark = found.groups()
        at, last = found.end(), mark == b"}"
        name = text_of(raw, fail)
        if name in into:
            raise fail("DUPLICATE_KEY", f"the name {name[:200]!r} stands twice in one object")
        text = shared.get(value)
        if text is None:
            text = text_of(value, fail)
            if len(shared) < 4096:
                shared[value] = text
        into[name] = text
    return at


def _check_pairs(data: bytes, at: int, size: int, fail: Fail, check: Callable[[str, str], object] | None) -> None:
    """What would be raised while pairs are kept. Names are told apart by a bit each, and by themselves in doubt."""
    count = 8 * min(size, _MOST_BITS // 8)
    bits = bytearray(count // 8)
    doubtful: set[int] = set()
    for name, value in _texts(data, at, fail):
        slot = hash(name) % count
        if bits[slot >> 3] & 1 << (slot & 7):
            doubtful.add(slot)
        bits[slot >> 3] |= 1 << (slot & 7)
        if check is not None:
            check(name, value)
    del bits
    seen: set[str] = set()
    for name, _ in _texts(data, at, fail) if doubtful else ():
        if hash(name) % count in doubtful:
            if name in seen:
                raise fail("DUPLICATE_KEY", f"the name {name[:200]!r} stands twice in one object")
            seen.add(name)


def _texts(data: bytes, at: int, fail: Fail) -> Iterator[tuple[str, str]]:
    """The pairs of an object that `_TEXT_TO_TEXT` matched."""
    opened = _OPEN.match(data, at)
    found = None if opened is None or opened[1] else _PAIR.match(data, opened.end())
    while found is not None:
        raw, value, mark = found.groups()
        yield text_of(raw, fail), text_of(value, fail)
        found = None if mark == b"}" else _PAIR.match(data, found.end())


class Survey:
    """What must hold of all tensors together, found in 24 bytes per tensor: distinct names, data covered exactly."""

    def __init__(self) -> None:
        self.end = 0
        self.in_order = True
        self.starts, self.stops, self.names = array("Q"), array("Q"), array("q")

    def add(self, name: str, start: int, stop: int) -> None:
        """Take notice of a tensor, whose bytes lie from `start` to `stop`, counted from the start of the data."""
        if start != self.end:
            self.in_order = False
        self.end = stop
        self.starts.append(start if start < _FAR else _FAR)
        self.stops.append(stop if stop < _FAR else _FAR + 1)
        self.names.append(hash(name))

    def doubtful(self) -> set[int]:
        """Hashes that two names have."""
        return {h for part in _parts(self.names) if len(set(part)) != len(part) for h in _twice(sorted(part))}

    def misfit(self) -> tuple[str, int] | None:
        """Whether a byte is covered twice or not at all, and the first one; None where all are covered up to `end`.

        Every byte from 0 to the last stop is covered once exactly if the starts and the last stop are the stops
        and 0, as multisets: what starts at or before a byte and has not stopped is then one tensor. Empty tensors
        must lie where two tensors meet.
        """
        if self.in_order:
            return None
        self.names = array("q")
        last = max(self.stops)
        starts, stops, empty = array("Q", [last]), array("Q", [0]), array("Q")
        for start, stop in zip(self.starts, self.stops, strict=True):
            if start == stop:
                empty.append(start)
            else:
                starts.append(start)
                stops.append(stop)
        self.end = last
        self.starts, self.stops = array("Q"), array("Q")
        found: list[tuple[int, str]] = []
        for some, others, points in zip(_parts(starts), _parts(stops), _parts(empty), strict=True):
            found += _differences(sorted(some), sorted(others))
            found += [(at, "OVERLAP") for at in sorted(set(points) - set(some) - set(others))[:1]]
        if not found:
            return None
        at, code = min(found)
        return code, at


_MANY: Final = 1 << 20  # bytes of pairs of which a flaw is found before any is kept
_MOST_BITS: Final = 1 << 28  # a hundred for each name of most headers; of those of many tiny names a dozen
_PARTS: Final = 12
_FAR: Final = 2**63  # no file ends there


def _parts(values: "array[int]") -> Iterator[list[int]]:
    """Values by their remainder, so that lists and sets of a part only exist at a time."""
    for i in range(_PARTS):
        yield [value for value in values if value % _PARTS == i]


def _twice(values: list[int]) -> set[int]:
    return {a for a, b in pairwise(values) if a == b}


def _differences(starts: list[int], stops: list[int]) -> list[tuple[int, str]]:
    """Where the two sorted lists first differ."""
    if starts == stops:
        return []
    both = zip(starts, stops, strict=False)
    a, b = next(((a, b) for a, b in both if a != b), (None, None))
    if a is None or b is None:
        at = min(len(starts), len(stops))
        return [(starts[at], "OVERLAP") if len(starts) > at else (stops[at], "HOLE")]
    return [(a, "OVERLAP") if a < b else (b, "HOLE")]
