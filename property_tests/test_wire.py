"""Laws of the wire: 40 (headers), 43, 44, and agreement with safetensors' own reader on whatever both accept."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from funcmodel.core.wire import (
    parse_config,
    parse_header,
    parse_index,
    render_config,
    render_header,
    render_index,
)
from funcmodel.errors import CheckpointError, HeaderError, TruncatedError
from funcmodel.records.checkpoint import FileSpec, IndexSpec, StoredTensor
from funcmodel.records.config import Config
from funcmodel.records.expressions import Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.scan import scan, scan_checkpoint
from property_tests.strategies import checkpoints as c


@contextmanager
def on_disk(folder: c.Folder) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield c.write(folder, Path(path) / "checkpoint")


def read(stored: Read) -> bytes:
    with open(stored.file.path, "rb") as file:
        file.seek(stored.offset)
        return file.read(stored.spec.nbytes)


def outcome(parse: Callable[..., object], data: bytes) -> object:
    """What `parse` returns, or the checkpoint error that it raises; any other exception passes."""
    try:
        return parse(data, path="x")
    except CheckpointError as error:
        return error


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@given(c.contents(), c.metadata, st.sampled_from((1, 8, 512, 4096)))
def test_law_43_parse_header_inverts_render_header(
    entries: dict[str, TensorSpec], metadata: dict[str, str], align: int
) -> None:
    """parse_header(render_header(f)) = f, and data starts at a multiple of `align`."""
    header, offsets = render_header(entries, metadata, align=align)
    nbytes = len(header) + sum(spec.nbytes for spec in entries.values())
    found = parse_header(header, path="m.safetensors", nbytes=nbytes)
    assert len(header) % align == 0
    assert found == FileSpec(
        path="m.safetensors",
        nbytes=nbytes,
        tensors=FrozenMap({k: StoredTensor(s, offsets[k], offsets[k] + s.nbytes) for k, s in entries.items()}),
        metadata=FrozenMap(metadata),
        fingerprint=found.fingerprint,
    )
    assert list(found.tensors) == list(entries)


@given(st.binary(max_size=200) | c.mutated())
@example(b"")
@example(b"\x02\0\0\0\0\0\0\0{}")
@example(c.render('{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', bytes(4)))
@example(c.render('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'))
@example(c.render('{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'))
@example(c.render('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', bytes(4)))
def test_law_43_any_bytes_are_a_file_or_a_checkpoint_error(data: bytes) -> None:
    """parse_header(b) is a FileSpec on which safetensors agrees, or raises a CheckpointError with a code."""
    found = outcome(parse_header, data)
    if not isinstance(found, FileSpec):
        assert isinstance(found, HeaderError | TruncatedError)
        assert (bool(found.code), found.path) == (True, "x")
        return
    theirs = {
        name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in safetensors.deserialize(data)
    }
    ours = {name: (t.spec.dtype.safetensors, t.spec.shape, data[t.start : t.stop]) for name, t in found.tensors.items()}
    assert ours == theirs


@given(st.binary(max_size=100) | st.text('{}[]",:\\ab019.eE- \n').map(str.encode))
def test_law_43_any_bytes_are_an_index_and_a_config_or_a_checkpoint_error(data: bytes) -> None:
    """parse_index(b), parse_config(b) are records, or raise a CheckpointError with a code."""
    for parse in (parse_index, parse_config):
        found = outcome(parse, data)
        if isinstance(found, CheckpointError):
            assert (bool(found.code), found.path) == (True, "x")
        else:
            assert isinstance(found, IndexSpec | Config)


@given(c.checkpoints())
def test_law_40_what_safetensors_writes_is_scanned_byte_for_byte(folder: c.Folder) -> None:
    """scan(save_file(t)) reads t."""
    with on_disk(folder) as path:
        plan = scan(path, variant=folder.variant)
        found = {key: (stored.spec.dtype.torch, read(stored)) for key, stored in plan.items()}
        ours = {key: tuple(stored.spec.shape) for key, stored in plan.items()}
    assert found == {key: (str(t.dtype)[len("torch.") :], raw(t)) for key, t in folder.tensors.items()}
    assert ours == {key: tuple(t.shape) for key, t in folder.tensors.items()}


@given(c.state_dicts(), c.metadata)
def test_law_40_safetensors_reads_the_headers_that_we_write(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """load(render_header(t) + bytes of t) ~ t."""
    names = {str(t).rpartition(".")[2]: t for t in c.TORCH}
    dtypes = {torch_dtype: name for name, torch_dtype in names.items()}
    header, offsets = render_header({k: TensorSpec(t.shape, dtypes[t.dtype]) for k, t in tensors.items()}, metadata)
    data = bytearray(header)
    for key, tensor in tensors.items():
        assert offsets[key] == len(data)
        data += raw(tensor)
    found = safetensors.torch.load(bytes(data))
    assert {k: (t.dtype, t.shape, raw(t)) for k, t in found.items()} == {
        k: (t.dtype, t.shape, raw(t)) for k, t in tensors.items()
    }


@given(c.truncated())
def test_law_44_a_truncated_file_is_refused_before_any_weight_is_read(folder: c.Folder) -> None:
    """scan(truncated) raises, with the file's name."""
    with on_disk(folder) as path:
        with pytest.raises((HeaderError, TruncatedError)) as caught:
            scan(path, variant=folder.variant)
        assert caught.value.code == folder.code
        assert caught.value.path.startswith(str(path))


