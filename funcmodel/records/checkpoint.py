"""What is on disk: `StoredTensor`, `StoredView`, `FileSpec`, `IndexSpec`, `CheckpointSpec`."""

from attrs import frozen

from funcmodel.records.config import Config, Json
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec


@frozen
class StoredView:
    """How a tensor lies in bytes that it shares with others or does not fill in row-major order.

    Attributes:
        name: the first of the names that share the bytes; expressions read them under this one.
        offset: of the tensor's first element from the first byte, in elements.
        strides: distances between neighbors along each axis, in elements.
    """

    name: str
    offset: int
    strides: tuple[int, ...]


@frozen
class StoredTensor:
    """A tensor in a file; `start` and `stop` are bytes from the start of the *file*, `stop` excluded.

    `view` is None where the tensor alone fills these bytes, in row-major order.
    """

    spec: TensorSpec
    start: int
    stop: int
    view: StoredView | None = None


@frozen(kw_only=True)
class FileSpec:
    """One file of weights, as its header says and as was checked.

    Attributes:
        path: as found.
        nbytes: size of the file in bytes.
        tensors: name to stored tensor, in file order.
        metadata: the header's `__metadata__`, empty where there is none.
        fingerprint: BLAKE2b-128 of header bytes and file size, in hex; what is the header, the `Format` says.
        format: name of the `Format` that reads it.
    """

    path: str
    nbytes: int
    tensors: FrozenMap[str, StoredTensor]
    metadata: FrozenMap[str, str] = FrozenMap()
    fingerprint: str
    format: str = "safetensors"


@frozen(kw_only=True)
class IndexSpec:
    """An index file: which shard (by file name) holds which key."""

    path: str
    weight_map: FrozenMap[str, str]
    metadata: FrozenMap[str, Json] = FrozenMap()
    nbytes: int = 0


@frozen(kw_only=True)
class CheckpointSpec:
    """A whole checkpoint: its files, its index if it has one, and what lay beside it.

    Attributes:
        path: the file or folder that was scanned.
        files: the files of weights, in the order of their names.
        index: the index, or None for a single file.
        variant: as in `model.fp16.safetensors`, or None.
        config: `config.json` of the folder, or None.
        ignored: names of other weight files in the folder that this checkpoint does not list, sorted.
        digests: names of the files beside its files that `record_digests` wrote, sorted.
    """

    path: str
    files: tuple[FileSpec, ...]
    index: IndexSpec | None = None
    variant: str | None = None
    config: Config | None = None
    ignored: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
