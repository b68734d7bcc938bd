"""Files of torch.save made to deceive: each is refused with its code, and nothing in it is ever run.

Numbered as in the project's list.
"""

import io
import os
import pickle
import pickletools
import struct
import subprocess
import tarfile
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import funcmodel as fm
from funcmodel.errors import CheckpointError, HeaderError
from funcmodel.run.files import open_regular

FLOAT = torch.FloatStorage


def refused(path: Path, code: str, **scan: Any) -> HeaderError:
    with pytest.raises(HeaderError) as caught:
        fm.scan(path, **scan)
    assert (caught.value.code, caught.value.path) == (code, str(path))
    return caught.value


class Stored:
    """A storage that may lie about itself."""

    def __init__(self, numel: Any = 40, *, key: str = "0", kind: Any = FLOAT, location: str = "cpu") -> None:
        self.id = ("storage", kind, key, location, numel)


class Tensor:
    """A tensor that may lie about itself."""

    def __init__(self, shape: Any, strides: Any, offset: Any = 0, storage: Any = None, *more: Any) -> None:
        self.args = (storage or Stored(), offset, shape, strides, False, OrderedDict(), *more)

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.args


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, Stored) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    data = io.BytesIO()
    _Pickler(data, protocol).dump(value)
    return data.getvalue()