@given(c.lying())
def test_law_44_an_index_that_lies_is_refused(folder: c.Folder) -> None:
    """scan raises the code of the lie."""
    with on_disk(folder) as path:
        with pytest.raises(CheckpointError) as caught:
            scan(path, variant=folder.variant)
        assert caught.value.code == folder.code


@given(st.text(max_size=8) | st.text("./\\:a", max_size=8))
@example("..")
@example("a/../../b")
@example("~/x")
@example("c:x")
def test_law_44_paths_never_leave_the_folder(stem: str) -> None:
    """A shard that an index may name lies below the index's folder."""
    shard = f"{stem}.safetensors"
    found = outcome(parse_index, json.dumps({"weight_map": {"w": shard}}).encode())
    if not isinstance(found, IndexSpec):
        assert isinstance(found, CheckpointError)
        assert found.code in {"SHARD_ESCAPES", "SHARD_NAME", "BAD_JSON"}
        return
    (name,) = found.weight_map.values()
    for root in ("/data/folder", "/"):
        joined = os.path.normpath(os.path.join(root, name))
        assert joined.startswith(root if root == "/" else root + "/")
        assert joined.removeprefix(root).lstrip("/") == name


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**19), 10**19) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=4), json_values, max_size=4),
    st.sampled_from((None, 1, 2, 4, "\t")),
    st.booleans(),
    st.sampled_from(("", "\n")),
)
def test_a_config_that_python_wrote_comes_back_byte_for_byte(
    fields: dict[str, object], indent: int | str | None, ascii_: bool, ending: str
) -> None:
    """render_config(parse_config(text)) = text; parse_config(render_config(c)) = c."""
    text = json.dumps(fields, indent=indent, ensure_ascii=ascii_) + ending
    config = parse_config(text)
    assert render_config(config) == text
    assert parse_config(render_config(Config(fields))) == Config(fields) == config
    assert list(config) == list(fields)


@given(
    st.dictionaries(c.names, st.integers(1, 4).map(lambda i: f"model-{i:05}-of-00004.safetensors"), min_size=1),
    st.dictionaries(st.text(max_size=4), st.integers(0, 2**60) | st.text(max_size=4), max_size=3),
)
def test_law_43_parse_index_inverts_render_index(weight_map: dict[str, str], metadata: dict[str, object]) -> None:
    """parse_index(render_index(i)) = i."""
    found = parse_index(render_index(weight_map, FrozenMap(metadata)).encode())
    assert found.weight_map == weight_map
    assert found.metadata == metadata


@given(c.checkpoints())
def test_the_strategies_make_folders_that_safetensors_reads(folder: c.Folder) -> None:
    """The union of what safetensors finds in the files is the folder's truth."""
    found: dict[str, torch.Tensor] = {}
    for name, data in folder.files.items():
        if name.endswith(".safetensors"):
            found |= safetensors.torch.load(data)
    assert {k: (t.dtype, t.shape, raw(t)) for k, t in found.items()} == {
        k: (t.dtype, t.shape, raw(t)) for k, t in folder.tensors.items()
    }


@given(c.sharded())
def test_scan_is_deterministic_and_every_file_has_one_ref(folder: c.Folder) -> None:
    """scan(f) = scan(f); keys of one file share one FileRef."""
    with on_disk(folder) as path:
        plan, again = scan(path, variant=folder.variant), scan(path, variant=folder.variant)
        assert plan == again
        assert hash(plan) == hash(again)
        assert list(plan) == list(again)
        refs = [stored.file for stored in plan.values()]
        assert len({id(ref) for ref in refs}) == len(set(refs))
        assert {ref.path for ref in refs} == {file.path for file in scan_checkpoint(path, variant=folder.variant).files}
