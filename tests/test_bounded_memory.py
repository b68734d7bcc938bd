"""Peak memory of the readers: what is made to cost much is refused within 64 MiB beside the file, the like is read."""

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import funcmodel as fm

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
MIB = 1 << 20
ALLOWED = 64 * MIB
MEASURE = """
import json, os, sys
import funcmodel as fm
import funcmodel.run.torch_zip, funcmodel.core.headers, funcmodel.run.verify, torch

for line in sys.stdin:
    do, path = line.split()
    child = os.fork()  # every case starts with the same memory
    if not child:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        def highest():
            with open("/proc/self/status") as file:
                return next(int(row.split()[1]) << 10 for row in file if row.startswith("VmHWM:"))
        before = highest()
        try:
            if do == "verify":
                found = len(fm.verify(path).verified)
            elif do == "config":
                found = len(fm.scan_checkpoint(path).config)
            else:
                found = len(fm.scan(path))
        except fm.CheckpointError as error:
            found = error.code
        except BaseException as error:
            found = repr(error)
        print(json.dumps([found, highest() - before]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
Asked = Callable[[str, Path], tuple[Any, int]]


@pytest.fixture(scope="module")
def asked() -> Iterator[Asked]:
    """What a reader finds, and its peak of memory in bytes, in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", MEASURE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as to:
        assert to.stdin is not None
        assert to.stdout is not None

        def ask(do: str, path: Path) -> tuple[Any, int]:
            to.stdin.write(f"{do} {path}\n")  # type: ignore[union-attr]
            to.stdin.flush()  # type: ignore[union-attr]
            found, peak = json.loads(to.stdout.readline())  # type: ignore[union-attr]
            print(f"{found}, peak {peak / MIB:.1f} MiB")
            return found, peak

        yield ask
        to.stdin.close()


# -- pickles -----------------------------------------------------------------------------------------------------------

SIZE = (20 if NIGHTLY else 3) * MIB
STORAGE = b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x28t"


