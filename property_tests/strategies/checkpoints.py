"""Checkpoint folders as values: whole ones, written by safetensors itself, and ones that lie, in a known way."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from attrs import evolve, frozen
from hypothesis import strategies as st

from funcmodel.records.dtypes import FROM_SAFETENSORS
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec

TORCH = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
# Names that a reader might split, normalize, open or evaluate. They are opaque text.
HOSTILE_NAMES = (
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\x",
    "__class__.__init__",
    "a..b",
    ".",
    "..",
    " ",
    "é",
    "e\u0301",
    "\u202ename",
    "{i}",
    "a/b",
    "null",
    "0",
    "dtype",
    '"',
    "\\",
    "[[{",
    "x" * 300,
)
names = st.sampled_from(HOSTILE_NAMES) | st.lists(
    st.sampled_from(("model", "layers", "0", "1", "weight", "bias")), min_size=1, max_size=3
).map(".".join)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@frozen(kw_only=True)
class Folder:
    """A checkpoint folder, not yet on a disk.

    Attributes:
        files: name to bytes.
        tensors: key to the tensor that a correct reader finds; the truth even where `code` says the folder lies.
        variant: what to ask for.
        code: the code of the error that a reader must raise, None where it must read.
    """

    files: FrozenMap[str, bytes]
    tensors: FrozenMap[str, Any]
    variant: str | None = None
    code: str | None = None


def write(folder: Folder, path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, data in folder.files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def render(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file from a header that need not be right: an object, text, or bytes."""
    text = header if isinstance(header, str | bytes) else json.dumps(header, ensure_ascii=False)
    raw = text if isinstance(text, bytes) else text.encode("utf-8")
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape, dtype = draw(shapes), draw(st.sampled_from(TORCH))
    numel = torch.Size(shape).numel()
    size = numel * dtype.itemsize
    # A few distinct bytes, so that a tensor read from the wrong place differs; bool must hold 0 or 1.
    top = 1 if dtype is torch.bool else 255
    raw = draw(st.lists(st.integers(0, top), min_size=size, max_size=size))
    return torch.tensor(raw, dtype=torch.uint8).view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def state_dicts(min_size: int = 0, max_size: int = 5) -> st.SearchStrategy[dict[str, torch.Tensor]]:
    return st.dictionaries(names, tensors(), min_size=min_size, max_size=max_size)


@st.composite
def singles(draw: st.DrawFn) -> Folder:
    """One file, under a name that some library uses, with or without a variant, metadata and other files beside."""
    found = draw(state_dicts())
    stem = draw(st.sampled_from(("model", "diffusion_pytorch_model", "adapter_model", "mine")))
    variant = draw(st.sampled_from((None, "fp16", "ema.v2")))
    metadata = draw(st.none() | st.dictionaries(st.text("ab é", max_size=3), st.text(max_size=3), max_size=2))
    # Of no tensors and empty metadata, safetensors 0.8 makes a file that it refuses itself.
    data = safetensors.torch.save(found, metadata or None)
    name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    beside = draw(st.sampled_from(({}, {"pytorch_model.bin": b"\x80\x04"}, {"tokenizer.json": b"{}"})))
    return Folder(files=FrozenMap({name: data, **beside}), tensors=FrozenMap(found), variant=variant)


@st.composite
def sharded(draw: st.DrawFn, min_shards: int = 1) -> Folder:
    """Several files and an index, named by convention or at will."""
    found = draw(state_dicts(min_size=max(min_shards, 1)))
    count = draw(st.integers(min_shards, max(min_shards, min(3, len(found)))))
    # The first keys give each shard one, the rest fall where they will.
    homes = [*range(count), *draw(st.lists(st.integers(0, count - 1), min_size=len(found), max_size=len(found)))]
    variant = draw(st.sampled_from((None, "fp16")))
    dot = f".{variant}" if variant else ""
    style = draw(
        st.sampled_from(("model{dot}-{i:05}-of-{n:05}", "part{i}", "sub/part{i}", "model-tag1-{i:05}-of-{n:05}"))
    )
    files = [style.format(dot=dot, i=i + 1, n=count) + ".safetensors" for i in range(count)]
    groups: list[dict[str, torch.Tensor]] = [{} for _ in files]
    for home, (key, value) in zip(homes, found.items(), strict=False):
        groups[home][key] = value
    index: dict[str, Any] = {"weight_map": {key: files[i] for i, group in enumerate(groups) for key in group}}
    metadata = draw(st.sampled_from((..., None, {}, {"total_size": 12, "more": [1, {"a": None}]})))
    if metadata is not ...:
        index["metadata"] = metadata
    written = {file: safetensors.torch.save(group) for file, group in zip(files, groups, strict=True)}
    written[f"model.safetensors.index{dot}.json"] = json.dumps(index, indent=draw(st.sampled_from((None, 2)))).encode()
    return Folder(files=FrozenMap(written), tensors=FrozenMap(found), variant=variant)


def checkpoints() -> st.SearchStrategy[Folder]:
    return singles() | sharded()


def index_name(folder: Folder) -> str:
    return next(name for name in folder.files if ".index" in name)


def with_index(folder: Folder, change: Mapping[str, str | None], code: str) -> Folder:
    """The folder with another `weight_map`; None removes a key."""
    name = index_name(folder)
    index = json.loads(folder.files[name])
    index["weight_map"] = {k: v for k, v in {**index["weight_map"], **change}.items() if v is not None}
    return evolve(folder, files=FrozenMap({**folder.files, name: json.dumps(index).encode()}), code=code)


