"""The cases of saving, and that of extra memory. Nobody here waits for the disk, except where a name says "flushed"."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import funcmodel as fm
from tests.benchmarks import limits, ours, peers
from tests.benchmarks.cases import IN_PLACE, limit, mine, part, peer
from tests.benchmarks.limits import cores
from tests.benchmarks.measure import Case
from tests.benchmarks.model import Tensors, World, total

SHARDS = 4


def removed(world: World) -> Callable[[], None]:
    """Removes what was saved, before the system writes it to the disk behind somebody else's sample."""

    def settle() -> None:
        for folder in world.root.glob("saved-*"):
            shutil.rmtree(folder)

    return settle


def shares(tensors: Tensors, files: int) -> tuple[int, list[Tensors]]:
    """The smallest shard size that gives so many files, and what is in each."""
    sizes = {key: tensor.nbytes for key, tensor in tensors.items()}
    shard = -(-sum(sizes.values()) // files)
    while len((made := fm.plan_shards(sizes, shard)).files) > files:
        shard += shard // 50 + 1
    return shard, [{key: tensors[key] for key in keys} for keys in made.files.values()]


def save_one(world: World) -> Case:
    tensors, module = world.tensors, world.module_of(world.tensors)
    given = {"prepare": world.empty, "checked": False}
    return Case(
        "save_one",
        "save as one file",
        world.nbytes,
        [
            mine("save", lambda: ours.save(module, None, "none"), **given),
            mine("save, flushed", lambda: ours.save(module, None, "full"), **given),
            limit("raw write, 1 file", lambda: limits.raw_write(tensors, 1, 1), **given),
            limit("raw write, 1 file, 2 threads", lambda: limits.raw_write_one(tensors, 2), **given),
            limit(
                "raw write, 1 file, room allocated", lambda: limits.raw_write_one(tensors, 1, allocated=True), **given
            ),
            limit("O_DIRECT write, 1 file, 2 threads", lambda: limits.direct_write(world.nbytes, 2), **given),
            peer("save_file", lambda: peers.save_file(tensors), **given),
            peer("save_model", lambda: peers.save_model(module), **given),
            peer("transformers save_pretrained", lambda: peers.save_pretrained(world.folder, 1 << 60), **given),
            peer("huggingface_hub", lambda: peers.hub_save(tensors, 1 << 60), **given),
            peer("torch.save", lambda: peers.torch_save(tensors), **given),
            peer("DCP's HuggingFaceStorageWriter", lambda: peers.dcp_write(tensors), **given),
        ],
        count=len(tensors),
        settle=removed(world),
    )


def save_shards(world: World) -> Case:
    tensors, module = world.tensors, world.module_of(world.tensors)
    given = {"prepare": world.empty, "checked": False}
    size, parts = shares(tensors, SHARDS)
    return Case(
        "save_shards",
        f"save as {SHARDS} files",
        world.nbytes,
        [
            mine("save", lambda: ours.save(module, size, "none"), **given),
            mine("save, flushed", lambda: ours.save(module, size, "full"), **given),
            limit("raw write, 4 files, 1 thread", lambda: limits.raw_write(tensors, SHARDS, 1), **given),
            limit(
                "raw write, 4 files, in parallel", lambda: limits.raw_write(tensors, SHARDS, max(2, cores())), **given
            ),
            peer("save_file of each", lambda: peers.save_files(parts, 1), **given),
            peer("save_file of each, in threads", lambda: peers.save_files(parts, max(2, cores())), **given),
            peer("transformers save_pretrained", lambda: peers.save_pretrained(world.folder, size), **given),
            peer("huggingface_hub", lambda: peers.hub_save(tensors, size), **given),
        ],
        count=len(tensors),
        settle=removed(world),
    )


def small_save(world: World) -> Case:
    tensors = world.small_tensors
    made = ours.save_plan(tensors)
    given = {"prepare": world.empty, "checked": False}
    return Case(
        "small_save",
        "save many tensors of 2 KiB as one file",
        total(tensors.values()),
        [
            mine("apply", lambda: ours.apply_save(made, tensors), **given),
            mine("save", lambda: ours.save(tensors, None, "none"), **given),
            part("funcmodel: plan alone", lambda: lambda _: ours.save_plan(tensors)),
            limit("raw write, 1 file", lambda: limits.raw_write(tensors, 1, 1), **given),
            peer("save_file", lambda: peers.save_file(tensors), **given),
            peer("huggingface_hub", lambda: peers.hub_save(tensors), **given),
        ],
        count=len(tensors),
        settle=removed(world),
    )


def memory(world: World) -> Case:
    """Each is timed once; what counts is the highest anonymous memory."""
    path, tensors = world.path, world.tensors
    module = world.module_of(tensors)
    once: dict[str, Any] = {"once": True, "checked": False}
    into: dict[str, Any] = {**once, "prepare": world.empty}
    existing: dict[str, Any] = {**once, "prepare": lambda: world.real}
    wide: Path = world.wide_path
    return Case(
        "memory",
        "highest anonymous memory above the start",
        world.nbytes,
        [
            mine("load into meta", lambda: ours.load(path), prepare=world.meta, **once),
            mine("load in place", lambda: ours.load(path, **IN_PLACE), **existing),
            mine(
                "load in place, float32 to bfloat16",
                lambda: ours.load(wide, **IN_PLACE, policy=ours.CAST),
                **once,
                prepare=lambda: world.wide_real,
            ),
            mine("save", lambda: ours.save(module, None, "none"), **into),
            peer("load_file + load_state_dict", lambda: peers.load_file_state_dict(path), **existing),
            peer("safetensors load(bytes)", lambda: peers.load_bytes(path), **once),
            peer("DCP's HuggingFaceStorageReader", lambda: peers.dcp_read(world.folder), **existing),
            peer("DCP's HuggingFaceStorageWriter", lambda: peers.dcp_write(tensors), **into),
            peer("save_file", lambda: peers.save_file(tensors), **into),
        ],
        count=len(tensors),
        settle=removed(world),
    )


CASES: Mapping[str, Callable[[World], Case]] = {
    "small_save": small_save,
    "save_one": save_one,
    "save_shards": save_shards,
    "memory": memory,
}
