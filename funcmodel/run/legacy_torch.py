"""Files that torch wrote before version 1.6, bare pickles and no zip: read by torch.load, and only when asked for.

They are unpickled to be scanned: `torch.load(weights_only=True)` does that, on the open file that was checked, once to
scan it and once more when a plan that reads it is applied. Then all its tensors are in memory.
"""

import io
import pickletools
from bisect import bisect_right
from hashlib import blake2b
from typing import Any, BinaryIO, Final, cast

import torch
from attrs import evolve, frozen

from funcmodel.core.limits import Limits
from funcmodel.core.opcodes import Inert, unpickled
from funcmodel.core.torch_layout import state_dict, stored_tensors
from funcmodel.core.torch_pickle import PickledStorage, PickledTensor
from funcmodel.errors import FuncmodelError, HeaderError
from funcmodel.records.checkpoint import FileSpec
from funcmodel.records.mapping import FrozenMap
from funcmodel.run.files import SourceFile
from funcmodel.run.formats import Format, ReadRange
from funcmodel.run.tensors import FROM_TORCH

_CHUNK: Final = 1 << 20
_LEAST: Final = (2, 10)  # CVE-2026-24747: before, weights_only=True let a file corrupt memory


def legacy_torch(suffix: str = ".pt") -> Format:
    """The format of files that torch wrote before version 1.6; for those alone, and never among `FORMATS`.

    Args:
        suffix: how the file names end, with the dot.

    Returns:
        The format, only for reading. Scanning and applying load the whole file into memory. `key` works as for a
        torch zip.

    Example:
        >>> import funcmodel as fm, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"w": torch.ones(2)}, f"{folder}/m.pt", _use_new_zipfile_serialization=False)
        ...     fm.materialize(fm.scan(f"{folder}/m.pt", formats=(legacy_torch(),)), formats=(legacy_torch(),))
        {'w': tensor([1., 1.])}
    """
    return Format(
        name="torch_legacy",
        suffix=suffix,
        scan=_LegacyScan(),
        decode=decode_legacy,
        fingerprint=legacy_fingerprint,
        at=_LegacyAt(suffix),
    )


@frozen
class _LegacyScan:
    """A `Scan`, as a value."""

    at: tuple[str, ...] = ()

    def __call__(self, file: SourceFile, limits: Limits) -> FileSpec:
        return scan_legacy(file, limits, self.at)


@frozen
class _LegacyAt:
    """`Format.at`, as a value."""

    suffix: str

    def __call__(self, at: tuple[str, ...]) -> Format:
        return evolve(legacy_torch(self.suffix), scan=_LegacyScan(at))


def scan_legacy(file: SourceFile, limits: Limits, at: tuple[str, ...] = ()) -> FileSpec:
    """The tensors of an open legacy file as a record.

    Its offsets count bytes of the storages, one after the other in the order in which torch.load gives them.

    Raises:
        HeaderError: torch.load refuses the file (code "BIN_LEGACY"), torch is too old to be trusted with it (code
            "BIN_LEGACY_TORCH"), it is a zip (code "BIN_LEGACY_ZIP"), or it holds something other than a state dict.
    """
    found = _Loaded(_load(file))
    if found.end > file.nbytes:
        raise _error(file.path, "BIN_LEGACY", f"makes {found.end} bytes of tensors of {file.nbytes} bytes of file")
    tensors = state_dict(found.root, at, path=file.path, limits=limits)
    return FileSpec(
        path=file.path,
        nbytes=file.nbytes,
        tensors=FrozenMap(stored_tensors(tensors, found.spans, path=file.path, limits=limits)),
        fingerprint=legacy_fingerprint(file),
        format="torch_legacy",
    )


def legacy_fingerprint(file: SourceFile) -> str:
    """The fingerprint of an open legacy file: of all its bytes, since nothing less says what is in it."""
    digest = blake2b(digest_size=16)
    for at in range(0, file.nbytes, _CHUNK):
        digest.update(file.read(at, min(at + _CHUNK, file.nbytes)))
    digest.update(file.nbytes.to_bytes(8, "little"))
    return digest.hexdigest()


def decode_legacy(file: SourceFile) -> ReadRange:
    """Loads an open legacy file, and serves the ranges that `scan_legacy` names from memory.

    Raises:
        HeaderError: as `scan_legacy`.
    """
    found = _Loaded(_load(file))
    starts = [start for start, _ in found.memory]

    def read(_: SourceFile, buffer: memoryview, offset: int) -> None:
        at, size = 0, len(buffer)
        while at < size:
            i = bisect_right(starts, offset + at) - 1
            start, stored = found.memory[i]
            part = stored[offset + at - start : offset + size - start]
            if not len(part):
                raise _error(file.path, "BIN_LEGACY", f"has no byte {offset + at} of its tensors")
            buffer[at : at + len(part)] = part
            at += len(part)

    return read