def counted(form: str, per: int) -> bytes:
    return b"".join((form % i).encode("latin1") for i in range(SIZE // per))


PICKLES: dict[str, tuple[bytes, bytes]] = {
    "dicts": (b"", b"}NNs"),
    "dicts of one name": (b"", b"}\x8c\x01wNs"),
    "empty dicts": (b"", b"}"),
    "lists": (b"", b"]"),
    "lists of one": (b"", b"]Na"),
    "remembered": (b"", b"}\x94"),
    "tuples in tuples": (b")", b"\x85"),
    "tuples": (b"", b"N\x85"),
    "long integers": (b"", b"\x8a\x09" + b"\1" * 9),
    "integers": (b"", b"M\1\1"),
    "floats": (b"", b"G\1\1\1\1\1\1\1\1"),
    "texts": (b"", b"\x8c\x03abc"),
    "bytes": (b"", b"C\x02ab"),
    "storages": (STORAGE + b"\x94", b"h\x00Q"),
    "tensors": (
        b"ctorch._utils\n_rebuild_tensor_v2\n\x94(" + STORAGE + b"QK\x00K\x01\x85K\x01\x85t\x94",
        b"h\x00h\x01R",
    ),
    "ordered dicts": (b"ccollections\nOrderedDict\n\x94", b"h\x00)R"),
}


def torch_zip(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "data/0": bytes(160)}.items():
            archive.writestr(f"archive/{name}", content)
    return path


CI = ("dicts", "lists of one", "remembered", "tuples", "texts", "tensors")


@pytest.mark.parametrize("name", PICKLES if NIGHTLY else CI)
def test_a_pickle_of_many_small_values(name: str, asked: Asked, tmp_path: Path) -> None:
    head, unit = PICKLES[name]
    path = torch_zip(tmp_path / "m.bin", b"\x80\x04" + head + unit * (SIZE // len(unit)) + b".")
    found, peak = asked("scan", path)
    assert found == "BIN_PICKLE"
    assert peak <= path.stat().st_size + ALLOWED


@pytest.mark.skipif(not NIGHTLY, reason="long")
def test_a_pickle_of_many_names(asked: Asked, tmp_path: Path) -> None:
    names = counted("\x8c\x08%08xN", 11)
    path = torch_zip(tmp_path / "m.bin", b"\x80\x04}(" + names + b"u.")
    found, peak = asked("scan", path)
    assert found in ("BIN_PICKLE", "BIN_NOT_A_STATE_DICT")
    assert peak <= path.stat().st_size + ALLOWED


def test_a_zip_of_many_empty_records(asked: Asked, tmp_path: Path) -> None:
    count = 1_000_000 if NIGHTLY else 130_000
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
    start = bytearray(path.read_bytes())
    entry = start[start.index(b"PK\1\2") : start.index(b"PK\5\6")]
    local, listed = start[: start.index(b"PK\1\2")], bytearray(entry)
    for i in range(count):
        name = b"a/%x" % i
        listed += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, *(0,) * 7, len(name), *(0,) * 5, len(local)) + name
        local += struct.pack("<4s5H3L2H", b"PK\3\4", 20, *(0,) * 7, len(name), 0) + name
    total, size, where = count + 1, len(listed), len(local)
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, total, total, size, where)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, where + size, 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(local + listed + end)
    found, peak = asked("scan", path)
    assert found == "BIN_ZIP"
    assert peak <= path.stat().st_size + ALLOWED


def test_a_state_dict_of_20_000_tensors_without_a_size(asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({f"layers.{i}.norm.num_batches_tracked": torch.tensor(i) for i in range(20_000)}, path)
    found, peak = asked("scan", path)
    assert found == 20_000
    assert peak <= path.stat().st_size + ALLOWED


# -- JSON --------------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, config: str = "{}") -> Path:
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    return folder


def members(count: int) -> str:
    return ",".join(f'"{i:x}":0' for i in range(count))


CONFIGS = {
    "lists": '{"a":[' + "[]," * 1_300_000 + "0]}",
    "objects": '{"a":[' + "{}," * 1_300_000 + "0]}",
    "members": "{" + members(400_000) + "}",
    "numbers": "{" + '"a":[' + "9999," * 780_000 + "0]}",
    "a name twice": '{"":0' + ',"":0' * 780_000 + "}",
    "indented": '{"a":' + "[" * 60 + "0," * 1_000_000 + "0" + "]" * 60 + "}",
    "astral": json.dumps({"a": "x" * 900_000 + "\U0001f600"}, ensure_ascii=False),
}


@pytest.mark.parametrize("name", CONFIGS if NIGHTLY else ("objects", "members", "astral"))
def test_a_config_that_would_take_much(name: str, asked: Asked, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, CONFIGS[name])
    size = (folder / "config.json").stat().st_size
    assert size < fm.Limits().config_bytes
    found, peak = asked("config", folder)
    assert found == (1 if name == "astral" else "INDEX_TOO_LARGE")
    assert peak <= size + ALLOWED


def test_a_config_of_a_megabyte(asked: Asked, tmp_path: Path) -> None:
    labels = {f"label {i}, of [many]: {{}}": i for i in range(25_000)}
    text = json.dumps({"label2id": labels, "template": "{,:[" * 50_000}, indent=2) + "\n"
    assert len(text) > MIB
    found, peak = asked("config", checkpoint(tmp_path, text))
    assert found == 2
    assert peak <= len(text) + ALLOWED
    config = fm.scan_checkpoint(tmp_path).config
    assert config is not None
    assert config["label2id"] == labels
    assert fm.core.wire.render_config(config) == text


SIDECARS = {
    "objects": '{"nbytes":1,"fingerprint":"","sha256":{"a":[' + "{}," * 2_000_000 + "0]}}",
    "members": '{"nbytes":1,"fingerprint":"","sha256":{' + members(700_000) + "}}",
}


@pytest.mark.parametrize("name", SIDECARS)
def test_digests_that_would_take_much(name: str, asked: Asked, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "model.safetensors.digests.json").write_text(SIDECARS[name])
    found, peak = asked("verify", folder)
    assert "INDEX_TOO_LARGE" in found
    assert peak <= len(SIDECARS[name]) + ALLOWED


def test_digests_of_50_000_tensors(tmp_path: Path, asked: Asked) -> None:
    save_file({f"layers.{i}.weight": torch.zeros(2) for i in range(50_000)}, tmp_path / "model.safetensors")
    fm.record_digests(tmp_path)
    assert (tmp_path / "model.safetensors.digests.json").stat().st_size > 5 * MIB
    found, peak = asked("verify", tmp_path)
    assert found == 50_000
    assert peak <= sum(file.stat().st_size for file in tmp_path.iterdir()) + ALLOWED


# -- names and values of text ------------------------------------------------------------------------------------------

PAIRS = 5_000_000 if NIGHTLY else 420_000
LAST = {
    "DUPLICATE_KEY": ',"7":""}',
    "BAD_UTF8": ',"x":"\udcff"}',
    "BAD_JSON": ',"x":"\\ud800"}',
}


def texts(count: int) -> str:
    return "{" + ",".join(f'"{i:x}":""' for i in range(count))


@pytest.mark.parametrize("code", LAST)
def test_metadata_whose_last_entry_is_wrong(code: str, asked: Asked, tmp_path: Path) -> None:
    text = ('{"__metadata__":' + texts(PAIRS) + LAST[code] + "}").encode("utf-8", "surrogateescape")
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    found, peak = asked("scan", path)
    assert found == code
    assert peak <= path.stat().st_size + (ALLOWED if NIGHTLY else 16 * MIB)


def test_metadata_of_a_megabyte(tmp_path: Path, asked: Asked) -> None:
    metadata = {f"key {i}": f"value {i}" for i in range(120_000)}
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(2)}, path, metadata)
    assert path.stat().st_size > MIB
    assert asked("scan", path)[0] == 1
    assert fm.scan_checkpoint(path).files[0].metadata == metadata


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("DUPLICATE_KEY", '"7":"model.safetensors"'),
        ("SHARD_EXTENSION", '"x":"model.bin"'),
        ("NAME_CONTROL", '"\\n":"model.safetensors"'),
    ],
)
def test_an_index_whose_last_entry_is_wrong(code: str, last: str, asked: Asked, tmp_path: Path) -> None:
    text = texts(PAIRS // 3).replace('""', '"model.safetensors"') + "," + last + "}"
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map":' + text + "}")
    found, peak = asked("scan", tmp_path)
    assert found == code
    assert peak <= path.stat().st_size + (ALLOWED if NIGHTLY else 16 * MIB)
