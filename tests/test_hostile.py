"""Files and folders made to deceive, numbered as in the project's list: each is read, or refused with its code."""

import json
import os
import pickle
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from funcmodel.core.wire import Limits
from funcmodel.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    HeaderError,
    IndexMismatchError,
    TruncatedError,
    UnsafePathError,
)
from funcmodel.records.plans import StateDictPlan
from funcmodel.run.scan import scan, scan_checkpoint

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Build = Callable[[Path], Any]


def file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text if isinstance(text, bytes) else text.encode("utf-8")
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


def two(a: tuple[int, int], b: tuple[int, int], size: int) -> bytes:
    """Two uint8 tensors at these offsets, in a file with `size` bytes of data."""
    spans = {"a": a, "b": b}
    return file(
        {k: {"dtype": "U8", "shape": [y - x], "data_offsets": [x, y]} for k, (x, y) in spans.items()}, bytes(size)
    )


FILES: list[tuple[str, str, bytes]] = [
    ("1", "TOO_SMALL", b""),
    ("2", "TOO_SMALL", b"\x02\0\0\0\0\0\0"),
    ("3", "HEADER_START", bytes(8)),
    ("3", "HEADER_START", bytes(16)),
    ("4", "HEADER_TOO_LARGE", b"\xff" * 8 + b"{}"),
    ("5", "HEADER_PAST_EOF", file("{}", length=100)),
    ("6 text", "BAD_JSON", file(entry(), bytes(4), length=len(json.dumps(entry())) + 4)),
    ("6 bytes", "BAD_UTF8", file(entry(), b"\xff\xff\xff}", length=len(json.dumps(entry())) + 4)),
    ("9", "HEADER_START", file(b" " + json.dumps(entry()).encode(), bytes(4))),
    ("10", "HEADER_START", file("\ufeff{}")),
    ("11", "BAD_JSON", file("{}\0\0")),
    ("11 newline", "BAD_JSON", file("{}\n")),
    ("12", "BAD_JSON", file("{}{}")),
    ("13", "BAD_UTF8", file(b'{"\xc3\x28":0}')),
    ("13 surrogate", "BAD_UTF8", file(b'{"\xed\xa0\x80":0}')),
    ("13 escaped surrogate", "BAD_JSON", file('{"\\ud800":' + json.dumps(F32) + "}", bytes(4))),
    ("14", "DUPLICATE_KEY", file(f'{{"a":{json.dumps(F32)},"a":{json.dumps({**F32, "dtype": "I32"})}}}', bytes(4))),
    ("15", "DUPLICATE_KEY", file(f'{{"a":{json.dumps(F32)},"\\u0061":{json.dumps(F32)}}}', bytes(4))),
    (
        "16 entry",
        "DUPLICATE_KEY",
        file('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    ),
    ("16 metadata", "DUPLICATE_KEY", file('{"__metadata__":{"a":"b","a":"b"}}')),
    ("17", "ENTRY_FIELDS", file(entry(strides=[1]), bytes(4))),
    ("17 missing", "ENTRY_FIELDS", file({"w": {"dtype": "F32", "shape": [1]}}, bytes(4))),
    ("17 no object", "ENTRY_FIELDS", file({"w": ["F32", [1], [0, 4]]}, bytes(4))),
    ("17 header is an entry", "ENTRY_FIELDS", file(F32, bytes(4))),
    ("17 nested", "ENTRY_FIELDS", file({"w": {"dtype": F32, "x": F32, "y": F32}}, bytes(4))),
    ("18", "METADATA_TYPE", file({"__metadata__": {"a": 1}})),
    ("18 tensor-shaped", "METADATA_TYPE", file({"__metadata__": F32}, bytes(4))),
    ("18 null", "METADATA_TYPE", file({"__metadata__": None})),
    ("19", "OVERLAP", two((0, 4), (0, 4), 4)),
    ("19 inside", "OVERLAP", two((0, 4), (1, 3), 4)),
    ("20", "OVERLAP", two((0, 4), (2, 6), 6)),
    ("21 start", "HOLE", two((1, 4), (4, 6), 6)),
    ("21 middle", "HOLE", two((0, 2), (4, 6), 6)),
    ("21 empty tensor inside another", "OVERLAP", two((0, 4), (2, 2), 4)),
    ("22", "TRAILING_BYTES", file(entry(), bytes(4) + b"PK\3\4")),
    ("22 no tensors", "TRAILING_BYTES", file({}, b"PK\3\4")),
    ("23", "TRUNCATED", file(entry(), bytes(3))),
    ("24 negative", "OFFSETS", file(entry(offsets=[-4, 0]), bytes(4))),
    ("24 float", "OFFSETS", file(entry(offsets=[0, 4.0]), bytes(4))),
    ("24 exponent", "OFFSETS", file('{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4e0]}}', bytes(4))),
    ("24 minus zero", "OFFSETS", file('{"w":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', bytes(4))),
    ("24 string", "OFFSETS", file(entry(offsets=["0", "4"]), bytes(4))),
    ("24 bool", "OFFSETS", file(entry("U8", [1], [False, True]), bytes(1))),
    ("24 three", "OFFSETS", file(entry(offsets=[0, 4, 8]), bytes(4))),
    ("24 null", "OFFSETS", file(entry(offsets=None), bytes(4))),
    ("24 reversed", "OFFSETS", file(entry(offsets=[4, 0]), bytes(4))),
    ("24 size", "SIZE_MISMATCH", file(entry(offsets=[0, 8]), bytes(8))),
    ("25", "INT_TOO_LONG", file('{"w":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ("1" * 5000), bytes(4))),
    (
        "25 offsets",
        "INT_TOO_LONG",
        file('{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,%s]}}' % ("1" * 21), bytes(4)),
    ),
    ("26", "SHAPE_OVERFLOW", file(entry(shape=[2**32, 2**32]), bytes(4))),
    ("27", "SHAPE", file(entry(shape=[2**64 - 1, 0], offsets=[0, 0]))),
    ("28", "SHAPE_OVERFLOW", file(entry(shape=[0, 2**62, 2**62], offsets=[0, 0]))),
    ("29 bool", "SHAPE", file(entry(shape=[True]), bytes(4))),
    ("29 after a twin that is right", "SHAPE", file({"a": F32, **entry(shape=[True], offsets=[4, 8])}, bytes(8))),
    ("29 float after a twin", "SHAPE", file({"a": F32, **entry(shape=[1.0], offsets=[4, 8])}, bytes(8))),
    ("29 NaN", "NONFINITE_LITERAL", file('{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4))),
    (
        "29 Infinity",
        "NONFINITE_LITERAL",
        file('{"w":{"dtype":"F32","shape":[-Infinity],"data_offsets":[0,4]}}', bytes(4)),
    ),
    ("29 null", "SHAPE", file(entry(shape=[None]), bytes(4))),
    ("29 negative", "SHAPE", file(entry(shape=[-1]), bytes(4))),
    ("29 no list", "SHAPE", file(entry(shape="1"), bytes(4))),
    ("30", "NDIM", file(entry(shape=[1] * 1_000_000), bytes(4))),
    ("30 edge", "NDIM", file(entry(shape=[1] * 65), bytes(4))),
    ("31", "SUBBYTE_ALIGN", file(entry("F4", [3], [0, 2]), bytes(2))),
    ("31 F6", "SUBBYTE_ALIGN", file(entry("F6_E2M3", [3], [0, 3]), bytes(3))),
    ("33", "DTYPE", file(entry("F31"), bytes(4))),
    ("33 lower case", "DTYPE", file(entry("f32"), bytes(4))),
    ("33 null", "DTYPE", file(entry(None), bytes(4))),
    ("33 list", "DTYPE", file(entry(["F32"]), bytes(4))),
    ("35 empty", "NAME_EMPTY", file({"": F32}, bytes(4))),
    ("35 NUL", "NAME_CONTROL", file({"a\0b": F32}, bytes(4))),
    ("35 newline", "NAME_CONTROL", file({"a\nb": F32}, bytes(4))),
    ("35 raw newline", "BAD_JSON", file(b'{"a\nb":' + json.dumps(F32).encode() + b"}", bytes(4))),
    ("35 delete", "NAME_CONTROL", file({"a\x7fb": F32}, bytes(4))),
    ("35 1 MB", "NAME_TOO_LONG", file({"a" * 1_000_000: F32}, bytes(4))),
    ("38", "JSON_DEPTH", file('{"a":' + "[" * 1_000_000 + "]" * 1_000_000 + "}")),
    ("38 objects", "JSON_DEPTH", file('{"a":' * 1_000_000 + "0" + "}" * 1_000_000)),
    ("38 unclosed", "BAD_JSON", file('{"a":' + "[" * 10 + "}")),
    ("38 unclosed and deep", "JSON_DEPTH", file('{"a":' + "[" * 1_000_000 + "}")),
    ("49", "HEADER_TOO_LARGE", pickle.dumps({"w": list(range(100))}, protocol=4)),
    (
        "random",
        "HEADER_TOO_LARGE",
        torch.randint(1, 256, (1_000_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        .numpy()
        .tobytes(),
    ),
]


@pytest.mark.parametrize(("code", "data"), [pytest.param(c, d, id=f"{n} {c}") for n, c, d in FILES])
def test_a_file_is_refused_with_its_code(code: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    for asked in (path, tmp_path):
        with pytest.raises((HeaderError, TruncatedError)) as caught:
            scan(asked)
        assert (caught.value.code, caught.value.path) == (code, str(path))


def test_7_a_header_over_the_limit_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as out:
        out.write((100_000_001).to_bytes(8, "little") + b"{")
        out.truncate(200_000_000)
    with pytest.raises(HeaderError) as caught:
        scan(path)
    assert caught.value.code == "HEADER_TOO_LARGE"


def test_8_a_header_at_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps(entry()).encode()
    path.write_bytes(file(header.ljust(100_000_000), b"abcd"))
    assert scan(path)["w"].offset == 100_000_008


def kept(header: dict[str, Any], data: bytes) -> Build:
    def build(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(file(header, data))

    return build


def named(*names: str) -> dict[str, Any]:
    return {n: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, n in enumerate(names)}


HOSTILE = (
    "../../etc/passwd",
    "__class__.__init__",
    "a..b",
    ".",
    "/etc/passwd",
    "C:\\x",
    "\u202eoverride",
    "{i}",
    "x" * 4096,
)


@pytest.mark.parametrize(
    ("header", "data", "keys"),
    [
        pytest.param(entry("F6_E3M2", [4], [0, 3]), bytes(3), ("w",), id="32 a dtype that torch lacks"),
        pytest.param(entry("F32", [], [0, 4]), bytes(4), ("w",), id="34 0-dim"),
        pytest.param(entry("F32", [0, 7], [0, 0]), b"", ("w",), id="34 empty"),
        pytest.param(
            {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, **entry("F64", [1], [1, 9])},
            b"\1" + struct.pack("<Q", 0x7FF8_0000_DEAD_BEEF),
            ("a", "w"),
            id="34 unaligned, NaN payload",
        ),
        pytest.param(named(*HOSTILE), bytes(len(HOSTILE)), HOSTILE, id="36 names that look like paths"),
        pytest.param(named("\u00e9", "e\u0301"), bytes(2), ("\u00e9", "e\u0301"), id="37 NFC and NFD"),
        pytest.param({}, b"", (), id="no tensors"),
        pytest.param(entry("U8", [1] * 64, [0, 1]), b"\1", ("w",), id="30 edge"),
        pytest.param(
            {k: {"data_offsets": v["data_offsets"], "dtype": "U8", "shape": [1]} for k, v in named("b", "a").items()},
            b"ab",
            ("b", "a"),
            id="fields in another order",
        ),
    ],
)
def test_a_file_that_looks_odd_is_read_bit_for_bit(
    header: Any, data: bytes, keys: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file(header, data))
    plan = scan(tmp_path)
    whole = path.read_bytes()
    assert tuple(plan) == keys
    for key, stored in plan.items():
        start, stop = header[key]["data_offsets"]
        assert whole[stored.offset : stored.offset + stored.spec.nbytes] == data[start:stop]


def test_39_and_40_many_tensors(tmp_path: Path) -> None:
    many = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(100_000)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(file(many, bytes(100_000)))
    assert len(scan(path)) == 100_000
    path.write_bytes(file({k: {**v, "data_offsets": [0, 1]} for k, v in many.items()}, bytes(1)))
    with pytest.raises(HeaderError) as caught:
        scan(path)
    assert caught.value.code == "OVERLAP"


def test_41_a_terabyte_that_is_not_there_is_planned(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = file(entry("U8", [10**12], [0, 10**12]))
    with open(path, "wb") as out:
        out.write(header)
        try:
            out.truncate(len(header) + 10**12)
        except OSError:
            pytest.skip("this file system holds no sparse terabyte")
    assert scan(path)["w"].spec.nbytes == 10**12


# -- what is no file -------------------------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    try:
        os.chdir(path.parent)  # a socket's path may have 108 bytes
        server.bind(path.name)
    finally:
        os.chdir(here)
        server.close()


SPECIAL = [
    ("fifo", "NOT_REGULAR_FILE", fifo),
    ("directory", "NOT_REGULAR_FILE", Path.mkdir),
    ("/dev/zero", "NOT_REGULAR_FILE", lambda path: path.symlink_to("/dev/zero")),
    ("link to itself", "OPEN", lambda path: path.symlink_to(path.name)),
    ("dangling link", "OPEN", lambda path: path.symlink_to("nowhere")),
    ("socket", "NOT_REGULAR_FILE", unix_socket),
]


@pytest.mark.parametrize(("code", "make"), [pytest.param(c, m, id=f"42 {n}") for n, c, m in SPECIAL])
def test_42_what_is_no_regular_file_is_never_read(code: str, make: Build, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(CheckpointError) as caught:
        scan(tmp_path)
    assert (caught.value.code, caught.value.path) == (code, str(path))


@pytest.mark.parametrize(("code", "make"), [pytest.param(c, m, id=f"42 {n}") for n, c, m in SPECIAL])
def test_42_what_is_no_regular_file_is_no_shard(code: str, make: Build, tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / TWO).unlink()
    make(tmp_path / TWO)
    with pytest.raises(CheckpointError) as caught:
        scan(tmp_path)
    assert (caught.value.code, caught.value.path) == (code, str(tmp_path / TWO))


@pytest.mark.parametrize(
    "name", ["missing", "nul\0", "half\udc80", "x" * 5000], ids=["missing", "NUL", "surrogate", "long"]
)
def test_42_a_path_that_cannot_be_opened(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        scan(f"{tmp_path}/{name}")
    assert caught.value.code == "OPEN"


# -- indexes ---------------------------------------------------------------------------------------------------------

A, B, C = torch.tensor([1.0]), torch.tensor([2.0, 3.0]), torch.tensor([4], dtype=torch.int8)


def shards(folder: Path, **change: Any) -> None:
    """A good checkpoint of two shards, `a` and `b` in the first, `c` in the second, but for changes in `weight_map`."""
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({"a": A, "b": B}, folder / ONE)
    safetensors.torch.save_file({"c": C}, folder / TWO)
    where = {**{"a": ONE, "b": ONE, "c": TWO}, **change}
    index(folder, {"weight_map": {k: v for k, v in where.items() if v is not ...}})


def index(folder: Path, content: Any) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / INDEX).write_bytes(raw)


def changed(**change: Any) -> Build:
    return lambda folder: shards(folder, **change)


def written(content: Any) -> Build:
    def build(folder: Path) -> None:
        shards(folder)
        index(folder, content)

    return build


def outside(folder: Path) -> Path:
    there = folder.parent / "outside"
    there.mkdir()
    safetensors.torch.save_file({"c": C}, there / "x.safetensors")
    return there


def linked_shard(folder: Path) -> None:
    shards(folder)
    (folder / TWO).unlink()
    (folder / TWO).symlink_to(outside(folder) / "x.safetensors")


def linked_parent(folder: Path) -> None:
    shards(folder, c="sub/x.safetensors")
    (folder / "sub").symlink_to(outside(folder), target_is_directory=True)


def linked_single(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside(folder) / "x.safetensors")


def linked_index(folder: Path) -> None:
    shards(folder)
    (folder / INDEX).rename(outside(folder) / INDEX)
    (folder / INDEX).symlink_to(folder.parent / "outside" / INDEX)


def linked_blobs_elsewhere(folder: Path) -> None:
    """A folder that calls itself `blobs` but is not the cache's."""
    shards(folder)
    blobs = folder.parent / "evil" / "blobs"
    blobs.mkdir(parents=True)
    (folder / TWO).rename(blobs / "c0ffee")
    (folder / TWO).symlink_to(blobs / "c0ffee")


def missing_shard(folder: Path) -> None:
    shards(folder)
    (folder / TWO).unlink()


def twice(folder: Path) -> None:
    shards(folder)
    safetensors.torch.save_file({"c": C, "a": A}, folder / TWO)


def single_and_index(folder: Path) -> None:
    shards(folder)
    safetensors.torch.save_file({"a": A}, folder / "model.safetensors")


def truncated_shard(folder: Path) -> None:
    shards(folder)
    os.truncate(folder / ONE, (folder / ONE).stat().st_size - 1)


def pickled_shard(folder: Path) -> None:
    shards(folder)
    (folder / TWO).write_bytes(pickle.dumps({"c": [1.0]}, protocol=4))


BOMB = json.dumps({"metadata": 0, "weight_map": {"a": ONE}})
INDEXES: list[tuple[str, str, type[CheckpointError], Build]] = [
    ("43", "SHARD_ESCAPES", UnsafePathError, changed(c="../outside/x.safetensors")),
    ("43 inside", "SHARD_ESCAPES", UnsafePathError, changed(c="sub/../../x.safetensors")),
    ("43 harmless", "SHARD_ESCAPES", UnsafePathError, changed(c=f"./{TWO}")),
    ("44", "SHARD_ESCAPES", UnsafePathError, changed(c="/etc/x.safetensors")),
    ("45 drive", "SHARD_ESCAPES", UnsafePathError, changed(c="C:\\x.safetensors")),
    ("45 drive, relative", "SHARD_ESCAPES", UnsafePathError, changed(c="C:x.safetensors")),
    ("45 UNC", "SHARD_ESCAPES", UnsafePathError, changed(c="\\\\host\\share\\x.safetensors")),
    ("45 UNC, slashes", "SHARD_ESCAPES", UnsafePathError, changed(c="//host/share/x.safetensors")),
    ("45 backslash", "SHARD_ESCAPES", UnsafePathError, changed(c="..\\x.safetensors")),
    ("46 shard", "SYMLINK_ESCAPES", UnsafePathError, linked_shard),
    ("46 parent", "SYMLINK_ESCAPES", UnsafePathError, linked_parent),
    ("46 single", "SYMLINK_ESCAPES", UnsafePathError, linked_single),
    ("46 index", "SYMLINK_ESCAPES", UnsafePathError, linked_index),
    ("46 blobs", "SYMLINK_ESCAPES", UnsafePathError, linked_blobs_elsewhere),
    ("48", "SHARD_EXTENSION", IndexMismatchError, changed(c="pytorch_model.bin")),
    ("49", "HEADER_TOO_LARGE", HeaderError, pickled_shard),
    ("50 null", "SHARD_NAME", IndexMismatchError, changed(c=None)),
    ("50 int", "SHARD_NAME", IndexMismatchError, changed(c=1)),
    ("50 list", "SHARD_NAME", IndexMismatchError, changed(c=[TWO])),
    ("50 empty", "SHARD_NAME", IndexMismatchError, changed(c="")),
    ("50 NUL", "SHARD_NAME", IndexMismatchError, changed(c="a\0.safetensors")),
    ("50 dot", "SHARD_ESCAPES", UnsafePathError, changed(c=".")),
    ("50 dots", "SHARD_ESCAPES", UnsafePathError, changed(c="..")),
    ("51 none", "INDEX_SHAPE", IndexMismatchError, written({"metadata": {}})),
    ("51 empty", "INDEX_SHAPE", IndexMismatchError, written({"weight_map": {}})),
    ("51 list", "INDEX_SHAPE", IndexMismatchError, written({"weight_map": [ONE]})),
    ("51 no object", "INDEX_SHAPE", IndexMismatchError, written([])),
    ("51 metadata", "INDEX_SHAPE", IndexMismatchError, written({"metadata": [], "weight_map": {"a": ONE}})),
    ("52 UTF-16", "BAD_UTF8", IndexMismatchError, written(json.dumps({"weight_map": {"a": ONE}}).encode("utf-16"))),
    ("52 truncated", "BAD_JSON", IndexMismatchError, written(json.dumps({"weight_map": {"a": ONE}}).encode()[:-1])),
    ("52 empty", "BAD_JSON", IndexMismatchError, written(b"")),
    ("52 deep", "JSON_DEPTH", IndexMismatchError, written(b"[" * 100_000)),
    ("52 long integer", "INT_TOO_LONG", IndexMismatchError, written(BOMB.replace("0,", "9" * 5001 + ",").encode())),
    ("52 NaN", "NONFINITE_LITERAL", IndexMismatchError, written(b'{"metadata": NaN}')),
    (
        "53",
        "DUPLICATE_KEY",
        IndexMismatchError,
        written(b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
    ),
    ("53 outside", "DUPLICATE_KEY", IndexMismatchError, written(b'{"weight_map": {}, "weight_map": {}}')),
    ("54 wrong shard", "KEY_NOT_AS_INDEXED", IndexMismatchError, changed(a=TWO)),
    ("54 not indexed", "KEY_NOT_AS_INDEXED", IndexMismatchError, changed(b=...)),
    ("55", "INDEXED_KEY_MISSING", IndexMismatchError, changed(ghost=ONE)),
    ("55 and a name", "NAME_CONTROL", IndexMismatchError, changed(**{"a\n": ONE})),
    ("56", "KEY_IN_TWO_SHARDS", IndexMismatchError, twice),
    ("57", "AMBIGUOUS", AmbiguousCheckpointError, single_and_index),
    ("60", "OPEN", IndexMismatchError, missing_shard),
    ("truncated shard", "TRUNCATED", TruncatedError, truncated_shard),
]


@pytest.mark.parametrize(("code", "kind", "build"), [pytest.param(c, k, b, id=f"{n} {c}") for n, c, k, b in INDEXES])
def test_a_folder_is_refused_with_its_code(
    code: str, kind: type[CheckpointError], build: Build, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    build(folder)
    with pytest.raises(kind) as caught:
        scan(folder)
    assert caught.value.code == code
    assert caught.value.path.startswith(str(folder))


@pytest.mark.parametrize(
    ("build", "key"),
    [
        pytest.param(changed(a=TWO), "a", id="54"),
        pytest.param(changed(ghost=ONE), "ghost", id="55"),
        pytest.param(twice, "a", id="56"),
    ],
)
def test_54_to_56_the_error_names_the_key(build: Build, key: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    build(folder)
    with pytest.raises(IndexMismatchError) as caught:
        scan(folder)
    assert key in caught.value.keys


def test_47_links_within_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    repo = tmp_path / "models--me--mine"
    for folder in ("snapshots/1f3e", "snapshots/1f3e/unet"):
        here = repo / folder
        here.mkdir(parents=True)
        shards(here)
        (repo / "blobs").mkdir(exist_ok=True)
        for i, name in enumerate((ONE, TWO, INDEX)):
            blob = repo / "blobs" / f"{i}{folder.replace('/', '')}"
            (here / name).rename(blob)
            (here / name).symlink_to(os.path.relpath(blob, here))
        assert sorted(scan(here)) == ["a", "b", "c"]


def test_57_the_caller_may_say_which(tmp_path: Path) -> None:
    single_and_index(tmp_path)
    assert list(scan(tmp_path, which="single")) == ["a"]
    assert sorted(scan(tmp_path, which="index")) == ["a", "b", "c"]
    assert scan_checkpoint(tmp_path, which="single").ignored == (ONE, TWO, INDEX)
    assert scan_checkpoint(tmp_path, which="index").ignored == ("model.safetensors",)


def test_58_and_59_what_the_index_does_not_list_is_ignored_and_reported(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    safetensors.torch.save_file({"a": A + 5}, tmp_path / "zzz.safetensors")
    found = scan_checkpoint(tmp_path)
    assert found.ignored == ("pytorch_model.bin", "zzz.safetensors")
    assert [os.path.basename(f.path) for f in found.files] == [ONE, TWO]


def test_60_a_missing_shard_is_named_with_its_keys(tmp_path: Path) -> None:
    missing_shard(tmp_path)
    with pytest.raises(IndexMismatchError) as caught:
        scan(tmp_path)
    assert (caught.value.path, caught.value.file, caught.value.keys) == (str(tmp_path / TWO), TWO, ("c",))


def test_limits_are_arguments(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file(entry("U8", [1, 1, 1], [0, 1]), b"\1"))
    for limits in (Limits(ndim=2), Limits(header_bytes=10), Limits(name_chars=0), Limits(json_depth=2)):
        with pytest.raises(HeaderError):
            scan(path, limits=limits)
    path.write_bytes(file(entry("U8", [1] * 65, [0, 1]), b"\1"))
    assert isinstance(scan(path, limits=Limits(ndim=65)), StateDictPlan)
    shards(tmp_path / "sharded")
    with pytest.raises(CheckpointError) as caught:
        scan(tmp_path / "sharded", limits=Limits(index_bytes=20))
    assert caught.value.code == "INDEX_TOO_LARGE"
    (tmp_path / "config.json").write_text("{}".ljust(30))
    with pytest.raises(CheckpointError) as caught:
        scan_checkpoint(tmp_path, limits=Limits(config_bytes=20, ndim=65))
    assert caught.value.code == "INDEX_TOO_LARGE"
