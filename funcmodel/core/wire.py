"""The safetensors header: bytes to records and back, hostile bytes included. The JSON files beside it: `core.index`.

A file is 8 bytes (the header's length n, little-endian), n bytes of JSON, and the data. Offsets in a header count from
the start of the data; those in records count from the start of the file.
"""

import json
from collections.abc import Callable, Mapping
from hashlib import blake2b
from math import prod
from typing import Any, Final

from funcmodel.core.index import parse_config as parse_config
from funcmodel.core.index import parse_index as parse_index
from funcmodel.core.index import render_config as render_config
from funcmodel.core.index import render_index as render_index
from funcmodel.core.limits import LIMITS, name_error
from funcmodel.core.limits import Limits as Limits
from funcmodel.core.strict_json import Fail, distinct, parsed
from funcmodel.errors import CheckpointError, HeaderError, PlanError, TruncatedError
from funcmodel.records.checkpoint import FileSpec, StoredTensor
from funcmodel.records.dtypes import FROM_SAFETENSORS
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec

LARGEST: Final = 2**63 - 1
_FIELDS: Final = {"dtype", "shape", "data_offsets"}
_METADATA: Final = "__metadata__"


def fingerprint(header: bytes, nbytes: int) -> str:
    """The fingerprint of a file: BLAKE2b-128 of its header and its size, in hex.

    Args:
        header: the first 8 + n bytes.
        nbytes: size of the whole file in bytes.

    Example:
        >>> fingerprint(b"", 0)
        'c804ce198ec337e3dc762bdd1a09aece'
    """
    digest = blake2b(header, digest_size=16)
    digest.update(nbytes.to_bytes(8, "little"))
    return digest.hexdigest()


def header_length(start: bytes, *, path: str, nbytes: int, limits: Limits = LIMITS) -> int:
    """The length n of a header in bytes, checked against the file before anything of that size is read.

    Args:
        start: the first 8 bytes of the file, fewer only if the file has fewer.
        path: for messages.
        nbytes: size of the whole file in bytes.
        limits: what is accepted.

    Raises:
        HeaderError: codes "TOO_SMALL", "HEADER_TOO_LARGE", "HEADER_PAST_EOF", "HEADER_START" (n is 0).

    Example:
        >>> header_length((16).to_bytes(8, "little"), path="m.safetensors", nbytes=100)
        16
    """
    if len(start) < 8 or nbytes < 8:
        raise _error("TOO_SMALL", path, f"{nbytes} bytes, a safetensors file has at least 10")
    n = int.from_bytes(start[:8], "little")
    if n > limits.header_bytes:
        raise _error(
            "HEADER_TOO_LARGE",
            path,
            f"its first 8 bytes announce a header of {n} bytes, at most {limits.header_bytes} are read",
            do="either it is no safetensors file, or Limits(header_bytes=...) must be raised",
        )
    if n > nbytes - 8:
        raise _error("HEADER_PAST_EOF", path, f"announces a header of {n} bytes and has {nbytes} bytes in all")
    if not n:
        raise _error("HEADER_START", path, "an empty header, expected one that starts with '{'")
    return n


def parse_header(data: bytes, *, path: str = "", nbytes: int | None = None, limits: Limits = LIMITS) -> FileSpec:
    """A safetensors file as a record, from its first bytes; every rule of the format is checked.

    Stricter than safetensors' own reader: what this accepts, that one reads the same way. Names are opaque text,
    compared by code point; nothing splits or normalizes them.

    Args:
        data: at least the first 8 + n bytes of the file.
        path: for messages, and for the record.
        nbytes: size of the whole file in bytes; None means that `data` is the whole file.
        limits: what is accepted.

    Returns:
        The record; its tensors are in the header's order.

    Raises:
        HeaderError: the header breaks the format; `code` says how, `key` which tensor.
        TruncatedError: the file is shorter than its header says.

    Example:
        >>> data, at = render_header({"w": TensorSpec([2, 3], "float32")}, {})
        >>> parse_header(data, path="m.safetensors", nbytes=len(data) + 24).tensors["w"]
        StoredTensor(spec=[2, 3] float32, start=4096, stop=4120)
    """
    nbytes = len(data) if nbytes is None else nbytes
    n = header_length(data[:8], path=path, nbytes=nbytes, limits=limits)
    if len(data) < 8 + n:
        raise _truncated(path, 8 + n, len(data))
    header = data if len(data) == 8 + n else data[: 8 + n]
    tensors, metadata = _tensors(header, path, nbytes, limits)
    return FileSpec(
        path=path,
        nbytes=nbytes,
        tensors=FrozenMap(tensors),
        metadata=metadata,
        fingerprint=fingerprint(header, nbytes),
    )


