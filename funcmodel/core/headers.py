"""The rules of a safetensors header: text to tensors and metadata, or the error that says which rule is broken."""

from collections.abc import Iterator
from math import prod
from typing import Any, Final

from funcmodel.core.entries import Entry, Survey, entries, pairs
from funcmodel.core.limits import Limits, name_error
from funcmodel.core.strict_json import Fail, deeper, parsed, weight
from funcmodel.errors import CheckpointError, HeaderError, TruncatedError
from funcmodel.records.checkpoint import StoredTensor
from funcmodel.records.dtypes import FROM_SAFETENSORS
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec

LARGEST: Final = 2**63 - 1
METADATA: Final = "__metadata__"
SMALL: Final = 2 << 20
"""Of a header of at most so many bytes that is wrong, the JSON value is built, to report what a parser sees first."""
LARGE: Final = 4 << 20
"""A header of more bytes is read twice: first to find whether it is right, then to keep what it says."""
_ROOM: Final = 48 << 20  # bytes of memory for a value that is built only to report on it
_FIELDS: Final = {"dtype", "shape", "data_offsets"}

Tensors = dict[str, StoredTensor]


def read_header(header: bytes, path: str, nbytes: int, limits: Limits) -> tuple[Tensors, FrozenMap[str, str]]:
    """The tensors and the metadata of a header, every rule checked.

    Peak memory is that of the result; of a header that is refused, 64 MiB beside the header.

    Args:
        header: the first 8 + n bytes of a file.
        path: for messages.
        nbytes: size of the whole file in bytes.
        limits: what is accepted.

    Raises:
        HeaderError: the header breaks the format.
        TruncatedError: the file is shorter than its header says.

    Example:
        >>> from funcmodel.core.limits import LIMITS
        >>> text = b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
        >>> read_header(bytes(8) + text, "m.safetensors", 8 + len(text) + 2, LIMITS)[0]["w"].spec
        [2] uint8
    """
    if header[8:9] != b"{":
        raise header_error("HEADER_START", path, f"its header starts with {header[8:9]!r}, expected b'{{'")
    # The walk knows three levels and 20 digits; who allows less is asked for by the other way.
    walkable = limits.json_depth >= 3 and limits.int_digits >= 20
    if not walkable:
        return _parsed(header, path, nbytes, limits)
    try:
        if len(header) > LARGE:
            _survey(header, path, nbytes, limits)
        return _walked(header, path, nbytes, limits)
    except HeaderError as error:
        if len(header) > SMALL or weight(header) > _ROOM:
            if error.code in ("BAD_JSON", "ENTRY_FIELDS", "METADATA_TYPE") and deeper(header, limits.json_depth, 8):
                raise header_error("JSON_DEPTH", path, f"its header nests deeper than {limits.json_depth}") from error
            raise
    return _parsed(header, path, nbytes, limits)


def _fail(path: str) -> Fail:
    def fail(code: str, found: str) -> CheckpointError:
        return header_error(code, path, f"its header: {found}")

    return fail


def _parsed(header: bytes, path: str, nbytes: int, limits: Limits) -> tuple[Tensors, FrozenMap[str, str]]:
    """By way of the JSON value."""
    body = header[8:].rstrip(b" ")
    if not body.endswith(b"}"):
        raise header_error("BAD_JSON", path, "its header is not one JSON object padded with spaces")
    found: Any = parsed(body, _fail(path), depth=limits.json_depth, digits=limits.int_digits)
    metadata = found.pop(METADATA, {})
    if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
        raise _metadata_error(path)
    base, tensors = len(header), {}
    for name, entry in found.items():
        _check_name(name, path, limits)
        tensors[name] = _checked_entry(name, entry, base, path, limits)
    _check_cover(tensors, base, nbytes, path)
    return tensors, FrozenMap(metadata)


