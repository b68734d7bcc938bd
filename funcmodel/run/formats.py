"""`Format`: how files with one suffix become records and bytes. Formats are passed to readers, never registered."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from attrs import evolve, frozen

from funcmodel.core.limits import LIMITS
from funcmodel.core.wire import Limits, header_length, parse_header, render_header
from funcmodel.errors import CheckpointError, StalePlanError, UnknownFormatError
from funcmodel.records.checkpoint import FileSpec
from funcmodel.records.expressions import FileRef
from funcmodel.records.reports import Damage
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.files import SourceFile, open_regular, prefix_fingerprint

Scan: TypeAlias = Callable[[SourceFile, Limits], FileSpec]
"""An open file to its record. It reads as little as it can and trusts nothing."""

ReadRange: TypeAlias = Callable[[SourceFile, memoryview, int], None]
"""Fills the buffer with the tensor bytes that a `Read` finds at the given offset."""

Decode: TypeAlias = Callable[[SourceFile], ReadRange]
"""Takes in an open file, once, and gives the `ReadRange` that serves it."""

WriteHeader: TypeAlias = Callable[[Mapping[str, TensorSpec], Mapping[str, str]], tuple[bytes, Mapping[str, int]]]
"""Specs in file order and metadata to the file's first bytes and each tensor's absolute offset."""


@frozen(kw_only=True)
class Format:
    """A file format: one value, made of functions.

    Attributes:
        name: recorded in every `FileSpec` and `FileRef` of such a file.
        suffix: how its file names end, with the dot.
        scan: an open file to its `FileSpec`, whose `path` is the file's and whose `format` is `name`.
        read: fills a buffer with stored bytes; None where bytes stand in the file as the tensor holds them.
        decode: makes the `read` of one open file, where that takes more than the range; called once per file that a
            plan reads, before the first byte of any.
        write: makes the first bytes of a file; None where the format is only read.
        fingerprint: the `FileSpec.fingerprint` alone, where that is cheaper than `scan`. Without it a plan's files are
            scanned again, within the default `Limits`.
        at: the format of the same files that scans the dict under these keys; None where files hold one flat dict.
        verify: compares the whole file with checksums that the format itself holds, and gives all that differ; None
            where it has none. A scan accepted the file.
    """

    name: str
    suffix: str
    scan: Scan
    read: ReadRange | None = None
    decode: Decode | None = None
    write: WriteHeader | None = None
    fingerprint: Callable[[SourceFile], str] | None = None
    at: "Callable[[tuple[str, ...]], Format] | None" = None
    verify: Callable[[SourceFile], Sequence[Damage]] | None = None


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
    return prefix_fingerprint(file.read, file.nbytes)


SAFETENSORS: Final = Format(
    name="safetensors",
    suffix=".safetensors",
    scan=scan_safetensors,
    write=render_header,
    fingerprint=safetensors_fingerprint,
)


# -- files of torch.save: their reader is imported when the first of them is opened ------------------------------------


@frozen
class _TorchZipScan:
    """A `Scan`, as a value."""

    at: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()

    def __call__(self, file: SourceFile, limits: Limits) -> FileSpec:
        from funcmodel.run.torch_zip import scan_torch_zip

        return scan_torch_zip(file, limits, self.at, self.inert)


@frozen
class _TorchZipAt:
    """`Format.at` of a torch zip, as a value."""

    suffix: str
    inert: tuple[str, ...]

    def __call__(self, at: tuple[str, ...]) -> Format:
        return evolve(torch_zip(self.suffix, inert=self.inert), scan=_TorchZipScan(at, self.inert))


def _torch_zip_fingerprint(file: SourceFile) -> str:
    from funcmodel.run.torch_zip import torch_zip_fingerprint

    return torch_zip_fingerprint(file)


def _check_torch_zip(file: SourceFile) -> Sequence[Damage]:
    from funcmodel.run.torch_zip import check_torch_zip

    return check_torch_zip(file)


def torch_zip(suffix: str = ".bin", *, inert: tuple[str, ...] = ()) -> Format:
    """The format of the zip files that `torch.save` writes, read without torch.load and without running anything.

    `FORMATS` has it for `.bin`, `.pt` and `.pth`; make one for another suffix and pass it in `formats`.

    Args:
        suffix: how the file names end, with the dot.
        inert: further module-level names ("module.name") that the pickle may mention beside the state dict, such as a
            class of the training script. They are read past: neither imported nor called, and what they made is left
            out; `BIN_GLOBAL_FORBIDDEN` is the error that names them.

    Returns:
        The format, only for reading.

    Example:
        >>> torch_zip(".pth.tar").suffix
        '.pth.tar'
    """
    return Format(
        name="torch_zip",
        suffix=suffix,
        scan=_TorchZipScan(inert=inert),
        fingerprint=_torch_zip_fingerprint,
        at=_TorchZipAt(suffix, inert),
        verify=_check_torch_zip,
    )


TORCH_BIN: Final = torch_zip(".bin")
TORCH_PT: Final = torch_zip(".pt")
TORCH_PTH: Final = torch_zip(".pth")

FORMATS: Final[tuple[Format, ...]] = (SAFETENSORS, TORCH_BIN, TORCH_PT, TORCH_PTH)


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
        f"{name}: no format reads such a file, known suffixes: {known}; if torch.save wrote it, pass "
        "formats=(fm.torch_zip(suffix),), or --suffix",
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


def range_reader(format_: Format, file: SourceFile) -> ReadRange | None:
    """What reads ranges of one open file; None where the bytes stand in it as tensors hold them.

    Raises:
        CheckpointError: the file cannot be decoded.
    """
    return format_.read if format_.decode is None else format_.decode(file)


def open_source(ref: FileRef, *, formats: tuple[Format, ...] = FORMATS, limits: Limits = LIMITS) -> SourceFile:
    """Open a planned file, if it still is the file that was planned.

    Args:
        ref: the file as a plan's leaves name it.
        formats: the formats to choose from.
        limits: what the scan of a format without `fingerprint` accepts.

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
        found = _fingerprint(format_, file, ref, limits)
        if found != ref.fingerprint:
            raise _stale(ref, f"its header changed ({ref.fingerprint} -> {found})", ref.fingerprint, found)
    except BaseException:
        file.close()
        raise
    return file


def _fingerprint(format_: Format, file: SourceFile, ref: FileRef, limits: Limits) -> str:
    try:
        if format_.fingerprint is not None:
            return format_.fingerprint(file)
        return format_.scan(file, limits).fingerprint
    except CheckpointError as error:
        raise _stale(ref, "can no longer be read", ref.fingerprint, None) from error


def _stale(ref: FileRef, what: str, expected: str | int, found: str | int | None) -> StalePlanError:
    return StalePlanError(
        f"{ref.path}: {what} since it was planned; scan and plan again", path=ref.path, expected=expected, found=found
    )