def _tensors(
    header: bytes, path: str, nbytes: int, limits: Limits
) -> tuple[dict[str, StoredTensor], FrozenMap[str, str]]:
    """The tensors and the metadata of a header, every rule checked."""
    if header[8:9] != b"{":
        raise _error("HEADER_START", path, f"its header starts with {header[8:9]!r}, expected b'{{'")
    body = header[8:].rstrip(b" ")
    if not body.endswith(b"}"):
        raise _error("BAD_JSON", path, "its header is not one JSON object padded with spaces")

    def fail(code: str, found: str) -> CheckpointError:
        return _error(code, path, f"its header: {found}")

    base = len(header)
    hook = _entry_reader(base, limits, fail)
    entries: Any = parsed(body, fail, depth=limits.json_depth, digits=limits.int_digits, pairs_hook=hook)
    if type(entries) is not dict:  # the header itself looks like a tensor's entry
        raise _fields_error("dtype", "a name", path)
    metadata = entries.pop(_METADATA, {})
    if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
        raise _error("METADATA_TYPE", path, "its __metadata__ is not an object from text to text", key=_METADATA)
    end, in_order = base, True
    for name, stored in entries.items():
        if not (name.isascii() and name.isprintable() and 0 < len(name) <= limits.name_chars):
            _check_name(name, path, limits)
        if type(stored) is not StoredTensor:
            entries[name] = stored = _checked_entry(name, stored, base, path, limits)
        in_order = in_order and stored.start == end
        end = stored.stop
    _check_cover(entries, base, nbytes, path, end if in_order else None)
    return entries, FrozenMap(metadata)


def _entry_reader(base: int, limits: Limits, fail: Fail) -> Callable[[list[tuple[str, Any]]], Any]:
    """Makes a `StoredTensor` of an entry as it is usually written, at once: no dict or list of it outlives the parser.

    Whatever is unusual or wrong becomes a dict, and is judged where its name is known.
    """
    known: dict[tuple[str, ...], tuple[TensorSpec, int] | None] = {}

    def read(pairs: list[tuple[str, Any]]) -> Any:
        if len(pairs) == 3:
            (a, kind), (b, shape), (c, offsets) = pairs
            if a == "dtype" and b == "shape" and c == "data_offsets" and type(shape) is list and type(kind) is str:
                for size in shape:
                    if type(size) is not int:
                        break
                else:
                    key = (kind, *shape)
                    found = known.get(key)
                    if found is None:
                        spec = _spec(kind, shape, limits)
                        found = known[key] = (spec, spec.nbytes) if isinstance(spec, TensorSpec) else None
                    if found is not None and type(offsets) is list and len(offsets) == 2:
                        start, stop = offsets
                        if type(start) is int and type(stop) is int and start >= 0 and stop - start == found[1]:
                            return StoredTensor(found[0], start + base, stop + base)
        return distinct(pairs, fail)

    return read


def _checked_entry(name: str, entry: Any, base: int, path: str, limits: Limits) -> StoredTensor:
    """An entry that is not as usually written: its fields stand in another order, or something is wrong."""
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise _fields_error(name, entry, path)
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(kind) is not str:
        raise _error("DTYPE", path, f"tensor {name!r} has the dtype {_short(kind)}, expected a name", key=name)
    if type(shape) is not list or not all(type(size) is int for size in shape):
        raise _error("SHAPE", path, f"tensor {name!r} has the shape {_short(shape)}, expected integers", key=name)
    spec = _spec(kind, shape, limits)
    if not isinstance(spec, TensorSpec):
        raise _error(spec[0], path, f"tensor {name!r}: {spec[1]}", key=name)
    if type(offsets) is not list or len(offsets) != 2 or not all(type(at) is int for at in offsets):
        raise _offsets_error(name, offsets, path)
    start, stop = offsets
    if not 0 <= start <= stop:
        raise _offsets_error(name, offsets, path)
    if stop - start != spec.nbytes:
        what = f"tensor {name!r}, {spec!r}, has {stop - start} bytes, needs {spec.nbytes}"
        raise _error("SIZE_MISMATCH", path, what, key=name)
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