def write(path: Path, value: Any = b"", records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A torch zip with one storage of 160 bytes, unless told otherwise."""
    data = value if isinstance(value, bytes) else pickled(value)
    parts = {"data.pkl": data, "byteorder": b"little", "data/0": bytes(160), "version": b"3\n", **(records or {})}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in parts.items():
            archive.writestr(f"archive/{name}", content)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call = (call, args)

    def __reduce__(self) -> Any:
        return self.call


def canaries(file: Path) -> Iterator[tuple[str, bytes]]:
    touch = f"touch {file}"
    for protocol in (2, 4):
        for call, *args in ((os.system, touch), (eval, f"open({str(file)!r}, 'w')"), (subprocess.Popen, touch, 0)):
            yield f"REDUCE {protocol}", pickled({"w": Canary(call, *args)}, protocol)
        yield f"GLOBAL {protocol}", pickled({"w": os.system}, protocol)
        yield f"getattr {protocol}", pickled({"w": Canary(getattr, "torch", "load")}, protocol)
    command = touch.encode()
    yield "INST", b"\x80\x02(X" + struct.pack("<I", len(command)) + command + b"iposix\nsystem\n."
    yield "INST of an allowed name", b"\x80\x02(icollections\nOrderedDict\n."
    yield "NEWOBJ", b"\x80\x02csubprocess\nPopen\nX" + struct.pack("<I", len(command)) + command + b"\x85\x81."
    yield "STACK_GLOBAL", b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85R."
    yield "EXT", b"\x80\x02\x82\x01)R."
    yield "torch.load", b"\x80\x02ctorch.serialization\nload\nX\x01\0\0\0x\x85R."
    yield "dotted", b"\x80\x04\x8c\x0bcollections\x8c\x16OrderedDict.__reduce__\x93)R."


def test_case_64_nothing_is_called(tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    for number, (name, data) in enumerate(canaries(fired)):
        path = write(tmp_path / f"{number}.bin", data)
        with pytest.raises(HeaderError) as caught:
            fm.scan(path)
        assert caught.value.code == "BIN_GLOBAL_FORBIDDEN", name
    assert not fired.exists()
    with pytest.raises(FileExistsError):  # the canary does fire where pickles are run
        pickle.loads(pickled(Canary(os.mkdir, str(tmp_path))))


def test_case_64_calls_of_what_is_no_function(path: Path) -> None:
    for data in (
        b"\x80\x02X\x09\0\0\0os.system)R.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ctorch\nfloat32\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nctorch\nTensor\n)NtR.",
        b"\x80\x02ctorch.nn.parameter\nParameter\n)\x81.",
    ):
        assert refused(write(path, data), "BIN_PICKLE")


def test_case_65_what_is_no_torch_zip(tmp_path: Path, path: Path) -> None:
    legacy, script, state = tmp_path / "l.bin", tmp_path / "s.bin", {"w": torch.ones(2)}
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    refused(legacy, "BIN_NOT_ZIP")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(script))
    refused(script, "BIN_TORCHSCRIPT")
    refused(write(path, state, {"constants.pkl": b""}), "BIN_TORCHSCRIPT")
    with tarfile.open(path, "w") as archive:
        archive.add(legacy)
    refused(path, "BIN_NOT_ZIP")
    torch.save(state, path)
    whole = path.read_bytes()
    for data in (pickled({"w": 1}), safetensors.torch.save(state), b"", b"PK\5\6", whole[:-1], whole[:200], bytes(99)):
        path.write_bytes(data)
        refused(path, "BIN_NOT_ZIP")
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("archive/data.txt", "x")
    refused(path, "BIN_NO_PICKLE")
    with zipfile.ZipFile(path, "w"):
        pass
    refused(path, "BIN_NO_PICKLE")


def test_case_66_compressed(path: Path) -> None:
    write(path, {"w": Tensor((40,), (1,))}, compression=zipfile.ZIP_DEFLATED)
    refused(path, "BIN_COMPRESSED")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0", "archive/DATA.pkl", "Archive/data/0"])
def test_case_67_a_record_twice(name: str, path: Path) -> None:
    write(path, {"w": Tensor((40,), (1,))})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, bytes(160))
    refused(path, "BIN_DUPLICATE_RECORD")


def patched(path: Path, at: int, data: bytes) -> Path:
    whole = bytearray(path.read_bytes())
    at = at if at >= 0 else len(whole) + at
    whole[at : at + len(data)] = data
    path.write_bytes(whole)
    return path


def places(path: Path, name: str = "archive/data/0") -> tuple[int, int]:
    """Where a record's own header stands, and its entry in the directory."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
    return info.header_offset, path.read_bytes().rindex(name.encode()) - 46


@pytest.mark.parametrize(
    ("local", "at", "data"),
    [
        (True, 0, b"PK\1\2"),
        (True, 6, b"\x01\0"),
        (True, 8, b"\x08\0"),
        (True, 14, b"abcd"),
        (True, 18, struct.pack("<L", 159)),
        (True, 22, struct.pack("<L", 161)),
        (True, 26, struct.pack("<H", 13)),
        (True, 30, b"X"),
    ],
    ids=str,
)
def test_case_68_a_record_and_the_directory_disagree(local: bool, at: int, data: bytes, path: Path) -> None:
    write(path, {"w": Tensor((40,), (1,))})
    assert list(fm.scan(path)) == ["w"]
    refused(patched(path, places(path)[0 if local else 1] + at, data), "BIN_LOCAL_HEADER")


def lying(change: Callable[[Path, int, int], tuple[int, bytes]], path: Path) -> Path:
    write(path, {"w": Tensor((40,), (1,))})
    assert list(fm.scan(path)) == ["w"]
    return patched(path, *change(path, *places(path)))


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("BIN_ENCRYPTED", lambda p, local, entry: (entry + 8, b"\x01\0")),
        ("BIN_ENCRYPTED", lambda p, local, entry: (entry + 8, b"\x40\0")),
        ("BIN_COMPRESSED", lambda p, local, entry: (entry + 10, b"\x63\0")),
        ("BIN_ZIP", lambda p, local, entry: (entry + 20, struct.pack("<L", 159))),
        ("BIN_ZIP", lambda p, local, entry: (entry + 20, struct.pack("<2L", 10**6, 10**6))),
        ("BIN_ZIP", lambda p, local, entry: (entry + 24, b"\xff" * 4)),
        ("BIN_ZIP", lambda p, local, entry: (entry + 34, b"\x01\0")),
        ("BIN_ZIP", lambda p, local, entry: (entry + 38, b"\x10")),
        ("BIN_ZIP", lambda p, local, entry: (entry + 42, b"\xff" * 4)),
        ("BIN_LOCAL_HEADER", lambda p, local, entry: (entry + 42, struct.pack("<L", local + 1))),
        ("BIN_OVERLAP", lambda p, local, entry: (local + 28, b"\x40\0")),
        ("BIN_ZIP", lambda p, local, entry: (-22 + 4, b"\x01\0")),
        ("BIN_ZIP", lambda p, local, entry: (-22 + 8, b"\x03\0\x03\0")),
        ("BIN_ZIP", lambda p, local, entry: (-22 + 8, b"\xff\xff\xff\xff")),
        ("BIN_ZIP", lambda p, local, entry: (-22 + 12, struct.pack("<L", 47))),
        ("BIN_ZIP", lambda p, local, entry: (-22 + 16, b"\xff" * 4)),
        ("BIN_ZIP", lambda p, local, entry: (-22 + 20, b"\x01\0")),
        ("BIN_RECORD_NAME", lambda p, local, entry: (entry + 46, b"../")),
        ("BIN_RECORD_NAME", lambda p, local, entry: (entry + 46, b"/")),
        ("BIN_RECORD_NAME", lambda p, local, entry: (entry + 53, b"\\")),
        ("BIN_RECORD_NAME", lambda p, local, entry: (entry + 46, b"\xff")),
        ("BIN_RECORD_NAME", lambda p, local, entry: (entry + 46, b"\0")),
        ("BIN_RECORD_NAME", lambda p, local, entry: (entry + 46, b"b")),
    ],
)
def test_case_68_a_directory_that_lies(code: str, change: Any, path: Path) -> None:
    refused(lying(change, path), code)


