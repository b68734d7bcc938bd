"""From what a torch checkpoint's pickle says to stored tensors: which dict is meant, and every number of it checked."""

from collections.abc import Mapping
from itertools import islice
from math import prod
from typing import Any, Final

from attrs import evolve, frozen

from funcmodel.core.limits import Limits, name_error
from funcmodel.core.strided import (
    Block,
    arranged,
    blocks,
    extent,
    intricacy,
    is_row_major,
    row_major,
    stored_arrangement,
)
from funcmodel.core.torch_pickle import PickledStorage, PickledTensor
from funcmodel.errors import HeaderError
from funcmodel.records.checkpoint import StoredTensor, StoredView
from funcmodel.records.dtypes import DType
from funcmodel.records.tensors import TensorSpec

_LARGEST: Final = 2**63 - 1
_SHOWN: Final = 64
_INTRICATE: Final = 1 << 17  # of all tensors of a file: a few bytes can describe a view that takes many to plan


def tensor_paths(root: Any) -> Mapping[tuple[str, ...], tuple[str, ...]]:
    """Where in a pickled value dicts hold tensors: the path of each such dict, and its keys of tensors.

    A dict that several others hold has the first of its paths; keys that are no text lead nowhere.

    Example:
        >>> tensor = PickledTensor(None, None, 0, (), ())
        >>> dict(tensor_paths({"epoch": 3, "model": {"w": tensor}, "ema": {"model": {"w": tensor}}}))
        {('model',): ('w',), ('ema', 'model'): ('w',)}
    """
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    for path, value in waiting:
        if type(value) is not dict or id(value) in seen or len(path) > _SHOWN:
            continue
        seen.add(id(value))
        keys = tuple([key for key, item in value.items() if type(item) is PickledTensor and type(key) is str])
        if keys:
            found[path] = keys
        waiting += [((*path, key), item) for key, item in value.items() if type(item) is dict and type(key) is str]
    return found


def state_dict(root: Any, at: tuple[str, ...], *, path: str, limits: Limits) -> Mapping[str, PickledTensor]:
    """The state dict in a pickled value, in its order.

    Args:
        root: what the pickle holds.
        at: the keys that lead to the state dict, none if it is all that the file holds.
        path: for messages.
        limits: what is accepted.

    Raises:
        HeaderError: there is none; codes "BIN_NOT_A_DICT", "BIN_KEY_TYPE", "BIN_NO_SUCH_KEY", or
            "BIN_NOT_A_STATE_DICT" where it holds something else too; then the field `keys` names what, and
            `candidates` the paths of dicts that hold tensors only.

    Example:
        >>> from funcmodel.core.limits import LIMITS
        >>> tensor = PickledTensor(None, None, 0, (), ())
        >>> list(state_dict({"epoch": 3, "model": {"w": tensor}}, ("model",), path="m.pt", limits=LIMITS))
        ['w']
    """
    found = root
    for depth, key in enumerate(at):
        if type(found) is not dict or key not in found:
            raise _lost(root, at[: depth + 1], path)
        found = found[key]
    where = f" under {'/'.join(map(str, at))!r:.200}" if at else ""
    if type(found) is not dict:
        what = {PickledTensor: "tensor"}.get(type(found), type(found).__name__)
        raise _error("BIN_NOT_A_DICT", path, f"holds a {what}{where}, expected a dict of tensors", do=_SAVE)
    for key in found:
        if type(key) is not str:
            kind = getattr(key, "name", type(key).__name__)
            what = f"a key of type {kind}{where}, expected text"
            raise _error("BIN_KEY_TYPE", path, f"holds {what}", do=_SAVE)
        if not (key.isascii() and key.isprintable() and 0 < len(key) <= limits.name_chars):
            wrong = name_error(key, limits)
            if wrong is not None:
                raise _error(wrong[0], path, f"tensor {key[:80]!r}: {wrong[1]}", key=key)
    if any(type(item) is not PickledTensor for item in found.values()):
        raise _mixed(root, found, where, path)
    return found