class _Walk:
    """The walk over a header, and the way to judge what it does not settle itself."""

    def __init__(self, header: bytes, path: str, limits: Limits, metadata: dict[str, str] | None) -> None:
        self.header, self.path, self.limits, self.metadata = header, path, limits, metadata
        self.fail = _fail(path)
        self.seen = False

    def __iter__(self) -> Iterator[Entry]:
        def sized(kind: str, shape: list[int]) -> tuple[TensorSpec, int] | None:
            spec = _spec(kind, shape, self.limits)
            return (spec, spec.nbytes) if isinstance(spec, TensorSpec) else None

        return entries(self.header, 8, spec=sized, longest=self.limits.name_chars, fail=self.fail)

    def judged(self, name: str, start: int, stop: int) -> StoredTensor | None:
        """The tensor whose entry stands between these bytes; None for the metadata."""
        if name == METADATA:
            if self.seen:
                raise _twice(name, self.path)
            self.seen = True
            if pairs(self.header, start, None, self.fail) != stop:  # before any of them is kept
                raise _metadata_error(self.path)
            if self.metadata is not None:
                pairs(self.header, start, self.metadata, self.fail)
            return None
        _check_name(name, self.path, self.limits)
        return _judged(name, self.header, start, stop, self.path, self.limits)


def _judged(name: str, header: bytes, start: int, stop: int, path: str, limits: Limits) -> StoredTensor:
    """An entry that the walk does not read. What cannot be one, for its size, is not even parsed."""
    size = stop - start
    if size > (1 << 20) + 24 * limits.ndim:
        if header.count(b",", start, stop) > limits.ndim + 4:
            raise header_error("NDIM", path, f"tensor {name!r}: over {limits.ndim} dimensions", key=name)
        raise header_error("ENTRY_FIELDS", path, f"tensor {name!r} has an entry of {size} bytes", key=name)
    entry = parsed(header[start:stop], _fail(path), depth=limits.json_depth - 1, digits=limits.int_digits)
    return _checked_entry(name, entry, len(header), path, limits)


def _walked(header: bytes, path: str, nbytes: int, limits: Limits) -> tuple[Tensors, FrozenMap[str, str]]:
    """By way of its entries, none of which outlives its tensor."""
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    base = end = len(header)
    in_order, count = True, 0
    walk = _Walk(header, path, limits, metadata)
    for name, spec, start, stop in walk:
        if spec is not None:
            stored = StoredTensor(spec, start + base, stop + base)
        elif (found := walk.judged(name, start, stop)) is not None:
            stored = found
        else:
            continue
        tensors[name] = stored
        in_order = in_order and stored.start == end
        end = stored.stop
        count += 1
        if len(tensors) != count:
            raise _twice(name, path)
    _check_cover(tensors, base, nbytes, path, end if in_order else None)
    return tensors, FrozenMap(metadata)


def _survey(header: bytes, path: str, nbytes: int, limits: Limits) -> None:
    """Refuse what is wrong before anything is kept."""
    survey = Survey()
    walk = _Walk(header, path, limits, None)
    for name, spec, start, stop in walk:
        if spec is not None:
            survey.add(name, start, stop)
        elif (found := walk.judged(name, start, stop)) is not None:
            survey.add(name, found.start - len(header), found.stop - len(header))
    doubtful, misfit = survey.doubtful(), survey.misfit()
    if doubtful or misfit:
        _refuse(header, path, limits, doubtful, misfit)
    _check_end(survey.end + len(header), nbytes, path)


def _refuse(header: bytes, path: str, limits: Limits, doubtful: set[int], misfit: tuple[str, int] | None) -> None:
    """Raise what the survey found, with the name of a tensor."""
    seen: set[str] = set()
    for name, *_ in _Walk(header, path, limits, None) if doubtful else ():
        if hash(name) in doubtful:
            if name in seen:
                raise _twice(name, path)
            seen.add(name)
    if misfit:
        code, at = misfit
        what = "more than one tensor covers it" if code == "OVERLAP" else "a hole starts there"
        raise header_error(code, path, f"byte {at} of its data: {what}")


def _checked_entry(name: str, entry: Any, base: int, path: str, limits: Limits) -> StoredTensor:
    """An entry that is not as usually written, or is wrong."""
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise _fields_error(name, entry, path)
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(kind) is not str:
        raise header_error("DTYPE", path, f"tensor {name!r} has the dtype {_short(kind)}, expected a name", key=name)
    if type(shape) is not list or not all(type(size) is int for size in shape):
        raise header_error("SHAPE", path, f"tensor {name!r} has the shape {_short(shape)}, expected integers", key=name)
    spec = _spec(kind, shape, limits)
    if not isinstance(spec, TensorSpec):
        raise header_error(spec[0], path, f"tensor {name!r}: {spec[1]}", key=name)
    if type(offsets) is not list or len(offsets) != 2 or not all(type(at) is int for at in offsets):
        raise _offsets_error(name, offsets, path)
    start, stop = offsets
    if not 0 <= start <= stop:
        raise _offsets_error(name, offsets, path)
    if stop - start != spec.nbytes:
        what = f"tensor {name!r}, {spec!r}, has {stop - start} bytes, needs {spec.nbytes}"
        raise header_error("SIZE_MISMATCH", path, what, key=name)
    return StoredTensor(spec, start + base, stop + base)


