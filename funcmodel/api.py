"""L5: `load`, `save`, `apply`: three conveniences over scan, plan, check, apply."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, TypeVar, overload

import torch
from torch import nn

from funcmodel.bind.assign import assign, probed
from funcmodel.bind.inspect import live_tensors, module_spec
from funcmodel.core.limits import check_choice
from funcmodel.errors import PlanError, StalePlanError
from funcmodel.plan.loading import checked, plan_load
from funcmodel.plan.routing import Wanted
from funcmodel.plan.sharding import SUFFIX, Shards
from funcmodel.records.checkpoint import CheckpointSpec
from funcmodel.records.config import Config
from funcmodel.records.expressions import Expr, Live
from funcmodel.records.module import TiedGroup
from funcmodel.records.plans import LoadPlan, SavePlan, StateDictPlan
from funcmodel.records.reports import LoadPolicy
from funcmodel.records.routes import Memory
from funcmodel.run.filesystem import REAL, FileSystem
from funcmodel.run.formats import FORMATS, Format
from funcmodel.run.scan import scan
from funcmodel.run.tensors import tensor_spec

Path: TypeAlias = str | os.PathLike[str]
Tensors: TypeAlias = Mapping[str, torch.Tensor]
T = TypeVar("T")
Source: TypeAlias = Path | Sequence[Path] | StateDictPlan | Mapping[str, Expr] | Tensors

_ATTEMPTS: Final = 20  # how often a checkpoint is scanned anew that others replace before it is read


@overload
def apply(
    plan: LoadPlan,
    to: nn.Module,
    *,
    commit: Literal["swap", "in_place"] = ...,
    preflight: Literal["headers", "read"] = ...,
    digest: Literal["ignore", "check"] = ...,
    live: Tensors | None = ...,
    formats: tuple[Format, ...] = ...,
) -> nn.Module: ...
@overload
def apply(
    plan: SavePlan,
    to: Path,
    *,
    symlinks: Literal["follow", "refuse"] = ...,
    durability: Literal["full", "none"] = ...,
    digest: Literal["ignore", "check"] = ...,
    live: Tensors | None = ...,
    formats: tuple[Format, ...] = ...,
    filesystem: FileSystem = ...,
) -> CheckpointSpec: ...
def apply(plan: LoadPlan | SavePlan, to: Any, **options: Any) -> nn.Module | CheckpointSpec:
    """Carry a plan out: a `LoadPlan` on a module, a `SavePlan` on a folder.

    Args:
        plan: the plan. Every file it reads must still have the size and header it had when it was planned.
        to: the module, changed in place and returned, or the folder, created where it does not exist.
        **options: for a module `commit` ("swap": after any error the module is bit for bit what it was; "in_place":
            bytes go into the existing storage) and `preflight`; for a folder `symlinks`, `durability` and `filesystem`;
            for both `live` (tensors for `Live` leaves), `formats`, and `digest` ("check": what is read of files is
            first compared with the digests that are recorded of it).

    Raises:
        StalePlanError: a file or the module changed since it was planned. Nothing was touched.
        CheckpointError: the bytes on disk are wrong; a `DigestError` where only a digest tells.
        ActionError: an action failed; `.done` and `.torn` say what an "in_place" load left behind. So they do on a
            `KeyboardInterrupt` in the middle of one.
        SaveError: a save failed; `.committed` says whether readers see the new checkpoint.

    Example:
        >>> import funcmodel as fm, tempfile, torch
        >>> net = torch.nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = fm.save(net, folder)
        ...     plan = fm.checked(fm.plan_load(fm.module_spec(net), fm.scan(folder)))
        ...     fm.apply(plan, net) is net
        True
    """
    match plan:
        case LoadPlan():
            return assign(plan, to, **options)
        case SavePlan():
            from funcmodel.run.write import write

            return write(plan, to, **options)
    raise TypeError(f"apply takes a LoadPlan or a SavePlan, found {type(plan).__name__}")


def load(
    module: nn.Module,
    source: Source,
    *,
    device_map: object = None,
    policy: LoadPolicy = LoadPolicy(),
    init: Any = None,
    seed: int = 0,
    commit: Literal["swap", "in_place"] = "swap",
    preflight: Literal["headers", "read"] = "headers",
    digest: Literal["ignore", "check"] = "ignore",
    memory: Memory = "own",
    route: Wanted = None,
    live: Tensors | None = None,
    formats: tuple[Format, ...] = FORMATS,
) -> nn.Module:
    """Load a checkpoint into a module: scan, plan, check, apply. All or nothing.

    It never renames, aligns or resizes by itself: where keys do not fit, `KeyMismatchError.hints` names the transform
    that would make them fit, ready to be piped in.

    Args:
        module: any module, on any device, or a `skeleton` without weights. It is changed in place.
        source: a file, a folder, several of them, a plan, or a state dict of tensors.
        device_map: where tensors go; None leaves each where the module's is, and puts what is on meta on the CPU.
        policy: what may be done about findings; by default every finding is an error.
        init: how missing leaves are drawn where the policy allows them; see `plan_load`.
        seed: seed of those draws.
        commit: "swap" or "in_place"; see `apply`.
        preflight: see `apply`.
        digest: "check" hashes every stored tensor that is wanted, and compares it with the digest that is recorded of
            it, before the module is touched.
        memory: "own", or "borrow" for tensors that are pages of the files instead of copies of them: nothing is read
            before it is used. Writing to them changes no file; but whoever overwrites such a file changes them, and
            whoever cuts it short ends this process. Saves of funcmodel replace files and do neither.
        route: how tensors are read, instead of how `routing` would choose; see there.
        live: tensors for the `Live` leaves of a plan.
        formats: the readers to choose from.

    Returns:
        The same module.

    Raises:
        KeyMismatchError: module and source do not fit; all findings at once.
        CheckpointError: the bytes on disk are wrong; a `DigestError` where only a digest tells.
        PlanError: the load cannot be planned.
        ApplyError: see `apply`.

    Example:
        >>> import funcmodel as fm, tempfile, torch
        >>> net = torch.nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = fm.save(net, folder)
        ...     copy = fm.load(fm.skeleton(torch.nn.Linear, 3, 2), folder)
        >>> torch.equal(copy.weight, net.weight)
        True
    """
    dtype: Literal["file", "module"] = "module" if policy.dtype == "module" else "file"

    def attempt() -> nn.Module:
        plan, tensors = _state_dict_plan(source, live, formats)
        planned = plan_load(module_spec(module), plan, device_map=device_map, init=init, seed=seed, dtype=dtype)
        return assign(
            probed(checked(planned, policy), commit=commit, memory=memory, route=route, formats=formats),
            module,
            commit=commit,
            preflight=preflight,
            digest=digest,
            live=tensors,
            formats=formats,
        )

    return attempt() if isinstance(source, Mapping) else _current(attempt)


def save(
    source: nn.Module | Source,
    into: Path,
    *,
    max_shard_size: int | str | None = "5GB",
    shards: Shards = None,
    config: Config | Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    variant: str | None = None,
    aliases: Literal["alias", "copy", "raise"] | None = None,
    tied: tuple[TiedGroup, ...] = (),
    extra_state: Literal["error", "drop"] = "error",
    symlinks: Literal["follow", "refuse"] = "follow",
    durability: Literal["full", "none"] = "full",
    digests: Literal["none", "sha256"] = "none",
    digest: Literal["ignore", "check"] = "ignore",
    live: Tensors | None = None,
    formats: tuple[Format, ...] = FORMATS,
    filesystem: FileSystem = REAL,
) -> CheckpointSpec:
    """Save a module, a plan or a state dict into a folder: plan, apply. Nothing is deleted before it was replaced.

    Args:
        source: a module; or a file, folder or plan, whose tensors are then streamed file to file without a module; or
            a state dict of tensors.
        into: the folder, created where it does not exist; or a path that ends in `.safetensors`, for exactly one file.
        max_shard_size: most bytes of tensor data per file, as an int or as text such as "5GB".
        shards: at most so many files, about equally large, which several threads write at once unless tensors are
            computed (a cast, say); "auto" takes 4 to 8 of them from 2 GiB on. None leaves it to `max_shard_size`.
        config: written as `config.json`.
        texts: more text files beside it, name to content, for example "generation_config.json".
        variant: as in `model.fp16.safetensors`.
        aliases: one tensor under several keys is written once and its other names recorded ("alias"), written under
            each ("copy"), or refused ("raise"). None is "alias" for a module, whose ties find their way back, and
            "copy" for anything else; `recorded` reads the recorded names.
        tied: alias classes of a source that is no module.
        extra_state: extra state that is no tensor is refused ("error") or left out ("drop").
        symlinks: whether a link in place of a file is followed to its target or refused.
        durability: "full" returns when the bytes are on the disk, "none" leaves that to the system.
        digests: "sha256" records the digest of every tensor in the metadata of its file.
        digest: "check" compares what is read of files with the digests that are recorded of it, before it is written.
        live: tensors for the `Live` leaves of a plan.
        formats: the readers to choose from.
        filesystem: the calls that write, so that tests can make each of them fail.

    Returns:
        What was written.

    Raises:
        PlanError: the save cannot be planned, for example because of extra state that is no tensor.
        BusyError: another writer is saving into the folder.
        SaveError: the save failed; `.committed` says whether readers see the new checkpoint.

    Example:
        >>> import funcmodel as fm, tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = fm.save(torch.nn.Linear(3, 2), folder)
        ...     list(fm.scan(folder))
        ['bias', 'weight']
    """
    from funcmodel.plan.saving import plan_save  # who only loads needs none of it
    from funcmodel.run.existing import existing_checkpoint
    from funcmodel.run.write import write

    check_choice("extra_state", extra_state, ("error", "drop"))
    folder, name = os.fspath(into), "model"
    if folder.endswith(SUFFIX) and not os.path.isdir(folder):
        if shards not in (None, 1):
            raise ValueError(f"{folder} is one file, shards={shards!r} asks for several; pass a folder")
        folder, name = os.path.split(folder.removesuffix(SUFFIX))
        folder, max_shard_size, shards = folder or os.curdir, None, None
    folder = folder if os.path.isabs(folder) else os.path.join(os.getcwd(), folder)  # another thread may change that

    def attempt() -> CheckpointSpec:
        tensors: Tensors | None
        if isinstance(source, nn.Module):
            plan, tensors, groups = _module_plan(source, extra_state)
        else:
            (plan, tensors), groups = _state_dict_plan(source, live, formats), tied
        planned = plan_save(
            plan,
            max_shard_size=max_shard_size,
            shards=shards,
            tied=groups,
            aliases=aliases or ("alias" if isinstance(source, nn.Module) else "copy"),
            existing=existing_checkpoint(folder, name=name, variant=variant),
            config=config if config is None or isinstance(config, Config) else Config(config),
            texts=texts,
            variant=variant,
            name=name,
            digests=digests,
        )
        return write(
            planned,
            folder,
            symlinks=symlinks,
            durability=durability,
            digest=digest,
            live=tensors,
            formats=formats,
            filesystem=filesystem,
        )

    return _current(attempt)


def _module_plan(
    module: nn.Module, extra_state: Literal["error", "drop"]
) -> tuple[StateDictPlan, Tensors, tuple[TiedGroup, ...]]:
    """A module as a plan, with the tensors of its `Live` leaves and what is tied."""
    from funcmodel.plan.saving import live_plan

    spec = module_spec(module)
    if spec.opaque and extra_state == "error":
        raise PlanError(
            f"{spec.name} holds extra state that is no tensor: {', '.join(spec.opaque)}; "
            "save it yourself and pass extra_state='drop'",
            keys=spec.opaque,
        )
    return live_plan(spec), live_tensors(module), spec.tied


def _current(attempt: Callable[[], T]) -> T:
    """The result of scanning, planning and applying, done anew where another process replaced a file in between."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return attempt()
        except StalePlanError as error:
            if "path" not in error.fields:
                raise
    return attempt()


def _state_dict_plan(
    source: Source, live: Tensors | None, formats: tuple[Format, ...]
) -> tuple[StateDictPlan, Tensors | None]:
    """The source as a plan, with the tensors of its `Live` leaves."""
    if isinstance(source, StateDictPlan):
        return source, live
    if not isinstance(source, Mapping):
        return scan(source, formats=formats), live
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, Expr] = {}
    first: dict[object, str] = {}
    for key, value in source.items():
        if isinstance(value, torch.Tensor) and isinstance(key, str):
            tensors[key] = value
            entries[key] = Live(first.setdefault(_elements(key, value), key), tensor_spec(value))
        elif isinstance(value, Expr) and isinstance(key, str):
            entries[key] = value
        else:
            raise PlanError(
                f"a state dict holds tensors or expressions by name, found {type(value).__name__} under {key!r:.80}; "
                "pass the state dict that lies inside, and leave out what is no tensor"
            )
    return StateDictPlan(entries), {**(live or {}), **tensors}


def _elements(key: str, tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same elements of the same memory."""
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return key
    lazy = tensor.is_conj(), tensor.is_neg()  # the same memory, and other values
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, lazy
