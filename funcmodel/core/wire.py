"""The safetensors header: bytes to records and back, hostile bytes included. The JSON files beside it: `core.index`.

A file is 8 bytes (the header's length n, little-endian), n bytes of JSON, and the data. Offsets in a header count from
the start of the data; those in records count from the start of the file.
"""

import json
from collections.abc import Collection, Mapping
from hashlib import blake2b
from typing import Any, Final

from funcmodel.core.index import parse_config as parse_config
from funcmodel.core.index import parse_index as parse_index
from funcmodel.core.index import render_config as render_config
from funcmodel.core.index import render_index as render_index
from funcmodel.core.limits import LIMITS, name_error
from funcmodel.core.limits import Limits as Limits
from funcmodel.errors import PlanError
from funcmodel.records.checkpoint import FileSpec
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec

_METADATA: Final = "__metadata__"
_HEX: Final = frozenset("0123456789abcdef")
DIGEST: Final = "sha256:"
"""Starts metadata entries that hold digests. A tensor's name follows; where none does, the digest is the header's."""
BLANK: Final = "0" * 64
"""Stands for a digest that is not known yet."""


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
    from funcmodel.core.headers import header_error  # here, because importing funcmodel.load needs no reader

    if len(start) < 8 or nbytes < 8:
        raise header_error("TOO_SMALL", path, f"{nbytes} bytes, a safetensors file has at least 10")
    n = int.from_bytes(start[:8], "little")
    if n > limits.header_bytes:
        raise header_error(
            "HEADER_TOO_LARGE",
            path,
            f"its first 8 bytes announce a header of {n} bytes, at most {limits.header_bytes} are read",
            do="either it is no safetensors file, or Limits(header_bytes=...) must be raised",
        )
    if n > nbytes - 8:
        raise header_error("HEADER_PAST_EOF", path, f"announces a header of {n} bytes and has {nbytes} bytes in all")
    if not n:
        raise header_error("HEADER_START", path, "an empty header, expected one that starts with '{'")
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
        StoredTensor(spec=[2, 3] float32, start=4096, stop=4120, view=None)
    """
    from funcmodel.core.headers import read_header, truncated

    nbytes = len(data) if nbytes is None else nbytes
    n = header_length(data[:8], path=path, nbytes=nbytes, limits=limits)
    if len(data) < 8 + n:
        raise truncated(path, 8 + n, len(data))
    header = data if len(data) == 8 + n else data[: 8 + n]
    tensors, metadata = read_header(header, path, nbytes, limits)
    return FileSpec(
        path=path,
        nbytes=nbytes,
        tensors=FrozenMap(tensors),
        metadata=metadata,
        fingerprint=fingerprint(header, nbytes),
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
    kinds: dict[tuple[tuple[int, ...], int], tuple[str, int]] = {}  # not by spec: to hash one costs more
    parts: list[str] = []
    starts: dict[str, int] = {}
    end = 0
    for (name, spec), quoted in zip(entries.items(), _quoted(entries, limits), strict=True):
        kind = spec.shape, id(spec.dtype)
        known = kinds.get(kind)
        if known is None:
            known = kinds[kind] = _writable(name, spec, limits)
        text, size = known
        starts[name] = end
        parts.append(f"{quoted}:{text}[{end},{end + size}]}}")
        end += size
    if metadata:
        parts.insert(0, f"{_json(_METADATA)}:{_json(dict(sorted(metadata.items())))}")
    try:
        body = f"{{{','.join(parts)}}}".encode()
    except UnicodeEncodeError as error:
        raise PlanError("metadata holds half a character (a lone surrogate), which UTF-8 cannot hold") from error
    base = -(-(8 + len(body)) // align) * align
    if base - 8 > limits.header_bytes:
        raise PlanError(
            f"a header of {base - 8} bytes, readers take at most {limits.header_bytes}; use more and smaller shards"
        )
    data = (base - 8).to_bytes(8, "little") + body.ljust(base - 8)
    return data, FrozenMap({name: base + start for name, start in starts.items()})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _quoted(names: Collection[str], limits: Limits) -> list[str]:
    """Names as JSON, if the format can hold them. There may be 100,000, so they are looked at together first."""
    together = "".join(names)
    plain = together.isascii() and together.isprintable() and '"' not in together and "\\" not in together
    if not plain or "" in names or _METADATA in names or max(map(len, names), default=0) > limits.name_chars:
        for name in names:
            found = ("NAME_RESERVED", "the format reserves this name") if name == _METADATA else None
            found = found or name_error(name, limits)
            if found is not None:
                raise _unwritable(name, *found)
    # Not formatted: members of an Enum have other words for that.
    return ['"' + name + '"' for name in names] if plain else [_json(name) for name in names]


def _writable(name: str, spec: TensorSpec, limits: Limits) -> tuple[str, int]:
    """A header's entry up to its offsets, and the size in bytes, if the format can hold such a tensor."""
    found = None
    if spec.dtype.safetensors is None:
        found = "DTYPE", f"safetensors has no dtype for {spec.dtype.name}; cast it first"
    elif spec.ndim > limits.ndim:
        found = "NDIM", f"{spec.ndim} dimensions, readers take at most {limits.ndim}"
    elif spec.dtype.bits % 8 and spec.numel * spec.dtype.bits % 8:
        found = "SUBBYTE_ALIGN", f"{spec.numel} elements of {spec.dtype.bits} bits end inside a byte"
    if found is not None:
        raise _unwritable(name, *found)
    shape = ",".join(map(str, spec.shape))  # a tenth of what json takes for it
    return f'{{"dtype":"{spec.dtype.safetensors}","shape":[{shape}],"data_offsets":', spec.nbytes


def _unwritable(name: str, code: str, found: str) -> PlanError:
    return PlanError(f"tensor {name[:80]!r} cannot be stored: {found}", keys=(name,), code=code)


# -- digests in the metadata -------------------------------------------------------------------------------------------


def with_digests(metadata: Mapping[str, str], digests: Mapping[str, str]) -> FrozenMap[str, str]:
    """Metadata that also records digests.

    Args:
        metadata: the other entries.
        digests: name to SHA-256 in hex, or to `BLANK`; the name "" is the header's own.

    Raises:
        PlanError: the metadata holds such an entry already, which would be taken for a digest.

    Example:
        >>> dict(with_digests({"format": "pt"}, {"w": "ab" * 32}))["sha256:w"][:8]
        'abababab'
    """
    taken = tuple(name for name in metadata if name.startswith(DIGEST))
    if taken:
        raise PlanError(
            f"the metadata entry {taken[0][:80]!r} looks like a digest; leave it out, digests='sha256' records them",
            keys=taken,
        )
    return FrozenMap({**metadata, **{DIGEST + name: value for name, value in digests.items()}})


def is_digest(name: str, value: object) -> bool:
    """Whether a metadata entry is a digest.

    Example:
        >>> is_digest("sha256:w", "ab" * 32), is_digest("sha256:w", "other.weight")
        (True, False)
    """
    return name.startswith(DIGEST) and isinstance(value, str) and len(value) == 64 and _HEX.issuperset(value)