def _spec(kind: str, shape: list[int], limits: Limits) -> TensorSpec | tuple[str, str]:
    """The spec; or a code and what is wrong."""
    dtype = FROM_SAFETENSORS.get(kind)
    if dtype is None:
        return "DTYPE", f"the dtype {kind[:40]!r} is unknown"
    if len(shape) > limits.ndim:
        return "NDIM", f"{len(shape)} dimensions, at most {limits.ndim} are read"
    if shape and not 0 <= min(shape) <= max(shape) <= LARGEST:
        return "SHAPE", f"the shape is {_short(shape)}, expected sizes from 0 to 2**63 - 1"
    if prod(max(size, 1) for size in shape) > LARGEST:
        return "SHAPE_OVERFLOW", f"the sizes {_short(shape)} multiply beyond 2**63 - 1"
    spec = TensorSpec(shape, dtype)
    if dtype.bits % 8 and spec.numel * dtype.bits % 8:
        return "SUBBYTE_ALIGN", f"{spec.numel} elements of {dtype.bits} bits end inside a byte"
    return spec


def _check_cover(tensors: Tensors, base: int, nbytes: int, path: str, end: int | None = None) -> None:
    """The tensors, sorted by offset, cover the data exactly; `end` is where they end if they were found contiguous."""
    if end is None:
        end, last = base, ""
        for start, stop, name in sorted((t.start, t.stop, name) for name, t in tensors.items()):
            if start != end:
                code, what = ("OVERLAP", "overlaps") if start < end else ("HOLE", "leaves a hole after")
                found = f"tensor {name!r} starts at byte {start} and {what} {last!r}, which ends at byte {end}"
                raise header_error(code, path, found, key=name)
            end, last = stop, name
    _check_end(end, nbytes, path)


def _check_end(end: int, nbytes: int, path: str) -> None:
    if end > nbytes:
        raise truncated(path, end, nbytes)
    if end < nbytes:
        found = f"{nbytes - end} bytes belong to no tensor, the last one ends at byte {end}"
        raise header_error("TRAILING_BYTES", path, found)


def _check_name(name: str, path: str, limits: Limits) -> None:
    found = name_error(name, limits)
    if found is not None:
        raise header_error(found[0], path, f"tensor {name[:80]!r}: {found[1]}", key=name)


# -- errors ------------------------------------------------------------------------------------------------------------


def header_error(
    code: str, path: str, found: str, *, key: str | None = None, do: str = "it is damaged, so download or save it again"
) -> HeaderError:
    """The error of a header that breaks a rule.

    Example:
        >>> header_error("HOLE", "m.safetensors", "leaves a hole").code
        'HOLE'
    """
    return HeaderError(f"{path}: {found}; {do}", code=code, path=path, key=key)


def truncated(path: str, expected: int, found: int) -> TruncatedError:
    """The error of a file that ends too early; sizes in bytes.

    Example:
        >>> truncated("m.safetensors", 12, 10).expected
        12
    """
    return TruncatedError(
        f"{path}: has {found} bytes, its header describes {expected}; it was cut off, so download or save it again",
        code="TRUNCATED",
        path=path,
        expected=expected,
        found=found,
    )


def _short(value: Any) -> str:
    text = repr(value[:8] if isinstance(value, list) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_error(name: str, entry: Any, path: str) -> HeaderError:
    found = sorted(entry) if isinstance(entry, dict) else entry
    return header_error(
        "ENTRY_FIELDS", path, f"tensor {name!r} has {_short(found)}, expected exactly {sorted(_FIELDS)}", key=name
    )


def _offsets_error(name: str, offsets: Any, path: str) -> HeaderError:
    return header_error(
        "OFFSETS", path, f"tensor {name!r} has the data_offsets {_short(offsets)}, expected [start, stop]", key=name
    )


def _metadata_error(path: str) -> HeaderError:
    return header_error("METADATA_TYPE", path, "its __metadata__ is not an object from text to text", key=METADATA)


def _twice(name: str, path: str) -> HeaderError:
    return header_error("DUPLICATE_KEY", path, f"its header: the name {name[:200]!r} stands twice", key=name)