def stored_tensors(
    tensors: Mapping[str, PickledTensor], spans: Mapping[str, tuple[int, int]], *, path: str, limits: Limits
) -> dict[str, StoredTensor]:
    """Tensors as they lie in a file.

    Args:
        tensors: name to tensor.
        spans: key of a storage to where its bytes start and stop in the file.
        path: for messages.
        limits: what is accepted.

    Raises:
        HeaderError: a storage or a tensor is not what the file can hold; codes "BIN_RECORD_MISSING",
            "BIN_STORAGE_SIZE", "BIN_STORAGE_TYPE", "BIN_GEOMETRY", "BIN_OUT_OF_BOUNDS", "BIN_EXPANDED",
            "BIN_STRIDES", "BIN_TENSOR_META", "NDIM".

    Example:
        >>> from funcmodel.core.limits import LIMITS
        >>> from funcmodel.records.dtypes import INT8
        >>> tensor = PickledTensor(PickledStorage("0", INT8, 6, "cpu"), INT8, 2, (2, 2), (2, 1))
        >>> stored_tensors({"w": tensor}, {"0": (100, 106)}, path="m.bin", limits=LIMITS)["w"]
        StoredTensor(spec=[2, 2] int8, start=102, stop=106, view=None)
    """
    kinds: dict[str, DType | None] = {}
    first: dict[object, str] = {}
    found: dict[str, StoredTensor] = {}
    room = _INTRICATE
    for name, tensor in tensors.items():
        start, stop = _storage(name, tensor.storage, kinds, spans, path)
        if tensor.lazy or tensor.storage.location == "meta":
            what = f"is lazy ({tensor.lazy!r})" if tensor.lazy else "has no bytes (it is on the device meta)"
            raise _error("BIN_TENSOR_META", path, f"tensor {name!r} {what}", key=name, do=_SAVE)
        placed = _placed(name, tensor, start, stop, path, limits)
        room -= 0 if placed.view is None else intricacy(stored_arrangement(placed))
        if room < 0:
            raise _error("BIN_STRIDES", path, f"tensor {name!r} is one intricate view too many", key=name, do=_SAVE)
        found[name] = _named(name, placed, first) if 0 not in placed.spec.shape else placed
    return found


def _storage(
    name: str,
    storage: PickledStorage,
    kinds: dict[str, DType | None],
    spans: Mapping[str, tuple[int, int]],
    path: str,
) -> tuple[int, int]:
    span = spans.get(storage.key)
    if span is None:
        raise _error("BIN_RECORD_MISSING", path, f"tensor {name!r} lies in a record that is not there", key=name)
    size = storage.numel * (1 if storage.dtype is None else _bytes(storage.dtype))
    if size != span[1] - span[0]:
        found = f"tensor {name!r} lies in a storage of {span[1] - span[0]} bytes that is said to have {size}"
        raise _error("BIN_STORAGE_SIZE", path, found, key=name)
    if kinds.setdefault(storage.key, storage.dtype) is not storage.dtype:
        raise _error("BIN_STORAGE_TYPE", path, f"tensor {name!r} lies in a storage of two dtypes", key=name)
    return span


def _bytes(dtype: DType) -> int:
    """Size of an element as torch counts them, in bytes."""
    return dtype.bits * dtype.pack // 8


