"""From a path to a plan: files, folders, variants, subfolders, several sources; all written by peers."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from funcmodel.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    IndexMismatchError,
    UnknownFormatError,
    UnsafePathError,
)
from funcmodel.records.checkpoint import CheckpointSpec
from funcmodel.records.config import Config
from funcmodel.records.expressions import Read
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.scan import plan_of, scan, scan_checkpoint

A, B, C = torch.arange(3.0), torch.arange(4, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bfloat16)


def save(path: Path, **tensors: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path)
    return path


def shard(folder: Path, *, stem: str = "model", variant: str = "") -> Path:
    """`a` and `b` in two shards and an index, as transformers and diffusers name them."""
    files = [f"{stem}{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save(folder / files[0], a=A)
    save(folder / files[1], b=B)
    index = {"metadata": {"total_size": 44}, "weight_map": {"a": files[0], "b": files[1]}}
    (folder / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))
    return folder


def read(expr: Any) -> bytes:
    assert isinstance(expr, Read)
    data = Path(expr.file.path).read_bytes()
    assert len(data) == expr.file.nbytes
    return data[expr.offset : expr.offset + expr.spec.nbytes]


def test_a_file(tmp_path: Path) -> None:
    path = save(tmp_path / "any.safetensors", a=A, c=C)
    plan = scan(path)
    assert {k: e.spec for k, e in plan.items() if isinstance(e, Read)} == {
        "a": TensorSpec([3], "float32"),
        "c": TensorSpec([2, 2], "bfloat16"),
    }
    assert read(plan["a"]) == A.numpy().tobytes()
    assert scan(str(path)) == plan


@pytest.mark.parametrize(
    "name", ["model", "diffusion_pytorch_model", "adapter_model", "open_clip_model", "consolidated", "my.model"]
)
def test_a_folder_with_one_file(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"{name}.safetensors", a=A)
    found = scan_checkpoint(tmp_path)
    assert [f.path for f in found.files] == [str(path)]
    assert (found.index, found.config, found.variant, found.ignored) == (None, None, None, ())


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "mine"])
def test_a_sharded_folder(stem: str, tmp_path: Path) -> None:
    shard(tmp_path, stem=stem)
    found = scan_checkpoint(tmp_path)
    assert [len(f.tensors) for f in found.files] == [1, 1]
    assert found.index is not None
    assert found.index.metadata == {"total_size": 44}
    plan = scan(tmp_path)
    assert plan == plan_of(found)
    assert read(plan["b"]) == B.numpy().tobytes()
    assert scan(tmp_path / f"{stem}.safetensors.index.json") == plan


def test_a_file_has_one_ref(tmp_path: Path) -> None:
    plan = scan(save(tmp_path / "model.safetensors", a=A, b=B, c=C))
    assert len({id(e.file) for e in plan.values() if isinstance(e, Read)}) == 1


def test_an_index_may_list_the_single_file(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", a=A)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert list(scan(tmp_path)) == ["a"]


def test_shards_may_have_any_name_and_lie_deeper(tmp_path: Path) -> None:
    save(tmp_path / "first.safetensors", a=A)
    save(tmp_path / "deep" / "second.safetensors", b=B)
    index = {"weight_map": {"a": "first.safetensors", "b": "deep/second.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(scan(tmp_path)) == ["a", "b"]
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "mine.safetensors.index.json")
    assert sorted(scan(tmp_path)) == ["a", "b"]


# -- variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "mine"])
def test_a_variant_is_found_when_asked_for(stem: str, tmp_path: Path) -> None:
    save(tmp_path / f"{stem}.safetensors", a=A)
    save(tmp_path / f"{stem}.fp16.safetensors", a=A.half())
    shard(tmp_path, stem=stem, variant=".ema")
    expected = {None: "float32", "fp16": "float16"}
    for variant, dtype in expected.items():
        if stem != "mine" or variant:
            assert scan(tmp_path, variant=variant)["a"].spec.dtype.name == dtype  # type: ignore[union-attr]
    found = scan_checkpoint(tmp_path, variant="ema")
    assert (len(found.files), found.variant) == (2, "ema")
    assert found.ignored == (f"{stem}.fp16.safetensors", f"{stem}.safetensors")


def test_the_index_of_a_variant_as_huggingface_hub_names_it(tmp_path: Path) -> None:
    shard(tmp_path, variant=".fp16")
    (tmp_path / "model.safetensors.index.fp16.json").rename(tmp_path / "model.fp16.safetensors.index.json")
    assert sorted(scan(tmp_path, variant="fp16")) == ["a", "b"]


def test_transformers_variants_are_found(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    model = transformers.BertModel(transformers.BertConfig(**small))
    model.save_pretrained(tmp_path)
    model.half().save_pretrained(tmp_path, variant="fp16", max_shard_size="1KB")
    whole, half = scan_checkpoint(tmp_path), scan_checkpoint(tmp_path, variant="fp16")
    assert whole.config is not None
    assert whole.config.model_type == "bert"
    assert len(half.files) > 1
    names = set(model.state_dict())
    for found, dtype in ((whole, torch.float32), (half, torch.float16)):
        plan = plan_of(found)
        assert set(plan) == names
        assert {str(dtype) for e in plan.values()} == {f"torch.{e.spec.dtype.torch}" for e in plan.values()}  # type: ignore[union-attr]


@pytest.mark.parametrize("asked", [None, "fp16"])
def test_only_other_variants(asked: str | None, tmp_path: Path) -> None:
    save(tmp_path / "model.bf16.safetensors", a=A)
    shard(tmp_path, variant=".ema")
    with pytest.raises(AmbiguousCheckpointError) as caught:
        scan(tmp_path, variant=asked)
    assert caught.value.code == "VARIANT"
    assert caught.value.variants == ("bf16", "ema")  # type: ignore[attr-defined]
    assert "model.bf16.safetensors" in caught.value.candidates


def test_a_variant_that_is_not_there(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", a=A)
    with pytest.raises(AmbiguousCheckpointError) as caught:
        scan(tmp_path, variant="fp16")
    assert caught.value.variants == ("",)  # type: ignore[attr-defined]


# -- what cannot be decided ------------------------------------------------------------------------------------------


def test_two_files_of_no_known_name(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", a=A)
    save(tmp_path / "y.safetensors", a=B)
    with pytest.raises(AmbiguousCheckpointError) as caught:
        scan(tmp_path)
    assert (caught.value.code, caught.value.candidates) == ("AMBIGUOUS", ("x.safetensors", "y.safetensors"))
    assert list(scan(tmp_path / "x.safetensors")) == ["a"]


def test_a_known_name_wins_and_the_others_are_reported(tmp_path: Path) -> None:
    for name in ("model", "adapter_model", "x"):
        save(tmp_path / f"{name}.safetensors", a=A)
    (tmp_path / "training_args.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    found = scan_checkpoint(tmp_path)
    assert found.ignored == ("adapter_model.safetensors", "training_args.bin", "x.safetensors")
    assert found.config == Config({})


def test_shards_without_an_index(tmp_path: Path) -> None:
    shard(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(IndexMismatchError) as caught:
        scan(tmp_path)
    assert caught.value.code == "INDEX_MISSING"
    assert sorted(scan(sorted(tmp_path.iterdir()))) == ["a", "b"]


def test_two_indexes_of_one_variant(tmp_path: Path) -> None:
    shard(tmp_path, variant=".fp16")
    index = tmp_path / "model.safetensors.index.fp16.json"
    (tmp_path / "model.fp16.safetensors.index.json").write_bytes(index.read_bytes())
    with pytest.raises(AmbiguousCheckpointError):
        scan(tmp_path, variant="fp16")


@pytest.mark.parametrize("which", ["single", "index"])
def test_which_of_two_is_not_there(which: Any, tmp_path: Path) -> None:
    if which == "index":
        save(tmp_path / "model.safetensors", a=A)
    else:
        shard(tmp_path)
    with pytest.raises(UnknownFormatError):
        scan(tmp_path, which=which)


@pytest.mark.parametrize(
    "names",
    [(), ("config.json",), ("training_args.bin", "optimizer.pt"), (".model.safetensors",), (".safetensors",), (".pt",)],
)
def test_no_weights(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UnknownFormatError) as caught:
        scan(tmp_path)
    assert (caught.value.code, caught.value.path) == ("NO_CHECKPOINT", str(tmp_path))


def test_a_file_of_no_known_format(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    with pytest.raises(UnknownFormatError) as caught:
        scan(tmp_path / "model.ckpt")
    assert caught.value.code == "SUFFIX"


# -- subfolders, several sources, links, config ----------------------------------------------------------------------


def test_a_subfolder(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", a=A)
    save(tmp_path / "unet" / "model.safetensors", b=B)
    assert list(scan(tmp_path, subfolder="unet")) == ["b"]
    assert scan_checkpoint(tmp_path, subfolder="unet") == scan_checkpoint(tmp_path / "unet")
    for outside in ("..", "unet/../..", "..\\x", str(tmp_path)):
        with pytest.raises(UnsafePathError):
            scan(tmp_path / "unet", subfolder=outside)
    with pytest.raises(CheckpointError):
        scan(tmp_path, subfolder="vae")


def test_several_sources(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one" / "x.safetensors", a=A), shard(tmp_path / "two", stem="mine")
    three = save(tmp_path / "three.safetensors", c=C)
    assert list(scan([one, three])) == ["a", "c"]
    assert list(scan([three, tmp_path / "one"])) == ["c", "a"]
    assert len(scan([])) == 0
    with pytest.raises(AmbiguousCheckpointError) as caught:
        scan([three, one, two])
    assert (caught.value.code, caught.value.keys) == ("KEY_IN_TWO_SOURCES", ("a",))  # type: ignore[attr-defined]
    assert str(one) in caught.value.candidates


def test_links_out_of_the_folder_are_followed_on_request(tmp_path: Path) -> None:
    path = save(tmp_path / "elsewhere" / "x.safetensors", a=A)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(path)
    with pytest.raises(UnsafePathError):
        scan(folder)
    assert list(scan(folder, symlinks="follow")) == ["a"]
    assert list(scan(folder / "model.safetensors")) == ["a"]


def test_a_config_that_is_damaged_does_not_hide_the_weights(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", a=A)
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    assert list(scan(tmp_path)) == ["a"]
    with pytest.raises(CheckpointError) as caught:
        scan_checkpoint(tmp_path)
    assert (caught.value.code, caught.value.path) == ("DUPLICATE_KEY", str(tmp_path / "config.json"))


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "model.safetensors", w=torch.ones(1_000_000))
    spans: list[tuple[int, int]] = []
    from funcmodel.run import files

    real = files.os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        spans.append((offset, offset + sum(map(len, buffers))))
        return real(fd, buffers, offset)

    monkeypatch.setattr(files.os, "preadv", counted)
    plan = scan(path)
    assert max(stop for _, stop in spans) == plan["w"].offset  # type: ignore[union-attr]


def test_plan_of_an_empty_checkpoint() -> None:
    assert len(plan_of(CheckpointSpec(path="x", files=()))) == 0