def _check_cover(tensors: dict[str, StoredTensor], base: int, nbytes: int, path: str, end: int | None) -> None:
    """The tensors, sorted by offset, cover the data exactly; `end` is where they end if they were found contiguous."""
    if end is None:
        end, last = base, ""
        for start, stop, name in sorted((t.start, t.stop, name) for name, t in tensors.items()):
            if start != end:
                code, what = ("OVERLAP", "overlaps") if start < end else ("HOLE", "leaves a hole after")
                found = f"tensor {name!r} starts at byte {start} and {what} {last!r}, which ends at byte {end}"
                raise _error(code, path, found, key=name)
            end, last = stop, name
    if end > nbytes:
        raise _truncated(path, end, nbytes)
    if end < nbytes:
        found = f"{nbytes - end} bytes belong to no tensor, the last one ends at byte {end}"
        raise _error("TRAILING_BYTES", path, found)


def _check_name(name: str, path: str, limits: Limits) -> None:
    found = name_error(name, limits)
    if found is not None:
        raise _error(found[0], path, f"tensor {name[:80]!r}: {found[1]}", key=name)


# -- errors, built where they are raised so that the loop above stays short ------------------------------------------


def _error(
    code: str, path: str, found: str, *, key: str | None = None, do: str = "it is damaged, so download or save it again"
) -> HeaderError:
    return HeaderError(f"{path}: {found}; {do}", code=code, path=path, key=key)


def _truncated(path: str, expected: int, found: int) -> TruncatedError:
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
    return _error(
        "ENTRY_FIELDS", path, f"tensor {name!r} has {_short(found)}, expected exactly {sorted(_FIELDS)}", key=name
    )


def _offsets_error(name: str, offsets: Any, path: str) -> HeaderError:
    return _error(
        "OFFSETS", path, f"tensor {name!r} has the data_offsets {_short(offsets)}, expected [start, stop]", key=name
    )


# -- writing -----------------------------------------------------------------------------------------------------------


def render_header(
    entries: Mapping[str, TensorSpec], metadata: Mapping[str, str], *, align: int = 4096, limits: Limits = LIMITS
) -> tuple[bytes, FrozenMap[str, int]]:
    """The header of a safetensors file, and where in the file each tensor's bytes belong.

    The bytes depend on the arguments only: metadata is sorted by name, tensors and their data stand in the order given,
    spaces fill up to the first multiple of `align`.

    Args:
        entries: name to spec, in the order of the data.
        metadata: text to text, written as `__metadata__` unless empty.
        align: the data starts at a multiple of this many bytes.
        limits: what readers accept.

    Returns:
        The first 8 + n bytes, and name to absolute offset in bytes.

    Raises:
        PlanError: something has no place in a safetensors file: a dtype, a name, a tensor that ends inside a byte.

    Example:
        >>> data, at = render_header({"w": TensorSpec([2], "float32"), "b": TensorSpec([], "int8")}, {"format": "pt"})
        >>> len(data), dict(at)
        (4096, {'w': 4096, 'b': 4104})
    """
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name, spec in entries.items():
        size = _writable(name, spec, limits)
        starts[name] = end
        header[name] = {"dtype": spec.dtype.safetensors, "shape": spec.shape, "data_offsets": (end, end + size)}
        end += size
    try:
        body = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise PlanError("metadata holds half a character (a lone surrogate), which UTF-8 cannot hold") from error
    base = -(-(8 + len(body)) // align) * align
    if base - 8 > limits.header_bytes:
        raise PlanError(
            f"a header of {base - 8} bytes, readers take at most {limits.header_bytes}; use more and smaller shards"
        )
    data = (base - 8).to_bytes(8, "little") + body.ljust(base - 8)
    return data, FrozenMap({name: base + start for name, start in starts.items()})


def _writable(name: str, spec: TensorSpec, limits: Limits) -> int:
    """The size of a tensor in bytes, if the format can hold it."""
    found = ("NAME_RESERVED", "the format reserves this name") if name == _METADATA else None
    if not (name.isascii() and name.isprintable() and 0 < len(name) <= limits.name_chars):
        found = found or name_error(name, limits)
    if found is None and spec.dtype.safetensors is None:
        found = "DTYPE", f"safetensors has no dtype for {spec.dtype.name}; cast it first"
    if found is None and spec.ndim > limits.ndim:
        found = "NDIM", f"{spec.ndim} dimensions, readers take at most {limits.ndim}"
    if found is None and spec.dtype.bits % 8 and spec.numel * spec.dtype.bits % 8:
        found = "SUBBYTE_ALIGN", f"{spec.numel} elements of {spec.dtype.bits} bits end inside a byte"
    if found is not None:
        raise PlanError(f"tensor {name[:80]!r} cannot be stored: {found[1]}", keys=(name,), code=found[0])
    return spec.nbytes
