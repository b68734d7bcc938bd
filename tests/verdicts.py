"""The verdict over a folder that a save left: what every reader sees in it, and whether the next save works."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from attrs import evolve
from torch import Tensor

from funcmodel.records.mapping import FrozenMap
from funcmodel.run.faults import Disk, disk
from funcmodel.run.scan import scan_checkpoint
from tests.transitions import (
    FOREIGN,
    NEXT,
    OLD,
    Transition,
    content,
    found_before,
    put,
    read,
    seen,
    texts,
    unmarked,
    written_by,
)

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", minversion="5")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CONFIG = transformers.LlamaConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=8,
    max_position_embeddings=16,
)
GENERATION = transformers.GenerationConfig()  # or it would look for one, and fail where there is none


# -- other readers -----------------------------------------------------------------------------------------------------


def loaded_by_transformers(where: Path, variant: str | None) -> dict[str, Tensor] | None:
    """The weights that `from_pretrained` takes from a folder; None where it finds none."""
    if not where.is_dir():
        return None
    try:
        model = transformers.LlamaForCausalLM.from_pretrained(
            where,
            config=CONFIG,
            generation_config=GENERATION,
            variant=variant,
            local_files_only=True,
            dtype=torch.float32,
        )
    except OSError:
        return None
    return dict(model.state_dict())


def equal(found: Mapping[str, Tensor] | None, expected: Mapping[str, Tensor] | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return all(torch.equal(found[key], expected[key].float()) for key in expected)


LOADED: dict[tuple[str | None, Disk], dict[str, Tensor] | None] = {}


def seen_by_transformers(transition: Transition, where: Path, state: Disk) -> str:
    """OLD or NEW for `from_pretrained`. Folders that look the same to it are loaded once."""
    weights = (".safetensors", ".bin", ".json")
    visible = {n: d for n, d in state.files.items() if n.endswith(weights) and re.match("(store/|pytorch_)?model", n)}
    key = transition.variant, evolve(state, files=FrozenMap(visible))
    if key not in LOADED:
        LOADED[key] = loaded_by_transformers(where, transition.variant)
    if equal(LOADED[key], written_by(transition)):
        return "NEW"
    return "OLD" if equal(LOADED[key], None if transition.before in ("absent", "foreign") else OLD) else "neither"


def check_safetensors(where: Path) -> None:
    """Whatever goes by the name of weights can be read, and an index leads to files that are there."""
    for name in os.listdir(where) if where.is_dir() else ():
        if name.endswith(".safetensors"):
            safetensors.torch.load_file(where / name)
        elif ".safetensors.index." in name and not (where / single(name)).exists():  # which comes first for readers
            for shard in set(json.loads((where / name).read_text())["weight_map"].values()):
                safetensors.torch.load_file(where / shard)


def single(index: str) -> str:
    """The single file beside an index.

    >>> single("model.safetensors.index.fp16.json")
    'model.fp16.safetensors'
    """
    stem, _, variant = index.removesuffix(".json").partition(".safetensors.index")
    return f"{stem}{variant}.safetensors"


# -- what a fault left -------------------------------------------------------------------------------------------------

JUDGED: dict[tuple[Transition, Disk], str] = {}


def judged(transition: Transition, where: Path) -> str:
    """OLD or NEW, once every reader says the same, foreign files are what they were and the next save works."""
    state = unmarked(disk(where)) if where.is_dir() else Disk()
    if (transition, state) not in JUDGED:
        JUDGED[transition, state] = _judged(transition, where, state)
    return JUDGED[transition, state]


def _judged(transition: Transition, where: Path, state: Disk) -> str:
    found = seen(transition, where)
    assert found in ("OLD", "NEW"), found
    check_safetensors(where)
    if transition.how != "mapped":  # whose new keys are no model's
        assert seen_by_transformers(transition, where, state) == found
    check_untouched(transition, state)
    for name, text in texts(transition, "old").items():
        assert state.files.get(name) in (text.encode(), texts(transition, "new")[name].encode(), None)
    check_next_save(transition, where)
    return found


def check_untouched(transition: Transition, state: Disk) -> None:
    before = found_before(transition)
    if before is not None:
        foreign = [name for name in before.files if name in FOREIGN or name.endswith(".bin")]
        assert {name: state.files[name] for name in foreign} == {name: before.files[name] for name in foreign}


def check_next_save(transition: Transition, where: Path) -> None:
    """It gives the next weights, and leaves nothing of any save that came before."""
    written = texts(transition, "new")
    put(NEXT, where, transition.after, transition.variant, written)
    assert read(where, transition.variant)[0] == content(NEXT)
    found = scan_checkpoint(where, variant=transition.variant)
    ours = {os.path.basename(file.path) for file in found.files} | set(written)
    ours |= {os.path.basename(found.index.path)} if found.index else set()
    before = found_before(transition)
    foreign = {n for n in before.files if n in FOREIGN or n.endswith(".bin")} if before else set()
    if transition.before == "linked":
        foreign.add("store")
        assert os.listdir(where / "store") == ["model.safetensors"]
    assert set(os.listdir(where)) == ours | foreign