class _Loaded:
    """What torch.load gave, in the words of a pickle that was read and not run; storages stand in a row."""

    def __init__(self, value: Any) -> None:
        self.end = 0
        self.spans: dict[str, tuple[int, int]] = {}
        self.memory: list[tuple[int, memoryview]] = []
        self._storages: dict[int, PickledStorage] = {}
        self._dicts: dict[int, dict[Any, Any]] = {}
        self._waiting: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self.root = self._inert(value)
        for held, copy in self._waiting:  # grows while it is walked
            copy.update(
                (key if isinstance(key, str | int) else Inert("key"), self._inert(v)) for key, v in held.items()
            )

    def _inert(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if not isinstance(value, dict):
            return value if isinstance(value, bool | int | float | str | None) else Inert(type(value).__name__)
        copy = self._dicts.get(id(value))
        if copy is None:
            copy = self._dicts[id(value)] = {}
            self._waiting.append((value, copy))
        return copy

    def _tensor(self, tensor: torch.Tensor) -> Any:
        dtype = FROM_TORCH.get(tensor.dtype)
        if tensor.layout is not torch.strided or dtype is None or tensor.device.type != "cpu":
            return Inert(f"{tensor.layout} tensor of {tensor.dtype} on {tensor.device}")
        lazy = "conj" if tensor.is_conj() else "neg" if tensor.is_neg() else ""
        storage, plain = self._storage(tensor.untyped_storage()), tensor.detach()
        return PickledTensor(storage, dtype, plain.storage_offset(), tuple(plain.shape), plain.stride(), lazy)

    def _storage(self, storage: torch.UntypedStorage) -> PickledStorage:
        place, size = storage._cdata, storage.nbytes()
        found = self._storages.get(place)
        if found is None:
            key = str(len(self._storages))
            found = self._storages[place] = PickledStorage(key, None, size, "cpu")
            self.spans[key] = (self.end, self.end + size)
            if size:
                self.memory.append((self.end, torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data))
            self.end += size
        return found


def _load(file: SourceFile) -> Any:
    if tuple(map(int, torch.__version__.split(".")[:2])) < _LEAST:
        found = f"needs torch 2.10, whose weights_only=True is safe; this is torch {torch.__version__}"
        raise _error(file.path, "BIN_LEGACY_TORCH", found, do="update torch, or convert the file where it was made")
    if file.read(0, min(4, file.nbytes)) == b"PK\3\4":
        do = "leave formats= or --legacy out, and it is read as such"
        raise _error(file.path, "BIN_LEGACY_ZIP", "is a zip, as torch writes since 1.6", do=do)
    try:
        with io.BufferedReader(_Stream(file), _CHUNK) as stream:
            _check_storages(cast(BinaryIO, stream), file.path, file.nbytes)
            stream.seek(0)
            return torch.load(stream, map_location="cpu", weights_only=True)
    except FuncmodelError:
        raise
    except Exception as error:  # whatever a parser of foreign bytes raises, this is what it means
        why = str(error).rpartition("WeightsUnpickler error: ")[2]  # before it stands how to load it unsafely
        raise _error(file.path, "BIN_LEGACY", f"torch.load refuses it ({type(error).__name__}: {why:.300})") from error


def _check_storages(stream: BinaryIO, path: str, nbytes: int) -> None:
    """Refuse a file whose list of storages omits one that a tensor names: torch.load gives it whatever memory holds.

    A legacy file is five pickles, then the bytes of the storages in the order of the fifth.
    """

    def fail(code: str, found: str) -> HeaderError:
        return _error(path, "BIN_LEGACY", f"{found} ({code})")

    words = _Keys()
    values: list[Any] = []
    for _ in range(5):
        start = stream.tell()
        for _opcode in pickletools.genops(stream):
            continue
        stop = stream.tell()
        stream.seek(start)
        values.append(unpickled(stream.read(stop - start), words, fail, nbytes=nbytes))
    listed = values[4]
    if type(listed) is not list or not words.keys <= {key for key in listed if type(key) is str}:
        raise _error(path, "BIN_LEGACY", "lists other storages than its tensors name")


class _Keys:
    """A `Vocabulary` that makes nothing of anything, and remembers which storages are named."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def find(self, name: str) -> Any:
        return Inert(name)

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:  # noqa: ARG002
        return Inert("result")

    def stored(self, pid: Any) -> Any:
        if type(pid) is tuple and len(pid) > 2 and type(pid[2]) is str:
            self.keys.add(pid[2])
        return Inert("storage")


class _Stream(io.RawIOBase):
    """An open file with a position of its own, so that threads may share the descriptor."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.nbytes}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self._file.nbytes - self._at), 0)
        if count:
            self._file.read_into(view[:count], self._at)
            self._at += count
        return count


_DO: Final = "it is damaged, made to deceive, or no file of tensors; convert it where it was made"


def _error(path: str, code: str, found: str, *, do: str = _DO) -> HeaderError:
    return HeaderError(f"{path}: {found}; {do}", code=code, path=path)