def test_case_68_two_records_on_the_same_bytes(path: Path) -> None:
    write(path, {"w": Tensor((40,), (1,))}, {"data/0": zipped_inside()})
    start = places(path)[0]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/1", b"inner")
    patched(path, places(path, "archive/data/1")[1] + 42, struct.pack("<L", start + 30 + 14))
    assert refused(path, "BIN_OVERLAP")


def zipped_inside() -> bytes:
    """A record whose bytes are the start of a zip with a record of its own."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data/1"), b"inner")
    return data.getvalue()[: 30 + 14 + 5]


@pytest.mark.parametrize("field", [4, 24, 32, 40, 48])
def test_case_68_the_64_bit_end_lies(field: int, path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path)  # torch writes both ends
    end = path.read_bytes().rindex(b"PK\6\6")
    refused(patched(path, end + field, struct.pack("<Q", 99)), "BIN_ZIP")


def test_case_68_the_64_bit_end_is_elsewhere(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path)
    locator = path.read_bytes().rindex(b"PK\6\7")
    refused(patched(path, locator + 8, struct.pack("<Q", 99)), "BIN_ZIP")


@pytest.mark.parametrize("numel", [39, 41, 0, 10**9, 2**62])
def test_case_69_a_storage_of_another_size(numel: int, path: Path) -> None:
    assert refused(write(path, {"w": Tensor((2,), (1,), 0, Stored(numel))}), "BIN_STORAGE_SIZE").key == "w"


def test_case_69_a_storage_that_is_not_there_or_is_two_things(path: Path) -> None:
    refused(write(path, {"w": Tensor((2,), (1,), 0, Stored(key="1"))}), "BIN_RECORD_MISSING")
    refused(write(path, {"w": Tensor((2,), (1,), 0, Stored(key="../data/0"))}), "BIN_RECORD_MISSING")
    two = {"w": Tensor((2,), (1,)), "v": Tensor((2,), (1,), 0, Stored(40, kind=torch.IntStorage))}
    assert refused(write(path, two), "BIN_STORAGE_TYPE").key == "v"


@pytest.mark.parametrize(
    ("code", "tensor"),
    [
        ("BIN_OUT_OF_BOUNDS", Tensor((40,), (1,), 1)),
        ("BIN_OUT_OF_BOUNDS", Tensor((4, 10), (11, 1))),
        ("BIN_OUT_OF_BOUNDS", Tensor((), (), 40)),
        ("BIN_OUT_OF_BOUNDS", Tensor((1,), (1,), 2**62)),
        ("BIN_GEOMETRY", Tensor((-1,), (1,))),
        ("BIN_GEOMETRY", Tensor((2,), (-1,), 1)),
        ("BIN_GEOMETRY", Tensor((2,), (1,), -1)),
        ("BIN_GEOMETRY", Tensor((2**32, 2**32), (1, 1))),
        ("BIN_GEOMETRY", Tensor((0, 2**40, 2**40), (1, 1, 1))),
        ("BIN_GEOMETRY", Tensor((2,), (2**63 - 1,), 2**62)),
        ("BIN_GEOMETRY", Tensor((2**64,), (1,))),
        ("BIN_GEOMETRY", Tensor((2,), (1, 1))),
        ("BIN_GEOMETRY", Tensor((True,), (1,))),
        ("BIN_GEOMETRY", Tensor((2.0,), (1,))),
        ("BIN_GEOMETRY", Tensor([2], [1])),
        ("BIN_GEOMETRY", Tensor((1,) * 65, (1,) * 65)),
        ("BIN_GEOMETRY", Tensor((2,), (1,), None)),
        ("BIN_GEOMETRY", Tensor((2,), (1,), 0, Stored(-40))),
        ("BIN_GEOMETRY", Tensor((2,), (1,), 0, Stored(2**70))),
        ("BIN_STRIDES", Tensor((3, 3), (1, 1))),
        ("BIN_STRIDES", Tensor((3, 2), (2, 2))),
        ("BIN_STRIDES", Tensor((3, 4), (3, 1))),
    ],
)
def test_case_70_shapes_and_strides(code: str, tensor: Tensor, path: Path) -> None:
    refused(write(path, {"w": tensor}), code)


def test_case_71_views_that_take_more_to_plan_than_to_write(path: Path) -> None:
    storage = Stored(100_002, kind=torch.ByteStorage)
    picked = {f"w{i}": Tensor((2, 10_000), (50_000, 3), 0, storage) for i in range(20)}
    joined = {f"w{i}": Tensor((200, 2, 2), (5, 2, 1), i, storage) for i in range(90)}
    for many in (picked, joined):
        one = dict([next(iter(many.items()))])
        assert fm.scan(write(path, one, {"data/0": bytes(100_002)}))
        refused(write(path, many, {"data/0": bytes(100_002)}), "BIN_STRIDES")


@pytest.mark.parametrize(
    "tensor",
    [Tensor((10**6, 10**6), (0, 0)), Tensor((4, 10), (10, 0)), Tensor((7, 7), (1, 1))],
    ids=("every", "rows", "overlapping"),
)
def test_case_71_expanded(tensor: Tensor, path: Path) -> None:
    refused(write(path, {"w": tensor}), "BIN_EXPANDED")


@pytest.mark.filterwarnings("ignore")
def test_case_72_lazy_and_other_tensors(path: Path) -> None:
    made: dict[str, torch.Tensor] = {
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "neg": torch.ones(2, dtype=torch.complex64).conj().imag,
        "meta": torch.empty(2, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "sparse": torch.ones(2).to_sparse(),
    }
    codes = {}
    for name, tensor in made.items():
        torch.save({"w": tensor}, path)
        with pytest.raises(HeaderError) as caught:
            fm.scan(path)
        codes[name] = caught.value.code
    assert codes == {
        **dict.fromkeys(("conj", "neg"), "BIN_TENSOR_META"),
        **dict.fromkeys(("meta", "quantized", "sparse"), "BIN_GLOBAL_FORBIDDEN"),
    }
    refused(write(path, {"w": Tensor((2,), (1,), 0, Stored(location="meta"))}), "BIN_TENSOR_META")


def test_case_73_a_state_that_shadows_items_is_dropped(path: Path) -> None:
    state = OrderedDict(w=torch.ones(2))
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        data = archive.read("model/data.pkl")
        record = archive.read("model/data/0")
    assert data.endswith(b"s.")
    shadowed = data[:-1] + b"}X\x05\0\0\0itemsX\x07\0\0\0nothingsb."
    write(path, shadowed, {"data/0": record})
    assert fm.materialize(fm.scan(path))["w"].tolist() == [1, 1]
    assert torch.load(path, weights_only=True).items == "nothing"


@pytest.mark.parametrize("key", [0, None, 1.5, b"w", True, (1, "w"), ((),)])
def test_case_74_keys_that_are_no_text(key: Any, path: Path) -> None:
    torch.save({key: torch.ones(2)}, path)
    refused(path, "BIN_KEY_TYPE")


def test_case_74_integers_chosen_to_collide_cost_no_more_than_others(path: Path) -> None:
    keys = 60_000  # hashed as integers they would take a minute
    body = b"".join(b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little", signed=True) + b"N" for k in range(keys))
    refused(write(path, b"\x80\x02}(" + body + b"u."), "BIN_KEY_TYPE")


@pytest.mark.parametrize(
    ("code", "key"),
    [("NAME_EMPTY", ""), ("NAME_CONTROL", "a\nb"), ("NAME_TOO_LONG", "x" * 5000), ("BAD_UTF8", "\ud800")],
)
def test_case_74_names_as_in_safetensors(code: str, key: str, path: Path) -> None:
    torch.save({key: torch.ones(2)}, path)
    refused(path, code)


def test_case_74_a_name_twice(path: Path) -> None:
    one = pickletools.optimize(pickled({"w": 1}))
    assert one.endswith(b"X\x01\0\0\0wK\x01s.")
    refused(write(path, one[:-1] + b"X\x01\0\0\0wK\x02s."), "DUPLICATE_KEY")


DEEP = 100_000


@pytest.mark.parametrize(
    ("code", "data"),
    [
        ("BIN_NOT_A_DICT", b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b"."),
        ("BIN_NOT_A_DICT", b"\x80\x02)" + b"\x85" * DEEP + b"."),
        ("BIN_PICKLE", b"\x80\x02" + b"(" * DEEP + b"t" * DEEP + b"."),
        ("BIN_NOT_A_DICT", b"\x80\x04]" + b"\x94" * (1 << 19) + b"."),  # and none of them is kept
        ("BIN_PICKLE", b"\x80\x02" + b"]" * (1 << 19) + b"."),
        ("BIN_PICKLE", b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x."),
        ("BIN_PICKLE", b"\x80\x04\x8d" + struct.pack("<Q", 2**64 - 1) + b"x."),
        ("BIN_PICKLE", b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x."),
        ("BIN_PICKLE", b"\x80\x02B" + b"\xff" * 4 + b"x."),
        ("BIN_PICKLE", b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x."),
        ("BIN_PICKLE", b"\x80\x02\x8b" + struct.pack("<i", -1) + b"x."),
        ("BIN_PICKLE", b"\x80\x02h\x00."),
        ("BIN_PICKLE", b"\x80\x02q\x00."),
        ("BIN_PICKLE", b"\x80\x02}K\x01s."),
        ("BIN_PICKLE", b"\x80\x02}(K\x01u."),
        ("BIN_PICKLE", b"\x80\x02K\x01K\x02K\x03s."),
        ("BIN_PICKLE", b"\x80\x02K\x01K\x02a."),
        ("BIN_PICKLE", b"\x80\x02K\x01}b."),
        ("BIN_PICKLE", b"\x80\x02}}."),
        ("BIN_PICKLE", b"\x80\x02}.x"),
        ("BIN_PICKLE", b"\x80\x02}"),
        ("BIN_PICKLE", b"\x80\x02"),
        ("BIN_PICKLE", b"\x80\x06}."),
        ("BIN_PICKLE", b"}."),
        ("BIN_PICKLE", b""),
        ("BIN_PICKLE", b"\x80\x02."),
        ("BIN_PICKLE", b"\x80\x02\x86."),
        ("BIN_PICKLE", b"\x80\x02t."),
        ("BIN_PICKLE", b"\x80\x02K\x01Q."),
        ("BIN_PICKLE", b"\x80\x02X\x01\0\0\0\xff."),
        ("BIN_PICKLE", b"\x80\x02ctorch"),
        ("BIN_PICKLE", b"\x80\x02c\xff\n\xff\n."),
        ("BIN_PICKLE", b"\x80\x02P0\n."),
        ("BIN_PICKLE", b"\x80\x02I1\n."),
    ],
    ids=range(34),
)
def test_case_75_bombs_and_nonsense(code: str, data: bytes, path: Path) -> None:
    write(path, data)
    tracemalloc.start()
    try:
        refused(path, code)
        assert tracemalloc.get_traced_memory()[1] < (64 << 20) + 4 * len(data)
    finally:
        tracemalloc.stop()


def test_case_75_lists_that_hold_each_other_are_not_walked(path: Path) -> None:
    laughs: list[Any] = []
    for _ in range(64):
        laughs = [laughs] * 10
    cycle: dict[str, Any] = {"w": torch.ones(2), "laughs": laughs}
    cycle["self"] = {"again": cycle}
    torch.save(cycle, path)
    assert refused(path, "BIN_NOT_A_STATE_DICT").keys == ("laughs", "self")  # type: ignore[attr-defined]


def test_case_75_a_pickle_or_directory_beyond_the_limit(path: Path) -> None:
    torch.save({f"weight.{i}": torch.ones(1) for i in range(100)}, path)
    with zipfile.ZipFile(path) as archive:
        pickle_size = archive.getinfo("model/data.pkl").file_size
        directory = sum(46 + len(info.filename) for info in archive.infolist())
    assert directory < pickle_size
    for size, is_refused in ((directory - 1, True), (pickle_size - 1, True), (pickle_size, False)):
        limits = fm.Limits(header_bytes=size)
        assert refused(path, "HEADER_TOO_LARGE", limits=limits) if is_refused else fm.scan(path, limits=limits)


def test_case_76_a_flipped_bit(path: Path) -> None:
    torch.save({"a": torch.ones(100), "b": torch.zeros(100)}, path)
    fm.verify(path)
    start = fm.scan_checkpoint(path).files[0].tensors["b"].start
    patched(path, start + 17, b"\x01")
    assert fm.scan(path)
    check = fm.TORCH_BIN.verify
    assert check is not None
    with zipfile.ZipFile(path) as archive:
        crc = archive.getinfo("model/data/1").CRC
    with open_regular(path) as file:
        (found,) = check(file)
    assert (found.code, found.file, found.tensor) == ("BIN_CRC", str(path), "b")
    assert found.expected == f"model/data/1 {crc:08x}"
    with pytest.raises(CheckpointError):
        fm.verify(path)


def test_case_76_every_damaged_record_is_told_with_its_tensors(path: Path) -> None:
    tied, config = torch.zeros(100), _Settings()
    torch.save({"model": {"a": torch.ones(100), "b": tied, "c": tied, "d": torch.ones(3)}, "config": config}, path)
    formats = (fm.torch_zip(".bin", inert=(f"{__name__}._Settings",)),)
    spec = fm.scan_checkpoint(path, key="model", formats=formats).files[0]
    for name in ("a", "b"):
        patched(path, spec.tensors[name].start + 17, b"\x01")
    with zipfile.ZipFile(path) as archive:
        version = archive.getinfo("model/version").header_offset + 30
    data = path.read_bytes()
    at = data.index(b"3\n", version)  # a record that holds no tensor
    patched(path, at, b"4")
    plan = fm.scan(path, key="model", formats=formats)
    acts: list[Callable[[], object]] = [
        lambda: fm.verify(path, key="model", formats=formats),
        lambda: fm.materialize(plan, digest="check"),  # by formats that know nothing of the class
    ]
    for act in acts:
        with pytest.raises(fm.DigestError) as caught:
            act()
        found = [(one.tensor, one.expected, one.found) for one in caught.value.findings]
        assert [tensor for tensor, _, _ in found] == ["a", "b", "c", None]
        assert [str(expected).split()[0] for _, expected, _ in found] == [
            "model/data/0",
            "model/data/1",
            "model/data/1",
            "model/version",
        ]
        assert all(expected != other for _, expected, other in found)


class _Settings:
    """A class of a training script."""


def test_a_name_that_is_refused_is_the_one_to_read_past(path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "config": _Settings()}, path)
    name = refused(path, "BIN_GLOBAL_FORBIDDEN").name  # type: ignore[attr-defined]
    assert list(fm.scan(path, key="model", formats=(fm.torch_zip(".bin", inert=(name,)),))) == ["w"]


def test_raised_limits_hold_for_whatever_is_done_with_what_they_let_in(path: Path) -> None:
    torch.save({"w": torch.arange(5.0)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(1600):
            more = zipfile.ZipInfo(f"model/more{i}")
            more.comment = b"c" * 65_000
            archive.writestr(more, b"")
    refused(path, "HEADER_TOO_LARGE")
    limits = fm.Limits(header_bytes=200_000_000)
    plan = fm.scan(path, limits=limits)
    assert fm.materialize(plan, digest="check")["w"].tolist() == list(range(5))
    assert fm.verify(path, limits=limits).verified == ("w",)
    assert fm.TORCH_BIN.fingerprint is not None
    with open_regular(path) as file:
        tracemalloc.start()
        assert fm.TORCH_BIN.fingerprint(file) == plan["w"].file.fingerprint  # type: ignore[attr-defined]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20  # the directory has 100 MB


def test_case_77_big_endian(path: Path) -> None:
    value = {"w": Tensor((40,), (1,))}
    refused(write(path, value, {"byteorder": b"big"}), "BIN_BYTEORDER")
    refused(write(path, value, {"byteorder": b"middle"}), "BIN_BYTEORDER")
    assert list(fm.scan(write(path, value, {"byteorder": b"little"}))) == ["w"]
