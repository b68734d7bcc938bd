"""Files that `torch.save` writes, planned without torch.load: all that is read is the zip's directory and its pickle.

The bytes of a tensor stand in such a file as the tensor holds them, so the engine reads ranges of it as of any other.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from hashlib import blake2b
from itertools import chain
from os.path import splitext
from types import MappingProxyType
from typing import Any, Final
from zlib import crc32

from attrs import frozen

from funcmodel.core.limits import Limits, accepted
from funcmodel.core.torch_layout import state_dict, stored_tensors, tensor_paths
from funcmodel.core.torch_pickle import Everything, PickledTensor, torch_unpickled
from funcmodel.core.zipped import (
    LONGEST_END,
    LONGEST_ENTRY,
    Directory,
    Member,
    check_apart,
    data_start,
    find_directory,
    local_bytes,
    member_at,
    members,
)
from funcmodel.errors import CheckpointError, HeaderError
from funcmodel.records.checkpoint import FileSpec
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.reports import Damage
from funcmodel.run.files import SourceFile

_CHUNK: Final = 1 << 20
_RECORD: Final = 700  # bytes of memory that one record of the directory takes while it is checked
_ROOM: Final = 48 << 20  # of which any zip may take so many, and as many more as its file has
_MAGIC: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began its files before version 1.6
_SCRIPT: Final = "it is code and not a state dict; load it with torch.jit.load and save its state_dict()"
_BIG: Final = "it was saved on a big-endian machine; load and save it where it was made"


@frozen(kw_only=True)
class TorchZip:
    """A torch zip file whose records were checked against one another.

    Attributes:
        directory: of the zip.
        spans: name of a record, without its folder, to its entry in the directory and to where its bytes start.
        listing: the bytes of the directory.
    """

    directory: Directory
    spans: FrozenMap[str, tuple[Member, int]]
    listing: bytes


def scan_torch_zip(file: SourceFile, limits: Limits, at: tuple[str, ...] = (), inert: tuple[str, ...] = ()) -> FileSpec:
    """The tensors of an open torch zip file as a record. Nothing is unpickled, called, or read of any weight.

    Args:
        file: the open file.
        limits: what is accepted; `header_bytes` holds for the zip's directory and for its pickle.
        at: keys that lead to the state dict, none if it is all that the file holds.
        inert: further module-level names that the pickle may mention beside the state dict.

    Raises:
        HeaderError: the file is damaged, made to deceive, or holds something other than a dict of tensors; `code` says
            what, `candidates` which keys lead to dicts of tensors.
    """
    zipped = _zipped(file, limits)
    pickled = _pickle(file, zipped, limits)
    root = torch_unpickled(pickled, partial(_error, file.path), inert=inert, nbytes=file.nbytes)
    tensors = state_dict(root, at, path=file.path, limits=limits)
    spans = {
        name.removeprefix("data/"): (start, start + member.nbytes)
        for name, (member, start) in zipped.spans.items()
        if name.startswith("data/")
    }
    return FileSpec(
        path=file.path,
        nbytes=file.nbytes,
        tensors=FrozenMap(stored_tensors(tensors, spans, path=file.path, limits=limits)),
        fingerprint=_fingerprint((zipped.directory.end, zipped.listing, pickled), file.nbytes),
        format="torch_zip",
    )


def torch_zip_fingerprint(file: SourceFile) -> str:
    """The fingerprint of an open torch zip file: of its directory, its pickle and its size.

    Both are read in parts, whatever their size: it is the plan's file, of which a scan said how much is too much, or
    another one, of which nothing is kept.

    Raises:
        CheckpointError: it is no torch zip.
    """
    directory = _directory(file)
    member = next((m for m in _members(file, directory) if _short(m.name) == "data.pkl"), None)
    if member is None:
        raise _no_pickle(file.path)
    start = _start(file, member)
    stop = start + member.nbytes if start + member.nbytes <= file.nbytes else start
    parts = chain([directory.end], _chunks(file, directory.start, directory.stop), _chunks(file, start, stop))
    return _fingerprint(parts, file.nbytes)


def check_torch_zip(file: SourceFile) -> tuple[Damage, ...]:
    """Compare the checksum of every record of an open torch zip file with what its directory says.

    Args:
        file: the open file; a scan accepted it.

    Returns:
        Every record whose bytes differ, under each tensor that lies in it (code "BIN_CRC"); `expected` and `found` name
        the record and the checksum in hex.

    Raises:
        HeaderError: the file is no sound torch zip.
    """
    zipped = _zipped(file, accepted(file.nbytes))
    damage: list[Damage] = []
    held: Mapping[str, tuple[str, ...]] | None = None
    for name, (member, start) in zipped.spans.items():
        crc = 0
        for chunk in _chunks(file, start, start + member.nbytes):
            crc = crc32(chunk, crc)
        if crc != member.crc:
            held = _held(file, zipped) if held is None else held
            expected, found = (f"{member.name} {value:08x}" for value in (member.crc, crc))
            damage += [Damage(file.path, key, "BIN_CRC", expected, found) for key in held.get(name, (None,))]
    return tuple(damage)


def _chunks(file: SourceFile, start: int, stop: int) -> Iterator[bytes]:
    for at in range(start, stop, _CHUNK):
        yield file.read(at, min(at + _CHUNK, stop))


def _held(file: SourceFile, zipped: TorchZip) -> Mapping[str, tuple[str, ...]]:
    """Names of the tensors in each record, as far as the pickle can still be read."""
    pickled = _pickle(file, zipped, accepted(file.nbytes))
    try:
        # Only names are wanted, and no tensor is made: so whatever else it mentions may be read past.
        root: Any = torch_unpickled(pickled, partial(_error, file.path), inert=Everything(), nbytes=file.nbytes)
    except CheckpointError:
        return {}
    found: dict[str, dict[str, None]] = {}
    for path, keys in tensor_paths(root).items():
        held = root
        for key in path:
            held = held[key]
        for key in keys:
            tensor: PickledTensor = held[key]
            found.setdefault(f"data/{tensor.storage.key}", {})[key] = None
    return {record: tuple(keys) for record, keys in found.items()}


# -- the zip -----------------------------------------------------------------------------------------------------------


def _directory(file: SourceFile) -> Directory:
    try:
        tail = file.read(max(file.nbytes - LONGEST_END, 0), file.nbytes)
        return find_directory(tail, nbytes=file.nbytes, fail=partial(_error, file.path))
    except HeaderError as error:
        if error.code == "BIN_NOT_ZIP":
            raise _no_zip(file) from None
        raise


def _listing(file: SourceFile, limits: Limits) -> tuple[Directory, bytes]:
    directory = _directory(file)
    size = directory.stop - directory.start
    if size > limits.header_bytes:
        found = f"its directory has {size} bytes, at most {limits.header_bytes} are read"
        raise _error(file.path, "HEADER_TOO_LARGE", found)
    return directory, file.read(directory.start, directory.stop)


def _members(file: SourceFile, directory: Directory) -> Iterator[Member]:
    """The records of a zip, one after the other, of which a part of the directory is held at a time."""
    first, at, data = directory.start, 0, b""
    for _ in range(directory.count):
        if at + LONGEST_ENTRY > len(data) and first + len(data) < directory.stop:
            first, at = first + at, 0
            data = file.read(first, min(first + _CHUNK, directory.stop))
        member, at = member_at(data, at, directory, partial(_error, file.path), first=first)
        yield member


def _start(file: SourceFile, member: Member) -> int:
    header = file.read(member.offset, member.offset + local_bytes(member))
    return data_start(header, member, partial(_error, file.path))


def _zipped(file: SourceFile, limits: Limits) -> TorchZip:
    directory, listing = _listing(file, limits)
    fail = partial(_error, file.path)
    most = (file.nbytes + _ROOM) // _RECORD
    if directory.count > most:
        many = f"its directory has {directory.count} records, which a file of {file.nbytes} bytes has no tensors for"
        raise fail("BIN_ZIP", many)
    found = members(listing, directory, fail)
    folder = found[0].name.partition("/")[0] + "/" if found else ""
    for member in found:
        if not member.name.startswith(folder):
            raise fail("BIN_RECORD_NAME", f"its record {member.name!r} lies outside {folder!r}")
    names = {_short(member.name) for member in found}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise _error(file.path, "BIN_TORCHSCRIPT", "is TorchScript", do=_SCRIPT)
    if "data.pkl" not in names:
        raise _no_pickle(file.path)
    starts = [(member, _start(file, member)) for member in found]
    check_apart(starts, directory, fail)
    spans = {_short(member.name): (member, start) for member, start in starts}
    order = spans.get("byteorder")
    if order is not None:
        word = file.read(order[1], order[1] + min(order[0].nbytes, 16))
        if word != b"little":
            raise _error(file.path, "BIN_BYTEORDER", f"has the byte order {word!r}", do=_BIG)
    return TorchZip(directory=directory, spans=FrozenMap(spans), listing=listing)


def _short(name: str) -> str:
    return name.partition("/")[2]


def _pickle(file: SourceFile, zipped: TorchZip, limits: Limits) -> bytes:
    member, start = zipped.spans["data.pkl"]
    if member.nbytes > limits.header_bytes:
        found = f"its pickle has {member.nbytes} bytes, at most {limits.header_bytes} are read"
        raise _error(file.path, "HEADER_TOO_LARGE", found)
    return file.read(start, start + member.nbytes)


def _fingerprint(parts: Iterable[bytes], nbytes: int) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    digest.update(nbytes.to_bytes(8, "little"))
    return digest.hexdigest()


# -- errors ------------------------------------------------------------------------------------------------------------


_DAMAGED: Final = "it is damaged or made to deceive, so download or save it again"
_DO: Final = MappingProxyType(
    {
        "BIN_GLOBAL_FORBIDDEN": "if that is a class of the training script, pass formats=(fm.torch_zip(suffix, "
        "inert=(that name,)),), or --inert: what was made with it is then left out, and nothing is imported",
        "HEADER_TOO_LARGE": "if you trust it, pass limits=fm.Limits(header_bytes=...)",
    }
)


def _error(path: str, code: str, found: str, *, do: str | None = None, **more: Any) -> HeaderError:
    return HeaderError(f"{path}: {found}; {do or _DO.get(code, _DAMAGED)}", code=code, path=path, **more)


def _no_pickle(path: str) -> HeaderError:
    return _error(
        path, "BIN_NO_PICKLE", "is a zip without a data.pkl", do="torch.save did not write it; check the path"
    )


def _no_zip(file: SourceFile) -> HeaderError:
    start, suffix = file.read(0, min(len(_MAGIC), file.nbytes)), splitext(file.path)[1] or ".pt"
    if start == _MAGIC:
        found = "was written by torch before version 1.6, as bare pickles"
        do = (
            f"pass formats=(fm.legacy_torch({suffix!r}),), or --legacy, to unpickle it with "
            "torch.load(weights_only=True); or save it again where it was made"
        )
    elif start[:4] == b"PK\3\4":
        found, do = "begins as a zip and does not end as one", "it was cut off, so download or save it again"
    else:
        found, do = "is no zip, as torch.save writes it", "check what it is; its name says torch"
    return _error(file.path, "BIN_NOT_ZIP", found, do=do)
