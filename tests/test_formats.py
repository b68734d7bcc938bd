"""Formats: values made of functions, passed to readers; and opening what was planned."""

import os
from pathlib import Path

import attrs
import pytest
import safetensors.torch
import torch

from funcmodel.core.wire import Limits, fingerprint, parse_header
from funcmodel.errors import CheckpointError, HeaderError, StalePlanError, UnknownFormatError, UnsafePathError
from funcmodel.records.checkpoint import FileSpec
from funcmodel.records.expressions import FileRef, Read
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.files import SourceFile
from funcmodel.run.formats import FORMATS, SAFETENSORS, Format, format_named, format_of, open_source
from funcmodel.run.scan import scan, scan_checkpoint


def ref_of(path: Path, formats: tuple[Format, ...] = FORMATS) -> FileRef:
    (file,) = {e.file for e in scan(path, formats=formats).values() if isinstance(e, Read)}
    return file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.ones(3), "b": torch.zeros(2)}, path)
    return path


def test_a_planned_file_opens(path: Path) -> None:
    with open_source(ref_of(path)) as file:
        assert file.nbytes == path.stat().st_size


def test_the_cheap_fingerprint_is_the_scanned_one(path: Path) -> None:
    with open_source(ref_of(path)) as file:
        assert SAFETENSORS.fingerprint is not None
        assert SAFETENSORS.fingerprint(file) == SAFETENSORS.scan(file, Limits()).fingerprint


@pytest.mark.parametrize("length", [0, 5, 1 << 20, (1 << 20) + 9, 3 << 20])
def test_a_fingerprint_is_of_header_and_size_however_long(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = length.to_bytes(8, "little") + os.urandom(length)
    path.write_bytes(header + b"data")
    assert SAFETENSORS.fingerprint is not None
    with open_source(FileRef(str(path), "safetensors", len(header) + 4, fingerprint(header, len(header) + 4))) as file:
        assert file.nbytes == len(header) + 4


def overwritten(path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(3), "c": torch.zeros(2)}, path)


def shortened(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("change", [overwritten, shortened, zeroed, emptied, Path.unlink])
def test_a_file_that_changed_since_it_was_planned_is_stale(change: object, path: Path) -> None:
    ref = ref_of(path)
    change(path)  # type: ignore[operator]
    with pytest.raises(StalePlanError) as caught:
        open_source(ref)
    assert caught.value.path == str(path)  # type: ignore[attr-defined]


def test_a_changed_size_is_told_before_the_header_is_read(path: Path) -> None:
    ref = ref_of(path)
    shortened(path)
    with pytest.raises(StalePlanError) as caught:
        open_source(ref)
    assert (caught.value.expected, caught.value.found) == (ref.nbytes, ref.nbytes - 1)  # type: ignore[attr-defined]


def test_other_weights_under_the_same_header_are_not_stale(path: Path) -> None:
    ref = ref_of(path)
    safetensors.torch.save_file({"w": torch.ones(3) * 2, "b": torch.ones(2)}, path)
    open_source(ref).close()


def test_a_planned_file_that_became_a_pipe_is_not_waited_for(path: Path) -> None:
    ref = ref_of(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnsafePathError) as caught:
        open_source(ref)
    assert caught.value.code == "NOT_REGULAR_FILE"


def test_formats_are_found_by_suffix_and_by_name() -> None:
    assert format_of("a/b.safetensors") is SAFETENSORS
    assert format_named("safetensors") is SAFETENSORS
    for found in (lambda: format_of("a/b.gguf"), lambda: format_named("gguf"), lambda: format_of("safetensors", ())):
        with pytest.raises(UnknownFormatError):
            found()


# -- a third-party format: safetensors with each byte of data inverted ------------------------------------------------


def toy_scan(file: SourceFile, limits: Limits) -> FileSpec:
    n = int.from_bytes(file.read(0, min(8, file.nbytes)), "little")
    if n > limits.header_bytes or 8 + n > file.nbytes:
        raise HeaderError("toy", code="TOY", path=file.path)
    found = parse_header(file.read(0, 8 + n), path=file.path, nbytes=file.nbytes, limits=limits)
    return attrs.evolve(found, format="toy")


def toy_read(file: SourceFile, buffer: memoryview, offset: int) -> None:
    file.read_into(buffer, offset)
    buffer[:] = bytes(b ^ 255 for b in buffer)


TOY = Format(name="toy", suffix=".toy", scan=toy_scan, read=toy_read)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    data = safetensors.torch.save({"w": torch.arange(4, dtype=torch.uint8)})
    start = 8 + int.from_bytes(data[:8], "little")
    path = tmp_path / "model.toy"
    path.write_bytes(data[:start] + bytes(b ^ 255 for b in data[start:]))
    return path


def test_a_third_party_format_is_scanned_and_read_by_its_own_functions(toy: Path) -> None:
    with pytest.raises(UnknownFormatError):
        scan(toy)
    formats = (TOY, *FORMATS)
    for asked in (toy, toy.parent):
        plan = scan(asked, formats=formats)
        (stored,) = plan.values()
        assert isinstance(stored, Read)
        assert stored.file.format == "toy"
        assert stored.spec == TensorSpec([4], "uint8")
        buffer = bytearray(4)
        with open_source(stored.file, formats=formats) as file:
            toy_read(file, memoryview(buffer), stored.offset)
        assert bytes(buffer) == b"\0\1\2\3"


def test_formats_are_preferred_in_their_order(toy: Path, path: Path) -> None:
    assert toy.parent == path.parent
    assert list(scan(toy.parent, formats=(TOY, *FORMATS))) == ["w"]
    assert sorted(scan(toy.parent, formats=(*FORMATS, TOY))) == ["b", "w"]
    assert scan_checkpoint(toy.parent, formats=(TOY, *FORMATS)).ignored == ("model.safetensors",)


def test_a_planned_file_needs_the_format_it_was_planned_with(toy: Path) -> None:
    ref = ref_of(toy, (TOY,))
    with pytest.raises(UnknownFormatError):
        open_source(ref)
    open_source(ref, formats=(TOY,)).close()


def test_staleness_of_a_format_without_a_cheap_fingerprint(toy: Path) -> None:
    ref = ref_of(toy, (TOY,))
    data = toy.read_bytes()
    toy.write_bytes(b"\xff" * 8 + data[8:])
    with pytest.raises(StalePlanError):
        open_source(ref, formats=(TOY,))
    toy.write_bytes(data.replace(b'"w"', b'"v"'))
    with pytest.raises(StalePlanError):
        open_source(ref, formats=(TOY,))


def test_a_format_may_shard(tmp_path: Path, toy: Path) -> None:
    toy.rename(tmp_path / "model-00001-of-00001.toy")
    (tmp_path / "model.toy.index.json").write_text('{"weight_map": {"w": "model-00001-of-00001.toy"}}')
    assert list(scan(tmp_path, formats=(TOY,))) == ["w"]
    (tmp_path / "model.toy.index.json").write_text('{"weight_map": {"w": "model.safetensors"}}')
    with pytest.raises(CheckpointError) as caught:
        scan(tmp_path, formats=(TOY,))
    assert caught.value.code == "SHARD_EXTENSION"


def test_a_format_is_a_value() -> None:
    assert Format(name="toy", suffix=".toy", scan=toy_scan, read=toy_read) == TOY
    assert hash(TOY) != hash(SAFETENSORS)
