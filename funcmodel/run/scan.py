"""From a path to headers to a `CheckpointSpec` to a `StateDictPlan`; nothing but headers and JSON is read."""

import os
from collections.abc import Container, Mapping, Sequence
from typing import Final, Literal, TypeAlias, get_args

from attrs import evolve, frozen

from funcmodel.core.folder import choose, is_companion, is_known, leftovers, sidecars
from funcmodel.core.index import check_agreement, parse_config, parse_index
from funcmodel.core.limits import LIMITS, Limits, check_choice
from funcmodel.errors import (
    AmbiguousCheckpointError,
    ChangedError,
    CheckpointError,
    IndexMismatchError,
    UnknownFormatError,
    UnsafePathError,
)
from funcmodel.records.checkpoint import CheckpointSpec, FileSpec, IndexSpec, StoredTensor
from funcmodel.records.expressions import Expr, FileRef, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.plans import StateDictPlan
from funcmodel.run.files import open_regular
from funcmodel.run.formats import FORMATS, Format, format_of

Path: TypeAlias = str | os.PathLike[str]
Which: TypeAlias = Literal["single", "index"]
Symlinks: TypeAlias = Literal["contained", "follow"]

_CONFIG: Final = "config.json"
_LOOKS: Final = 100  # how often a folder is looked at anew that others write to


def scan(
    path: Path | Sequence[Path],
    *,
    variant: str | None = None,
    subfolder: str | None = None,
    formats: tuple[Format, ...] = FORMATS,
    which: Which | None = None,
    key: str | Sequence[str] | None = None,
    limits: Limits = LIMITS,
    symlinks: Symlinks = "contained",
) -> StateDictPlan:
    """A checkpoint as a plan: every key is a `Read` of the bytes that a file holds under that name.

    Args:
        path: a file of weights, an index, a folder, or several of them with no key in common.
        variant: as in `model.fp16.safetensors`.
        subfolder: a folder below `path`.
        formats: the formats to choose from, the preferred one first.
        which: "single" or "index", for a folder that holds both a single file and an index.
        key: what leads to the state dict in each file, for files of `torch.save` that hold more: "model", or
            ("model", "state_dict") for a dict in a dict.
        limits: what is accepted.
        symlinks: links that lead out of the folder are refused, except those within the Hugging Face cache
            ("contained"), or followed because the caller trusts them ("follow").

    Returns:
        The plan: files in the order of their names, keys in the order of each file's header.

    Raises:
        CheckpointError: the bytes on disk are wrong; the subclass and `code` say how, `path` where.
        AmbiguousCheckpointError: the folder holds more than one checkpoint, or two sources hold one key.

    Example:
        >>> import safetensors.torch, tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file({"w": torch.ones(2, 3)}, f"{folder}/model.safetensors")
        ...     plan = scan(folder)
        >>> plan["w"].spec
        [2, 3] float32
    """
    job = _Job(variant=variant, formats=formats, which=which, limits=limits, symlinks=symlinks, key=_key(key))
    entries: dict[str, Expr] = {}
    for one in (path,) if isinstance(path, str | os.PathLike) else path:
        reads = plan_of(_checkpoint(_joined(one, subfolder), job)).entries
        if entries and not entries.keys().isdisjoint(reads):
            raise _shared(entries, reads)
        entries.update(reads)
    return StateDictPlan(FrozenMap(entries))


def scan_checkpoint(
    path: Path,
    *,
    variant: str | None = None,
    subfolder: str | None = None,
    formats: tuple[Format, ...] = FORMATS,
    which: Which | None = None,
    key: str | Sequence[str] | None = None,
    limits: Limits = LIMITS,
    symlinks: Symlinks = "contained",
) -> CheckpointSpec:
    """A checkpoint as a record: its files, its index, its `config.json`, and what lies beside it.

    The arguments are those of `scan`, with one path.

    Raises:
        CheckpointError: the bytes on disk are wrong; the subclass and `code` say how, `path` where.
        AmbiguousCheckpointError: the folder holds more than one checkpoint.

    Example:
        >>> import safetensors.torch, tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file({"w": torch.ones(2, 3)}, f"{folder}/model.safetensors")
        ...     checkpoint = scan_checkpoint(folder)
        >>> checkpoint.files[0].tensors["w"].spec, checkpoint.index, checkpoint.config
        ([2, 3] float32, None, None)
    """
    job = _Job(variant=variant, formats=formats, which=which, limits=limits, symlinks=symlinks, key=_key(key))
    return _checkpoint(_joined(path, subfolder), job, config=True)


def plan_of(checkpoint: CheckpointSpec) -> StateDictPlan:
    """The plan that reads every tensor of a checkpoint under its own name.

    Example:
        >>> plan_of(CheckpointSpec(path="empty", files=()))
        <StateDictPlan: 0 keys>
    """
    entries: dict[str, Expr] = {}
    for file in checkpoint.files:
        ref = FileRef(file.path, file.format, file.nbytes, file.fingerprint)
        for name, stored in file.tensors.items():
            entries[name] = Read(ref, name, stored.spec, stored.start) if stored.view is None else _viewed(ref, stored)
    return StateDictPlan(FrozenMap(entries))