@frozen
class _Geometry:
    """Numbers of a tensor, checked: in elements of torch."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _geometry(name: str, tensor: PickledTensor, path: str, limits: Limits) -> _Geometry:
    offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        found = f"tensor {name!r} has a shape and strides that do not belong together"
        raise _error("BIN_GEOMETRY", path, found, key=name)
    if len(shape) > limits.ndim:
        found = f"tensor {name!r} has {len(shape)} dimensions, at most {limits.ndim} are read"
        raise _error("BIN_GEOMETRY", path, found, key=name, do="if you trust it, pass limits=fm.Limits(ndim=...)")
    if not all(type(n) is int and 0 <= n <= _LARGEST for n in (offset, *shape, *strides)):
        found = f"tensor {name!r} has a size, a stride or an offset that is no integer from 0 to 2**63 - 1"
        raise _error("BIN_GEOMETRY", path, found, key=name)
    reach = offset + sum(max(n - 1, 0) * stride for n, stride in zip(shape, strides, strict=True))
    if prod(max(n, 1) for n in shape) * tensor.dtype.pack > _LARGEST or reach > _LARGEST:
        raise _error("BIN_GEOMETRY", path, f"tensor {name!r} has sizes that multiply beyond 2**63 - 1", key=name)
    return _Geometry(offset, shape, strides)


def _placed(name: str, tensor: PickledTensor, start: int, stop: int, path: str, limits: Limits) -> StoredTensor:
    """A tensor within its storage, whose bytes are `start` to `stop`."""
    at = _geometry(name, tensor, path, limits)
    dtype, size = tensor.dtype, _bytes(tensor.dtype)
    shape = at.shape
    if dtype.pack > 1:
        if not shape:
            raise _error("BIN_GEOMETRY", path, f"tensor {name!r} has half a byte", key=name)
        shape = (*shape[:-1], shape[-1] * dtype.pack)
    spec = TensorSpec(shape, dtype)
    if 0 in shape:
        return StoredTensor(spec, start, start)
    numel = (stop - start) // size
    if any(stride == 0 and n > 1 for n, stride in zip(at.shape, at.strides, strict=True)):
        what = f"tensor {name!r} repeats elements (a stride of 0), which a small file can do without end"
        raise _error("BIN_EXPANDED", path, what, key=name, do=_SAVE)
    if at.offset + extent(at.shape, at.strides) > numel:
        what = f"tensor {name!r} ends at element {at.offset + extent(at.shape, at.strides)} of a storage of {numel}"
        raise _error("BIN_OUT_OF_BOUNDS", path, what, key=name)
    if prod(at.shape) > numel:
        what = f"tensor {name!r} has {prod(at.shape)} elements in a storage of {numel}"
        raise _error("BIN_EXPANDED", path, what, key=name, do=_SAVE)
    if is_row_major(at.shape, at.strides):
        begin = start + at.offset * size
        return StoredTensor(spec, begin, begin + prod(at.shape) * size)
    found = arranged(at.shape, at.strides, at.offset, numel) if dtype.pack == 1 else None
    if found is None:
        what = f"tensor {name!r} has shape {list(at.shape)} and strides {list(at.strides)}, which no slice has"
        raise _error("BIN_STRIDES", path, what, key=name, do=_SAVE)
    first = min(block.start for block in blocks(found))
    last = max(block.start + prod(block.shape) for block in blocks(found))
    view = StoredView(name, at.offset - first, at.strides)
    return StoredTensor(spec, start + first * size, start + last * size, view)


def _named(name: str, stored: StoredTensor, first: dict[object, str]) -> StoredTensor:
    """The tensor, read under the first name that reads the same."""
    spec, view = stored.spec, stored.view
    strides, offset = (row_major(spec.shape), 0) if view is None else (view.strides, view.offset)
    found = stored_arrangement(stored)
    if isinstance(found, Block) and found.at == tuple([(0, n) for n in found.shape]):
        # All of the block is wanted: a tensor and its transpose read the same.
        known = first.setdefault((stored.start + found.start * spec.dtype.bits // 8, found.shape, spec.dtype), name)
    else:
        place = stored.start + offset * spec.dtype.bits // 8
        known = first.setdefault((place, spec.shape, spec.dtype, strides), name)
    return stored if known == name else evolve(stored, view=StoredView(known, offset, strides))


# -- errors ------------------------------------------------------------------------------------------------------------

_SAVE: Final = "load it where it was made, and save what is wanted as a dict of plain tensors"


def _error(
    code: str,
    path: str,
    found: str,
    *,
    key: str | None = None,
    do: str = "it is damaged or made to deceive",
    **more: Any,
) -> HeaderError:
    return HeaderError(f"{path}: {found}; {do}", code=code, path=path, key=key, **more)


def _candidates(root: Any) -> tuple[tuple[str, ...], ...]:
    """Paths of dicts that hold tensors and nothing else, the first 64."""

    def only_tensors(path: tuple[str, ...], keys: tuple[str, ...]) -> bool:
        value = root
        for key in path:
            value = value[key]
        return len(value) == len(keys)

    return tuple(islice((path for path, keys in tensor_paths(root).items() if only_tensors(path, keys)), _SHOWN))


def _choices(candidates: tuple[tuple[str, ...], ...]) -> str:
    if not candidates:
        return "no dict in it holds tensors only; " + _SAVE
    shown = ", ".join(f"key={path[0] if len(path) == 1 else path!r}"[:120] for path in candidates[:4])
    return f"name the state dict with scan(path, key=...), or --key, here {shown}"


def _lost(root: Any, at: tuple[str, ...], path: str) -> HeaderError:
    found = _candidates(root)
    what = f"holds no {'/'.join(map(str, at))!r:.200}"
    return _error("BIN_NO_SUCH_KEY", path, what, key=at[-1], do=_choices(found), candidates=found)


def _mixed(root: Any, found: dict[str, Any], where: str, path: str) -> HeaderError:
    keys = tuple(key for key, item in found.items() if type(item) is not PickledTensor)
    shown = ", ".join(f"{key[:80]!r} ({_kind(found[key])})" for key in keys[:4])
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    candidates = _candidates(root)
    return _error(
        "BIN_NOT_A_STATE_DICT",
        path,
        f"holds more than tensors{where}: {shown}{more}",
        key=keys[0],
        keys=keys,
        candidates=candidates,
        do=_choices(candidates),
    )


def _kind(value: Any) -> str:
    return str(getattr(value, "name", type(value).__name__))[:80]
