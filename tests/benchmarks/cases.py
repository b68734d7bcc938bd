"""The cases of loading on the CPU; those of saving are in `saving_cases`, those of CUDA in `gpu_cases`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.benchmarks import limits, ours, peers
from tests.benchmarks.limits import cores
from tests.benchmarks.measure import Case, Contender, busy
from tests.benchmarks.model import Tensors, World, evict, total

Make = Callable[[], Callable[[Any], Any]]
CPU = {"": "cpu"}
IN_PLACE = {"commit": "in_place"}
BORROW = {"memory": "borrow"}


def mine(name: str, make: Make, **options: Any) -> Contender:
    return Contender(name, "ours", make, **options)


def peer(name: str, make: Make, **options: Any) -> Contender:
    return Contender(name, "peer", make, **options)


def limit(name: str, make: Make, **options: Any) -> Contender:
    return Contender(name, "limit", make, **{"checked": False, **options})


def part(name: str, make: Make, **options: Any) -> Contender:
    return Contender(name, "part", make, **{"checked": False, **options})


def holds(expected: Mapping[str, torch.Tensor]) -> Callable[[Any], None]:
    """Raises where the first, a middle or the last tensor is not bit for bit what was stored."""
    keys = list(expected)
    some = (keys[0], keys[len(keys) // 2], keys[-1])

    def verify(result: Any) -> None:
        found = result.state_dict() if isinstance(result, nn.Module) else result
        for key in some:
            if not torch.equal(found[key].cpu(), expected[key]):
                raise ValueError(f"{key} has the wrong value")

    return verify


def refilled(module: nn.Module, expected: Mapping[str, torch.Tensor]) -> Callable[[Any], None]:
    """As `holds`, of a module that all contenders share: it is emptied afterwards, so that each has to fill it."""
    verify = holds(expected)

    def check(_: Any) -> None:
        verify(module)
        with torch.no_grad():
            for tensor in module.state_dict().values():
                tensor.zero_()

    return check


def machine(world: World) -> Case:
    """The limits that no other case measures beside its own contenders."""
    n, path = cores(), world.path
    real = dict(world.real.state_dict())
    return Case(
        "limits",
        "what the machine can do",
        world.nbytes,
        [
            limit("memcpy, 1 thread", lambda: limits.memcpy(world.nbytes, 1)),
            limit("memcpy, all threads", lambda: limits.memcpy(world.nbytes, n)),
            limit("first touch, 4 KiB pages", lambda: limits.first_touch(world.nbytes, huge=False)),
            limit("first touch, huge pages", lambda: limits.first_touch(world.nbytes, huge=True)),
            limit("preadv, 1 thread", lambda: limits.preadv_into(path, real, 1)),
            limit("preadv, all threads", lambda: limits.preadv_into(path, real, n)),
        ],
    )


def mapped(world: World) -> Case:
    meta, path, folder = world.meta, world.path, world.folder
    return Case(
        "map",
        "map into a meta module (no byte is copied)",
        world.nbytes,
        [
            mine(
                "apply, borrowed",
                ours.apply,
                prepare=ours.plan_and_module(meta, path, **BORROW),
            ),
            mine("load, borrowed", lambda: ours.load(path, **BORROW), prepare=meta),
            part("funcmodel: scan, plan and check alone", lambda: ours.plan(path), prepare=meta),
            peer("load_file + assign", lambda: peers.load_file_assign(path), prepare=meta),
            peer("load_file (no module)", lambda: peers.load_file(path)),
            peer(
                "torch.load(mmap) + assign", lambda: peers.torch_load_into(world.torch_path, assign=True), prepare=meta
            ),
            peer("torch.load(mmap) (no module)", lambda: peers.torch_load(world.torch_path, mmap=True)),
            peer("transformers", lambda: peers.from_pretrained(folder)),
            part("transformers: building on meta", lambda: peers.transformers_build(folder)),
            peer("accelerate", lambda: peers.accelerate_load(path, device_map=CPU), prepare=meta),
        ],
        count=world.shape.tensors(),
        verify=holds(world.tensors),
    )


def fresh(world: World) -> Case:
    meta, path, folder = world.meta, world.path, world.folder
    real = dict(world.real.state_dict())
    return Case(
        "fresh",
        "hot, into fresh memory of its own",
        world.nbytes,
        [
            mine("load into meta", lambda: ours.load(path), prepare=meta),
            mine("materialize", lambda: ours.materialize(path)),
            limit("preadv, 1 thread", lambda: limits.preadv_into(path, real, 1)),
            limit("preadv, all threads", lambda: limits.preadv_into(path, real, cores())),
            limit("preadv into fresh memory, 1 thread", lambda: limits.preadv_fresh(path, 1)),
            limit("preadv into fresh memory, all threads", lambda: limits.preadv_fresh(path, cores())),
            limit("first touch, huge pages", lambda: limits.first_touch(world.nbytes, huge=True)),
            peer("load_file + clone", lambda: peers.load_file_clone(path)),
            peer("load_file + touch (mapped)", lambda: peers.load_file_touch(path)),
            peer("load_file(pread)", lambda: peers.load_file_pread(path)),
            peer("safetensors load(bytes)", lambda: peers.load_bytes(path)),
            peer("torch.load", lambda: peers.torch_load(world.torch_path)),
            peer("transformers + own copies", lambda: peers.from_pretrained(folder, then="own")),
            part("transformers: building on meta", lambda: peers.transformers_build(folder)),
            peer("runai-model-streamer", lambda: peers.runai_load(path, "cpu")),
            peer("fastsafetensors", lambda: peers.fastsafetensors_load(path, "cpu")),
        ],
        count=world.shape.tensors(),
        verify=holds(world.tensors),
    )


def existing(world: World) -> Case:
    path = world.path
    given = {"prepare": lambda: world.real}
    real: Tensors = dict(world.real.state_dict())
    return Case(
        "existing",
        "hot, into existing parameters",
        world.nbytes,
        [
            mine("load in place", lambda: ours.load(path, **IN_PLACE), **given),
            limit("preadv, 1 thread", lambda: limits.preadv_into(path, real, 1)),
            limit("preadv, all threads", lambda: limits.preadv_into(path, real, cores())),
            peer("load_file + load_state_dict", lambda: peers.load_file_state_dict(path), **given),
            peer("load_model", lambda: peers.load_model(path), **given),
            peer(
                "torch.load(mmap) + load_state_dict",
                lambda: peers.torch_load_into(world.torch_path, assign=False),
                **given,
            ),
            peer("accelerate", lambda: peers.accelerate_load(path), **given),
            peer("DCP's HuggingFaceStorageReader", lambda: peers.dcp_read(world.folder), **given),
        ],
        count=world.shape.tensors(),
        verify=refilled(world.real, world.tensors),
    )


def existing_busy(world: World) -> Case:
    quiet = existing(world)
    kept = ("load in place", "preadv, all threads", "load_file + load_state_dict", "load_model")
    return Case(
        "existing_busy",
        "hot, into existing parameters, while other programs occupy every core",
        quiet.nbytes,
        [contender for contender in quiet.contenders if contender.name in kept],
        count=quiet.count,
        verify=quiet.verify,
        around=busy,
        steady=False,
    )


def cast(world: World) -> Case:
    meta, path, folder = world.wide_meta, world.wide_path, world.wide_folder
    real: Tensors = dict(world.wide_real.state_dict())
    wide = peers.load_file(path)(None)
    narrow = {key: tensor.to(torch.bfloat16) for key, tensor in wide.items()}
    options: dict[str, Any] = {"policy": ours.CAST}

    def verify(result: Any) -> None:
        holds(narrow)(world.wide_real if result is world.wide_real else result)

    return Case(
        "cast",
        "hot, float32 to bfloat16 (GB of the file)",
        total(wide.values()),
        [
            mine("load in place", lambda: ours.load(path, **IN_PLACE, **options), prepare=lambda: world.wide_real),
            mine("load into meta", lambda: ours.load(path, **options), prepare=meta),
            limit("mapped copy_, all threads", lambda: limits.mapped_copy(path, real)),
            limit("mapped copy_ into fresh memory, all threads", lambda: limits.mapped_copy_fresh(path, real)),
            peer(
                "load_file + load_state_dict", lambda: peers.load_file_state_dict(path), prepare=lambda: world.wide_real
            ),
            peer("transformers (fresh memory)", lambda: peers.from_pretrained(folder)),
            part("transformers: building on meta", lambda: peers.transformers_build(folder)),
        ],
        count=world.wide_shape.tensors(),
        verify=verify,
    )


def cold(world: World) -> Case:
    path, folder = world.path, world.folder
    threads = (1, 2, 4, 8)
    aligned = limits.page_aligned(path.stat().st_size)

    def out_of_cache(given: Callable[[], Any]) -> dict[str, Any]:
        def prepare() -> Any:
            made = given()
            evict(path)
            return made

        return {"prepare": prepare}

    nothing, real, meta = (out_of_cache(given) for given in (lambda: None, lambda: world.real, world.meta))
    return Case(
        "cold",
        "cold (out of this system's page cache)",
        world.nbytes,
        [
            mine("load in place", lambda: ours.load(path, **IN_PLACE), **real),
            mine("load into meta", lambda: ours.load(path), **meta),
            *(limit(direct_name(n), lambda n=n: limits.direct(path, aligned, n), **nothing) for n in threads),
            limit("O_DIRECT and a copy, 4 threads", lambda: limits.direct_copied(path, aligned, 4), **nothing),
            limit("O_DIRECT and a copy, 8 threads", lambda: limits.direct_copied(path, aligned, 8), **nothing),
            peer("load_file + load_state_dict", lambda: peers.load_file_state_dict(path), **real),
            peer("load_file + touch (mapped)", lambda: peers.load_file_touch(path), **nothing),
            peer("transformers + touch (mapped)", lambda: peers.from_pretrained(folder, then="touch"), **nothing),
            part("transformers: building on meta", lambda: peers.transformers_build(folder)),
        ],
        count=world.shape.tensors(),
        verify=holds(world.tensors),
    )


def direct_name(threads: int) -> str:
    return f"O_DIRECT, {threads} thread{'s' * (threads > 1)}"


def small_load(world: World) -> Case:
    path, meta = world.small_path, world.small_meta
    scanned = ours.fm.scan(path)
    return Case(
        "small_load",
        "many tensors of 2 KiB, hot, into fresh memory",
        total(world.small_tensors.values()),
        [
            mine("apply", ours.apply, prepare=ours.plan_and_module(meta, path)),
            mine("materialize, planned before", ours.materialize_plan, prepare=lambda: scanned),
            mine("load", lambda: ours.load(path), prepare=meta),
            part("funcmodel: scan, plan and check alone", lambda: ours.plan(path), prepare=meta),
            peer("load_file", lambda: peers.load_file(path)),
            peer("load_file(pread)", lambda: peers.load_file_pread(path)),
            peer("load_file + loop over _parameters", lambda: peers.load_file_by_hand(path), prepare=meta),
            peer("load_file + assign", lambda: peers.load_file_assign(path), prepare=meta, once=True, memory=False),
        ],
        count=len(world.small_tensors),
        verify=holds(world.small_tensors),
    )


def small_parts(world: World) -> Case:
    path, tensors = world.small_path, world.small_tensors
    made = ours.parts(path)
    others = {
        "rows": ("safe_open: slices + clone", lambda: peers.safe_open_rows(path)),
        "columns": ("safe_open: slices of columns + clone", lambda: peers.safe_open_columns(path)),
        "stacked by tens": ("load_file + stack", lambda: peers.load_file_stacked(path)),
        "cast": ("load_file + to", lambda: peers.load_file_cast(path)),
    }
    some = [*tensors][:: max(1, len(tensors) // 3)]
    half = [size // 2 for size in tensors[some[0]].shape]
    right = [
        {key: tensors[key][half[0] :] for key in some},
        {key: tensors[key][:, half[1] :] for key in some},
        {key: tensors[key].float() for key in some},
        {"0.weight": torch.stack([tensors[f"0.{i}.weight"] for i in range(10)])},
    ]

    def verify(found: Mapping[str, torch.Tensor]) -> None:
        if not any(all(key in found and torch.equal(found[key], one[key]) for key in one) for one in right):
            raise ValueError("a tensor has the wrong value")

    return Case(
        "small_parts",
        "many tensors of 2 KiB, hot: the second half of each, tens of them as one, or as float32",
        total(tensors.values()),
        [
            contender
            for name, plan in made.items()
            for contender in (
                mine(name, ours.materialize_plan, prepare=lambda plan=plan: plan),
                peer(*others[name]),
            )
        ],
        count=len(tensors),
        verify=verify,
    )


CASES: Mapping[str, Callable[[World], Case]] = {
    "limits": machine,
    "map": mapped,
    "fresh": fresh,
    "existing": existing,
    "existing_busy": existing_busy,
    "cast": cast,
    "cold": cold,
    "small_load": small_load,
    "small_parts": small_parts,
}