def _viewed(file: FileRef, stored: StoredTensor) -> Expr:
    from funcmodel.core.strided import viewed  # few checkpoints need it

    return viewed(file, stored)


@frozen(kw_only=True)
class _Job:
    """The options of one scan."""

    variant: str | None
    formats: tuple[Format, ...]
    which: Which | None
    limits: Limits
    symlinks: Symlinks
    key: tuple[str, ...]

    def __attrs_post_init__(self) -> None:
        check_choice("which", self.which, (None, *get_args(Which)))
        check_choice("symlinks", self.symlinks, get_args(Symlinks))

    def root(self, folder: str) -> str | None:
        return folder if self.symlinks == "contained" else None


def _key(key: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if key is None else (key,) if isinstance(key, str) else tuple(key)


def _joined(path: Path, subfolder: str | None) -> str:
    where = os.fspath(path)
    if not subfolder:
        return where
    if os.path.isabs(subfolder) or ".." in subfolder.replace("\\", "/").split("/"):
        raise UnsafePathError(
            f"{where}: the subfolder {subfolder!r} lies outside; pass that folder itself",
            code="SUBFOLDER_ESCAPES",
            path=where,
        )
    return os.path.join(where, subfolder)


def _checkpoint(where: str, job: _Job, *, config: bool = False) -> CheckpointSpec:
    """The checkpoint at a path, of one generation even while others save into the folder.

    What is read after the names were listed must still be there under the same name when the last file has been read;
    and a finding about a folder that changed meanwhile is none. Either is reason to look again.
    """
    from funcmodel.run.existing import listing  # a plan needs none of it

    for attempt in range(_LOOKS):
        names = listing(where)
        if names is None:
            return _file(where, job)
        try:
            found = _look(where, names, job, config=config)
        except (CheckpointError, ChangedError):
            if attempt + 1 < _LOOKS and listing(where) != names:
                continue
            raise
        if found.index is None and not config:
            return found
        after = listing(where) or {}
        used = (*([] if found.index is None else [os.path.basename(found.index.path)]), _CONFIG)
        if all(names.get(name) == after.get(name) for name in used):
            return found
    raise ChangedError(f"{where}: changes faster than it can be read; read it again when its writers rest", path=where)


def _look(where: str, there: Mapping[str, tuple[int, ...]], job: _Job, *, config: bool) -> CheckpointSpec:
    from funcmodel.run.existing import stands_in

    stands = stands_in(where, there)
    names = [name for name in there if name not in stands.hidden]
    found = _chosen(where, names, job, decided=stands.decided)
    if stands.hidden:
        found = evolve(found, ignored=leftovers((*found.ignored, *stands.hidden), ()))
    if not config or (_CONFIG not in names and _CONFIG not in stands.pending):
        return found
    path = os.path.join(where, stands.pending.get(_CONFIG, _CONFIG))
    text = _text(path, job.root(where), job.limits.config_bytes)
    return evolve(found, config=parse_config(text, path=os.path.join(where, _CONFIG), limits=job.limits))


def _chosen(where: str, names: Sequence[str], job: _Job, *, decided: Container[str]) -> CheckpointSpec:
    """The checkpoint among the names of a folder.

    Args:
        where: the folder.
        names: what lies in it.
        job: the options.
        decided: names that a journal has decided about. A single file among them that is still there beside an index
            counts.
    """
    for format_ in job.formats:
        choice = choose(names, folder=where, variant=job.variant, suffix=format_.suffix)
        if choice is None:
            continue
        single = choice.single if job.which != "index" else None
        indexes = choice.indexes if job.which != "single" else ()
        if len(indexes) > 1:
            raise _ambiguous(where, indexes)
        index = _index(os.path.join(where, indexes[0]), job.root(where), format_, job) if indexes else None
        if index is not None and single is not None and single not in index.weight_map.values():
            if single in decided:
                index = None
            else:
                raise _ambiguous(where, (single, *indexes))
        if index is not None:
            return _sharded(where, where, index, names, format_, job)
        if single is not None:
            rivals = _rivals(single, names, format_, job)
            if rivals:
                raise _ambiguous(where, (single, *rivals), do="pass the file instead of the folder")
            spec = _header(os.path.join(where, single), job.root(where), format_, job)
            ignored = leftovers(names, (single,))
            beside = sidecars(names, (single,))
            return CheckpointSpec(path=where, files=(spec,), variant=job.variant, ignored=ignored, digests=beside)
    raise _nothing(where, names, job)


def _rivals(single: str, names: Sequence[str], format_: Format, job: _Job) -> tuple[str, ...]:
    """Files of the same format under other suffixes, where no name says which file holds the weights."""
    if is_known(single):
        return ()
    suffixes = tuple(f.suffix for f in job.formats if f.name == format_.name and f.suffix != format_.suffix)
    return tuple(sorted(n for n in names if n.endswith(suffixes) and not is_companion(n)))


def _file(path: str, job: _Job) -> CheckpointSpec:
    """A file that the caller named, whose links are therefore trusted; or an index, whose shards lie beside it."""
    folder, name = os.path.split(path)
    if name.endswith(".json"):
        for format_ in job.formats:
            if f"{format_.suffix}.index." in name:
                index = _index(path, None, format_, job)
                return _sharded(path, folder, index, os.listdir(folder or "."), format_, job)
    spec = _header(path, None, format_of(path, job.formats), job)
    return CheckpointSpec(path=path, files=(spec,), variant=job.variant)


def _header(path: str, root: str | None, format_: Format, job: _Job) -> FileSpec:
    if job.key:
        if format_.at is None:
            raise _flat(path, format_, job.key)
        format_ = format_.at(job.key)
    with open_regular(path, root=root) as file:
        return format_.scan(file, job.limits)


def _text(path: str, root: str | None, most: int) -> bytes:
    with open_regular(path, root=root) as file:
        if file.nbytes > most:
            raise CheckpointError(
                f"{path}: {file.nbytes} bytes of JSON, at most {most} are read; if you trust it, pass limits=...",
                code="INDEX_TOO_LARGE",
                path=path,
            )
        return file.read(0, file.nbytes)


def _index(path: str, root: str | None, format_: Format, job: _Job) -> IndexSpec:
    text = _text(path, root, job.limits.index_bytes)
    return parse_index(text, path=path, limits=job.limits, suffixes=(format_.suffix,))


def _sharded(
    where: str, folder: str, index: IndexSpec, names: Sequence[str], format_: Format, job: _Job
) -> CheckpointSpec:
    """All shards of an index; the index and the headers must say the same."""
    shards = sorted(set(index.weight_map.values()))
    files: dict[str, FileSpec] = {}
    for shard in shards:
        path = os.path.join(folder, shard)
        try:
            files[shard] = _header(path, job.root(folder or "."), format_, job)
        except CheckpointError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise _missing(path, shard, index) from error
            raise
    check_agreement(index, files)
    ignored = leftovers(names, (*shards, os.path.basename(index.path)))
    return CheckpointSpec(
        path=where,
        files=tuple(files.values()),
        index=index,
        variant=job.variant,
        ignored=ignored,
        digests=sidecars(names, shards),
    )


# -- errors ------------------------------------------------------------------------------------------------------------


def _flat(path: str, format_: Format, key: tuple[str, ...]) -> UnknownFormatError:
    return UnknownFormatError(
        f"{path}: key={key!r} names a dict in the file, and {format_.name} files hold none; leave it out",
        code="KEY_OF_FLAT_FORMAT",
        path=path,
        key=key,
    )


def _missing(path: str, shard: str, index: IndexSpec) -> IndexMismatchError:
    keys = tuple(key for key, file in index.weight_map.items() if file == shard)
    return IndexMismatchError(
        f"{path}: does not exist; {index.path} says it holds {len(keys)} keys ({_some(keys)}); download it again",
        code="OPEN",
        path=path,
        file=shard,
        key=keys[0],
        keys=keys,
    )


def _shared(entries: Mapping[str, Expr], reads: Mapping[str, Expr]) -> AmbiguousCheckpointError:
    keys = tuple(key for key in reads if key in entries)
    both = (e for key in keys for e in (entries[key], reads[key]))
    files = tuple(dict.fromkeys(e.file.path for e in both if isinstance(e, Read)))
    return AmbiguousCheckpointError(
        f"{_some(files)}: each holds {_some(keys)}; scan them apart, and say with overlay(...) which wins",
        code="KEY_IN_TWO_SOURCES",
        path=files[-1],
        keys=keys,
        candidates=files,
    )


def _ambiguous(
    folder: str, candidates: tuple[str, ...], *, do: str = "remove it, or pass which='single' or which='index'"
) -> AmbiguousCheckpointError:
    return AmbiguousCheckpointError(
        f"{folder}: holds {' and '.join(candidates)}, of which one is a leftover or no weights; {do}",
        code="AMBIGUOUS",
        path=folder,
        candidates=candidates,
    )


def _nothing(folder: str, names: Sequence[str], job: _Job) -> UnknownFormatError:
    others = leftovers(names, ())
    asked = "".join(f" {word} {value!r}" for word, value in (("variant", job.variant), ("which", job.which)) if value)
    known = ", ".join(f.suffix for f in job.formats) or "none"
    beside = f"has {_some(others)}" if others else f"has {len(names)} other files"
    return UnknownFormatError(
        f"{folder}: no weights{asked} of the formats given ({known}), {beside}; check the path, or pass formats=(...)",
        code="NO_CHECKPOINT",
        path=folder,
        candidates=others,
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:120]) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
