"""What a save can find in a folder and make of it, and which of the two a reader sees afterwards."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import safetensors.torch
import torch
from attrs import evolve, frozen
from torch import Tensor

import funcmodel as fm
from funcmodel.core.journal import JOURNAL
from funcmodel.errors import CheckpointError
from funcmodel.records.mapping import FrozenMap
from funcmodel.run.faults import Disk, disk, restore
from funcmodel.run.filesystem import REAL, FileSystem
from funcmodel.run.scan import plan_of, scan_checkpoint

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
QUICK = evolve(REAL, fsync=lambda fd: None)  # what is safe from a loss of power is not for the disk to say here
LEFT = (".fm-", ".funcmodel")
# How a folder without a checkpoint of the name and variant that is asked for is refused.
NONE_THERE = frozenset({"OPEN", "NO_CHECKPOINT", "VARIANT", "INDEX_MISSING"})
FOREIGN = ("README.md", "adapter_model.safetensors", "model.other.safetensors")

Before = Literal["absent", "foreign", "single", "linked", "three", "two", "bin"]
After = Literal["single", "three"]
Texts = Literal["none", "equal", "changed"]


@frozen
class Transition:
    """A save over what is there.

    Attributes:
        before: what the folder holds: no folder, only files of others, or a checkpoint of so many files, or of one that
            a link leads to, or a `.bin`.
        after: how many files are written.
        texts: whether `config.json` and another text lie there, and whether the save changes them.
        how: from tensors, from the files that are replaced, or from tensors that are mapped from those.
    """

    before: Before
    after: After
    variant: str | None = None
    texts: Texts = "changed"
    how: Literal["live", "in place", "mapped"] = "live"

    def __str__(self) -> str:
        words = (self.before, self.after, self.variant or "", self.texts, self.how)
        return "-".join(word.replace(" ", "_") for word in words if word)


TRANSITIONS = [
    *(Transition(old, new) for old in get_args(Before) for new in get_args(After)),
    *(
        Transition(old, new, "fp16", "equal")
        for old in ("absent", "single", "three", "two", "bin")
        for new in get_args(After)
    ),
    *(
        Transition(old, new, None, "none", how)
        for how in ("in place", "mapped")
        for old in ("single", "three")
        for new in get_args(After)
    ),
]
# Those that take different ways; what costs much is tried on these alone in a plain run, and on all at night.
CORE = [t for t in TRANSITIONS if t.before in ("single", "three") and t.texts == "changed"]


# -- values ------------------------------------------------------------------------------------------------------------

# The leaves of a Llama with two layers, 8 wide.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (8, 8),
    **{
        f"model.layers.{i}.{name}.weight": shape
        for i in range(2)
        for name, shape in {
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8),
            "mlp.gate_proj": (8, 8),
            "mlp.up_proj": (8, 8),
            "mlp.down_proj": (8, 8),
            "input_layernorm": (8,),
            "post_attention_layernorm": (8,),
        }.items()
    },
    "model.norm.weight": (8,),
    "lm_head.weight": (8, 8),
}
LIMITS = {"single": None, "three": 1400, "two": 2000}


def weights(base: float) -> dict[str, Tensor]:
    """Every tensor of every set has its own value, which half precision would round."""
    return {key: torch.full(shape, base + i + 0.1) for i, (key, shape) in enumerate(SHAPES.items())}


OLD, NEW, NEXT = weights(100), weights(200), weights(300)


def written_by(transition: Transition) -> dict[str, Tensor]:
    """What the save of a transition writes."""
    match transition.how:
        case "in place":
            return {key: tensor.half() for key, tensor in OLD.items()}
        case "mapped":
            return {f"moved.{key}": tensor for key, tensor in OLD.items()}
    return NEW


def texts(transition: Transition, side: Literal["old", "new"]) -> dict[str, str]:
    if transition.texts == "none":
        return {}
    word = "old" if transition.texts == "equal" else side
    return {
        "config.json": f'{{"model_type": "llama", "side": "{word}"}}',
        "generation_config.json": f'{{"a": "{word}"}}',
    }


# -- saves -------------------------------------------------------------------------------------------------------------


def save(transition: Transition, into: Path, filesystem: FileSystem = QUICK) -> None:
    """The save of a transition, over whatever the folder holds."""
    source: object = written_by(transition)
    if transition.how == "in place":
        source = fm.pipe(fm.scan(into), fm.cast("float16"))
    elif transition.how == "mapped":
        mapped: dict[str, Tensor] = {}
        for file in scan_checkpoint(into).files:
            mapped |= safetensors.torch.load_file(file.path)
        source = {f"moved.{key}": tensor for key, tensor in mapped.items()}
    put(source, into, transition.after, transition.variant, texts(transition, "new"), filesystem)


def put(
    source: object,
    into: Path,
    files: str,
    variant: str | None = None,
    written: Mapping[str, str] = FrozenMap(),
    filesystem: FileSystem = QUICK,
) -> None:
    """Save tensors or a plan, with texts beside them."""
    fm.save(
        source,
        into,
        max_shard_size=LIMITS[files],
        variant=variant,
        texts=dict(written),
        filesystem=filesystem,
    )


@cache
def found_before(transition: Transition) -> Disk | None:
    """What the folder holds before the save; None where it does not exist."""
    if transition.before == "absent":
        return None
    with folder() as root:
        safetensors.torch.save_file({"lora": torch.ones(3)}, root / "adapter_model.safetensors")
        safetensors.torch.save_file({"other": torch.ones(3)}, root / "model.other.safetensors")
        (root / "README.md").write_text("read me")
        if transition.before == "bin":
            stem = f"pytorch_model.{transition.variant}" if transition.variant else "pytorch_model"
            torch.save(OLD, root / f"{stem}.bin")
        elif transition.before == "linked":
            put(OLD, root / "store", "single")
            (root / "model.safetensors").symlink_to("store/model.safetensors")
        elif transition.before != "foreign":
            put(OLD, root, transition.before, transition.variant)
        for name, text in texts(transition, "old").items():
            (root / name).write_text(text)
        return disk(root)


@contextmanager
def folder() -> Iterator[Path]:
    """A scratch folder, in memory where the system has such."""
    where = tempfile.mkdtemp(dir=MEMORY)
    try:
        yield Path(where)
    finally:
        shutil.rmtree(where)


@contextmanager
def prepared(transition: Transition) -> Iterator[Path]:
    """A folder as a transition finds it, in a folder of its own."""
    with folder() as root:
        state = found_before(transition)
        if state is not None:
            restore(state, root / "ckpt")
        yield root / "ckpt"


# -- readers -----------------------------------------------------------------------------------------------------------


def content(tensors: Mapping[str, Tensor]) -> object:
    """Keys, dtypes and bits, to be compared."""
    return frozenset(
        (key, tensor.dtype, hashlib.md5(tensor.contiguous().view(torch.uint8).numpy().tobytes()).digest())
        for key, tensor in tensors.items()
    )


def read(where: Path, variant: str | None = None) -> tuple[object, object]:
    """What funcmodel reads, and the config that it finds with it; "none" where there is no checkpoint."""
    try:
        found = scan_checkpoint(where, variant=variant)
        return content(fm.materialize(plan_of(found))), found.config
    except CheckpointError as error:
        if error.code in NONE_THERE:
            return "none", None
        raise


@cache
def sides(transition: Transition) -> Mapping[tuple[object, object], str]:
    """What a reader may find, to "OLD" or "NEW"."""
    if transition.before in ("single", "linked", "two", "three"):
        config = texts(transition, "old").get("config.json")
        old: tuple[object, object] = content(OLD), config and fm.parse_config(config)
    else:
        with prepared(transition) as where:
            old = read(where, transition.variant)
    config = texts(transition, "new").get("config.json")
    return {(content(written_by(transition)), config and fm.parse_config(config)): "NEW", old: "OLD"}


def seen(transition: Transition, where: Path) -> str:
    """OLD or NEW for a reader of the folder; anything else is a violation and says what."""
    try:
        found = read(where, transition.variant)
    except CheckpointError as error:
        return f"{type(error).__name__} {error.code}: {error}"
    return sides(transition).get(found, "a mixture of weights, or weights with the config of others")


def unmarked(state: Disk) -> Disk:
    """A state without the mark that each save gives to the names of what it stages: equal states are judged once."""
    clean: Callable[[bytes], bytes] = lambda text: re.sub(rb"\.fm-[0-9a-f]{8}-", b".fm-0-", text)  # noqa: E731
    return evolve(
        state,
        files=FrozenMap(
            {
                clean(name.encode()).decode(): clean(timeless(state, name)) if name.endswith(".json") else data
                for name, data in state.files.items()
                if not name.endswith(".funcmodel.lock")
            }
        ),
        times=FrozenMap(),
    )


def timeless(state: Disk, name: str) -> bytes:
    """A text; of a journal that is whole, not what times it holds but whether they are those of the files and parts."""
    try:
        journal = json.loads(state.files[name])
        if os.path.basename(name) != JOURNAL:
            return state.files[name]
        where = lambda file: os.path.normpath(os.path.join(os.path.dirname(name), file))  # noqa: E731
        for times in (journal["old_times"], journal["new_times"]):
            for file, time in times.items():
                part = journal["parts"].get(file, file)
                times[file] = [state.times.get(where(path)) == time for path in (file, part)]
        return json.dumps(journal).encode()
    except (ValueError, KeyError, TypeError):
        return state.files[name]
