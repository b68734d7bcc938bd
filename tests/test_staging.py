"""Files that are replaced: their modes, their links, and the order in which things happen to the folder."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from funcmodel.core.journal import JOURNAL, LOCK, is_part
from funcmodel.errors import CheckpointError, SaveError, UnsafePathError
from funcmodel.plan.saving import plan_save
from funcmodel.records.actions import Publish
from funcmodel.records.expressions import Live
from funcmodel.records.plans import SavePlan
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.existing import existing_checkpoint
from funcmodel.run.faults import counted
from funcmodel.run.filesystem import REAL, Durability, Symlinks
from funcmodel.run.scan import scan_checkpoint
from funcmodel.run.staging import Transaction
from funcmodel.run.write import write

SPEC = TensorSpec((4,), "float32")
LIVE = {"a": torch.ones(4), "b": torch.zeros(4)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def plan(folder: Path, limit: int | None = None) -> SavePlan:
    entries = {key: Live(key, SPEC) for key in LIVE}
    return plan_save(entries, max_shard_size=limit, existing=existing_checkpoint(folder))


def save(folder: Path, limit: int | None = None, symlinks: Symlinks = "follow") -> None:
    write(plan(folder, limit), folder, live=LIVE, symlinks=symlinks)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


# -- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 16])
def test_new_files_have_the_mode_that_the_umask_says(tmp_path: Path, umask: int, limit: int | None) -> None:
    save(tmp_path / "out", limit)
    assert {mode(file) for file in (tmp_path / "out").iterdir()} == {0o666 & ~umask}
    assert os.umask(umask) == umask


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / SINGLE).chmod(0o640)
    save(tmp_path)
    assert mode(tmp_path / SINGLE) == 0o640


@pytest.mark.parametrize(("before", "after"), [(None, 16), (16, 16), (16, None)])
def test_weights_under_new_names_are_as_private_as_those_they_replace(
    tmp_path: Path, before: int | None, after: int | None
) -> None:
    save(tmp_path, before)
    for file in tmp_path.glob("*.safetensors"):
        file.chmod(0o600)
    save(tmp_path, after)
    assert {mode(file) for file in tmp_path.glob("*.safetensors")} == {0o600}


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path: Path) -> tuple[Path, Path]:
    """A folder whose single file is a link, and the file it leads to."""
    target, folder = tmp_path / "store" / "weights", tmp_path / "out"
    target.parent.mkdir()
    folder.mkdir()
    target.write_bytes(b"old")
    target.chmod(0o640)
    (folder / SINGLE).symlink_to(target)
    return folder, target


def test_a_link_is_followed_and_its_target_replaced(linked: tuple[Path, Path]) -> None:
    folder, target = linked
    save(folder)
    assert (folder / SINGLE).is_symlink()
    assert not target.is_symlink()
    assert torch.equal(safetensors.torch.load_file(target)["a"], LIVE["a"])
    assert mode(target) == 0o640
    assert os.listdir(target.parent) == ["weights"]


def test_a_link_is_refused_where_the_caller_says_so(linked: tuple[Path, Path]) -> None:
    folder, target = linked
    with pytest.raises(UnsafePathError):
        save(folder, symlinks="refuse")
    assert target.read_bytes() == b"old"


def test_a_link_to_a_folder_is_followed_or_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(UnsafePathError):
        save(tmp_path / "out", symlinks="refuse")
    save(tmp_path / "out")
    assert os.listdir(tmp_path / "real") == [SINGLE]


@pytest.mark.parametrize("limit", [None, 16])
def test_the_cache_of_huggingface_hub_is_never_written_to(tmp_path: Path, limit: int | None) -> None:
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob.write_bytes(b"shared")
    (snapshot / SINGLE).symlink_to(blob)
    with pytest.raises(UnsafePathError):
        save(snapshot, limit)
    assert os.listdir(snapshot) == [SINGLE]
    assert blob.read_bytes() == b"shared"


def test_an_old_single_file_that_is_a_link_goes_and_its_target_stays(linked: tuple[Path, Path]) -> None:
    folder, target = linked
    save(folder, 16)
    assert SINGLE not in os.listdir(folder)
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["folder", "fifo", "link to itself", "link to nowhere", "link to a folder"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    where = tmp_path / SINGLE
    match kind:
        case "folder":
            where.mkdir()
        case "fifo":
            os.mkfifo(where)
        case "link to itself":
            where.symlink_to(where)
        case "link to nowhere":
            where.symlink_to(tmp_path / "no" / "where")
        case "link to a folder":
            where.symlink_to(tmp_path)
    before = os.lstat(where)
    with pytest.raises(UnsafePathError):
        save(tmp_path)
    assert os.listdir(tmp_path) == [SINGLE]
    assert os.lstat(where).st_ino == before.st_ino


def test_other_names_of_a_replaced_file_keep_the_old_bytes(tmp_path: Path) -> None:
    save(tmp_path)
    os.link(tmp_path / SINGLE, tmp_path / "kept")
    LIVE_2 = {key: tensor + 5 for key, tensor in LIVE.items()}
    write(plan(tmp_path), tmp_path, live=LIVE_2)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "kept")["a"], LIVE["a"])
    assert torch.equal(safetensors.torch.load_file(tmp_path / SINGLE)["a"], LIVE_2["a"])


# -- order -----------------------------------------------------------------------------------------------------------


def events(folder: Path, limit: int | None, durability: Durability = "full") -> list[tuple[str, str]]:
    """What happens to the disk, as (call, name), but for locks and bytes; staged files and folders have no name."""
    filesystem, trace = counted(REAL)
    write(plan(folder, limit), folder, live=LIVE, durability=durability, filesystem=filesystem)
    found = []
    for call in trace:
        name = os.path.basename(call.detail[0] if call.name == "replace" else call.path)
        if call.name in ("replace", "unlink", "fsync") and name != LOCK:
            found.append((call.name, "part" if is_part(name) else "folder" if name == folder.name else name))
    return found


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
JOURNALED = [("fsync", "part"), ("fsync", "folder"), ("replace", JOURNAL), ("fsync", "folder")]


def test_shards_are_on_the_disk_before_the_index_and_the_old_file_goes_last(tmp_path: Path) -> None:
    save(tmp_path)
    assert events(tmp_path, 16) == [
        *[("fsync", "part")] * 3,
        *JOURNALED,
        *[("replace", name) for name in SHARDS],
        ("fsync", "folder"),
        ("replace", INDEX),
        ("fsync", "folder"),
        ("unlink", SINGLE),
        ("fsync", "folder"),
        ("unlink", JOURNAL),
    ]


def test_the_single_file_is_there_before_the_index_and_the_shards_go(tmp_path: Path) -> None:
    save(tmp_path, 16)
    assert events(tmp_path, None) == [
        ("fsync", "part"),
        *JOURNALED,
        ("replace", SINGLE),
        ("fsync", "folder"),
        ("unlink", INDEX),
        ("fsync", "folder"),
        *[("unlink", name) for name in SHARDS],
        ("fsync", "folder"),
        ("unlink", JOURNAL),
    ]


def test_a_save_that_is_one_rename_needs_no_journal(tmp_path: Path) -> None:
    save(tmp_path)
    assert events(tmp_path, None) == [
        ("fsync", "part"),
        ("replace", SINGLE),
        ("fsync", "folder"),
    ]


def test_without_durability_nothing_is_flushed(tmp_path: Path) -> None:
    assert events(tmp_path, None, durability="none") == [("replace", SINGLE)]


# -- folders ---------------------------------------------------------------------------------------------------------


def test_folders_that_were_made_for_a_failed_save_go_again(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path / "there" / "a" / "b")
    assert os.listdir(tmp_path / "there") == []


def _interrupted(folder: Path) -> None:
    with Transaction(str(folder), Publish((), SINGLE), "follow", "none") as transaction:
        transaction.stage(SINGLE).write([memoryview(b"half")], 0)
        raise KeyboardInterrupt


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(SaveError) as raised:
        write(plan_save({"a": Live("a", SPEC)}), tmp_path / "out" / "deeper", live=LIVE)
    assert raised.value.committed == "no"
    with pytest.raises(SaveError):
        write(plan_save({"a": Live("a", SPEC)}), tmp_path / "out", live=LIVE)
    assert (tmp_path / "out").read_bytes() == b"mine"


# -- what is there ---------------------------------------------------------------------------------------------------


def test_nothing_is_there_in_a_folder_without_such_weights(tmp_path: Path) -> None:
    assert existing_checkpoint(tmp_path / "none") is None
    for other in ("config.json", "model.fp16.safetensors", "adapter_model.safetensors"):
        (tmp_path / other).write_bytes(b"")
    assert existing_checkpoint(tmp_path) is None


@pytest.mark.parametrize("limit", [None, 16])
def test_what_is_there_has_the_names_that_a_scan_finds(tmp_path: Path, limit: int | None) -> None:
    save(tmp_path, limit)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    found, scanned = existing_checkpoint(tmp_path), scan_checkpoint(tmp_path)
    assert found is not None
    assert [file.path for file in found.files] == [file.path for file in scanned.files]
    assert found.ignored == scanned.ignored == ("pytorch_model.bin",)
    assert (found.index is None) == (scanned.index is None)


def test_a_damaged_checkpoint_can_be_replaced(tmp_path: Path) -> None:
    save(tmp_path, 16)
    (tmp_path / SHARDS[0]).write_bytes(b"cut off")
    save(tmp_path, 16)
    assert scan_checkpoint(tmp_path).files
    (tmp_path / INDEX).write_text("{")
    save(tmp_path, 16)
    assert scan_checkpoint(tmp_path).files
    assert len(os.listdir(tmp_path)) >= 3


def test_two_checkpoints_side_by_side_are_both_replaced(tmp_path: Path) -> None:
    for limit in (None, 16):
        folder = tmp_path / str(limit)
        save(folder, 16)
        (folder / SINGLE).write_bytes(b"left by a writer that died")
        save(folder, limit)
        assert len(scan_checkpoint(folder).files) == (1 if limit is None else 2)
        assert len(os.listdir(folder)) == (1 if limit is None else 3)


def test_a_file_in_the_place_of_a_folder_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(CheckpointError):
        existing_checkpoint(tmp_path / "x")
