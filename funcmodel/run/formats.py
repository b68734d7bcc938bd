"""`Format`: how files with one suffix become records and bytes. Formats are passed to readers, never registered."""

import os
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Final, TypeAlias

from attrs import frozen

from funcmodel.core.limits import LIMITS
from funcmodel.core.wire import Limits, header_length, parse_header, render_header
from funcmodel.errors import CheckpointError, StalePlanError, UnknownFormatError
from funcmodel.records.checkpoint import FileSpec
from funcmodel.records.expressions import FileRef
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.files import SourceFile, open_regular

Scan: TypeAlias = Callable[[SourceFile, Limits], FileSpec]
"""An open file to its record. It reads as little as it can and trusts nothing."""

ReadRange: TypeAlias = Callable[[SourceFile, memoryview, int], None]
"""Fills the buffer with the tensor bytes that a `Read` finds at the given offset."""

WriteHeader: TypeAlias = Callable[[Mapping[str, TensorSpec], Mapping[str, str]], tuple[bytes, Mapping[str, int]]]
"""Specs in file order and metadata to the file's first bytes and each tensor's absolute offset."""

_CHUNK: Final = 1 << 20


@frozen(kw_only=True)
class Format:
    """A file format: one value, made of functions.

    Attributes:
        name: recorded in every `FileSpec` and `FileRef` of such a file.
        suffix: how its file names end, with the dot.
        scan: an open file to its `FileSpec`, whose `path` is the file's and whose `format` is `name`.
        read: fills a buffer with stored bytes; None where bytes stand in the file as the tensor holds them.
        write: makes the first bytes of a file; None where the format is only read.
        fingerprint: the `FileSpec.fingerprint` alone, where that is cheaper than `scan`.
    """

    name: str
    suffix: str
    scan: Scan
    read: ReadRange | None = None
    write: WriteHeader | None = None
    fingerprint: Callable[[SourceFile], str] | None = None


def scan_safetensors(file: SourceFile, limits: Limits = LIMITS) -> FileSpec:
    """The header of an open safetensors file as a record; two reads, and none of any weight.

    Raises:
        HeaderError: the header breaks the format.
        TruncatedError: the file is shorter than its header says.
    """
    start = file.read(0, min(8, file.nbytes))
    n = header_length(start, path=file.path, nbytes=file.nbytes, limits=limits)
    return parse_header(file.read(0, 8 + n), path=file.path, nbytes=file.nbytes, limits=limits)


def safetensors_fingerprint(file: SourceFile) -> str:
    """The fingerprint of an open safetensors file, without parsing it; of any file, however damaged."""
    digest = blake2b(digest_size=16)
    start = file.read(0, min(8, file.nbytes))
    stop = min(8 + int.from_bytes(start, "little"), file.nbytes)
    digest.update(start)
    for at in range(8, stop, _CHUNK):
        digest.update(file.read(at, min(at + _CHUNK, stop)))
    digest.update(file.nbytes.to_bytes(8, "little"))
    return digest.hexdigest()


SAFETENSORS: Final = Format(
    name="safetensors",
    suffix=".safetensors",
    scan=scan_safetensors,
    write=render_header,
    fingerprint=safetensors_fingerprint,
)

FORMATS: Final[tuple[Format, ...]] = (SAFETENSORS,)


def format_of(path: str | os.PathLike[str], formats: tuple[Format, ...] = FORMATS) -> Format:
    """The first format whose suffix the file's name has.

    Raises:
        UnknownFormatError: none has it; code "SUFFIX".
    """
    name = os.fspath(path)
    for format_ in formats:
        if name.endswith(format_.suffix):
            return format_
    known = ", ".join(f.suffix for f in formats) or "none"
    raise UnknownFormatError(
        f"{name}: no format reads such a file, known suffixes: {known}; convert it, or pass formats=(...)",
        code="SUFFIX",
        path=name,
    )


def format_named(name: str, formats: tuple[Format, ...] = FORMATS, *, path: str = "") -> Format:
    """The format of that name.

    Raises:
        UnknownFormatError: none has it; code "FORMAT".
    """
    for format_ in formats:
        if format_.name == name:
            return format_
    known = ", ".join(f.name for f in formats) or "none"
    raise UnknownFormatError(
        f"{path}: planned with the format {name!r}, given are: {known}; pass the same formats=(...) as to scan",
        code="FORMAT",
        path=path,
    )


def open_source(ref: FileRef, *, formats: tuple[Format, ...] = FORMATS) -> SourceFile:
    """Open a planned file, if it still is the file that was planned.

    Args:
        ref: the file as a plan's leaves name it.
        formats: the formats to choose from.

    Returns:
        The open file; close it, or use it as a context manager.

    Raises:
        StalePlanError: the file is gone, or its size or header changed.
        CheckpointError: it cannot be opened, or is no regular file.
        UnknownFormatError: none of `formats` is the one it was planned with.
    """
    format_ = format_named(ref.format, formats, path=ref.path)
    try:
        file = open_regular(ref.path)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise _stale(ref, "is gone", ref.fingerprint, None) from error
        raise
    try:
        if file.nbytes != ref.nbytes:
            raise _stale(ref, f"has {file.nbytes} bytes, had {ref.nbytes}", ref.nbytes, file.nbytes)
        found = _fingerprint(format_, file, ref)
        if found != ref.fingerprint:
            raise _stale(ref, f"its header changed ({ref.fingerprint} -> {found})", ref.fingerprint, found)
    except BaseException:
        file.close()
        raise
    return file


def _fingerprint(format_: Format, file: SourceFile, ref: FileRef) -> str:
    if format_.fingerprint is not None:
        return format_.fingerprint(file)
    try:
        return format_.scan(file, LIMITS).fingerprint
    except CheckpointError as error:
        raise _stale(ref, "can no longer be read", ref.fingerprint, None) from error


def _stale(ref: FileRef, what: str, expected: str | int, found: str | int | None) -> StalePlanError:
    return StalePlanError(
        f"{ref.path}: {what} since it was planned; scan and plan again", path=ref.path, expected=expected, found=found
    )