@st.composite
def lying(draw: st.DrawFn) -> Folder:
    """A sharded folder whose index and shards disagree, or whose index points where it must not."""
    folder = draw(sharded(min_shards=2))
    where: dict[str, str] = json.loads(folder.files[index_name(folder)])["weight_map"]
    key, other = draw(st.permutations(list(where)).filter(lambda keys: where[keys[0]] != where[keys[1]]))[:2]
    home = where[key]
    alone = list(where.values()).count(home) == 1
    escapes = (
        "../x.safetensors",
        "/x.safetensors",
        "a/../../x.safetensors",
        "C:\\x.safetensors",
        "\\\\h\\x.safetensors",
    )
    match draw(st.integers(0, 6)):
        case 0:
            return with_index(folder, {key: where[other]}, "INDEXED_KEY_MISSING" if alone else "KEY_NOT_AS_INDEXED")
        case 1:
            return with_index(folder, {"ghost": home}, "INDEXED_KEY_MISSING")
        case 2 if not alone:
            return with_index(folder, {key: None}, "KEY_NOT_AS_INDEXED")
        case 3:
            twice = safetensors.torch.save(
                {**{k: folder.tensors[k] for k, v in where.items() if v == where[other]}, key: folder.tensors[key]}
            )
            return evolve(folder, files=FrozenMap({**folder.files, where[other]: twice}), code="KEY_IN_TWO_SHARDS")
        case 4:
            gone = FrozenMap({name: data for name, data in folder.files.items() if name != home})
            return evolve(folder, files=gone, code="OPEN")
        case 5:
            return with_index(folder, {key: "pytorch_model.bin"}, "SHARD_EXTENSION")
        case _:
            return with_index(folder, {key: draw(st.sampled_from(escapes))}, "SHARD_ESCAPES")


@st.composite
def truncated(draw: st.DrawFn) -> Folder:
    """A folder of which one file of weights ends too early."""
    folder = draw(checkpoints())
    name = draw(st.sampled_from([n for n in folder.files if n.endswith(".safetensors")]))
    data = folder.files[name]
    cut = draw(st.integers(0, len(data) - 1))
    n = int.from_bytes(data[:8], "little")
    code = "TOO_SMALL" if cut < 8 else "HEADER_PAST_EOF" if cut < 8 + n else "TRUNCATED"
    return evolve(folder, files=FrozenMap({**folder.files, name: data[:cut]}), code=code)


# -- headers ---------------------------------------------------------------------------------------------------------

STORABLE = tuple(FROM_SAFETENSORS.values())


@st.composite
def storable_specs(draw: st.DrawFn) -> TensorSpec:
    """A spec that a safetensors file can hold: what is narrower than a byte ends on one."""
    dtype = draw(st.sampled_from(STORABLE))
    shape = draw(shapes)
    if dtype.bits % 8 and TensorSpec(shape, dtype).numel * dtype.bits % 8:
        shape = (*shape, 4)
    return TensorSpec(shape, dtype)


def contents() -> st.SearchStrategy[dict[str, TensorSpec]]:
    return st.dictionaries(names, storable_specs(), max_size=5)


texts = st.text(max_size=4)
metadata = st.dictionaries(texts, texts, max_size=3)
ODD_VALUES = (None, True, False, -1, 0, 1, 4, 2**63, 2**64, 1.0, -0.0, "F32", "f32", [], [0], [1, 2, 3], {}, {"a": 1})
ODD_TEXTS = (
    '"a":1,',
    "-0",
    "1e0",
    "NaN",
    "Infinity",
    "\\u0061",
    "\\ud800",
    "\\",
    '"',
    "[",
    "]",
    "{",
    "}",
    ",",
    " ",
    "\n",
    "\0",
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A safetensors file of a few tensors, changed in a few places: in its values, its text, its length or its data."""
    header, data = _valid(draw)
    entries = [name for name in header if name != "__metadata__"]
    for _ in range(draw(st.integers(0, 2))):
        field = draw(st.sampled_from(("dtype", "shape", "data_offsets", "extra")))
        entry = header[draw(st.sampled_from(entries))] if entries else header
        value = entry.get(field)
        if isinstance(value, list) and value and draw(st.booleans()):
            value[draw(st.integers(0, len(value) - 1))] = draw(st.sampled_from(ODD_VALUES) | st.integers(0, 40))
        else:
            entry[field] = draw(st.sampled_from(ODD_VALUES))
    order = draw(st.permutations(list(header)))
    text = json.dumps({name: header[name] for name in order}, ensure_ascii=draw(st.booleans()))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(ODD_TEXTS)) + text[at + draw(st.integers(0, 2)) :]
    raw = text.encode("utf-8") + b" " * draw(st.integers(0, 2))
    drift = draw(st.sampled_from((0, 0, 0, 0, 1, -1, 8, 2**62)))
    return render(raw, data + draw(st.sampled_from((b"", b"", b"", b"\0"))), length=max(0, len(raw) + drift))


def _valid(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {}
    end = 0
    for name, spec in draw(contents()).items():
        header[name] = {
            "dtype": spec.dtype.safetensors,
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    if draw(st.booleans()):
        header["__metadata__"] = draw(metadata)
    return header, bytes(i % 251 for i in range(end))
