"""From a path to headers to a `CheckpointSpec` to a `StateDictPlan`; nothing but headers and JSON is read."""

import os
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from attrs import evolve, frozen

from funcmodel.core.folder import choose, leftovers
from funcmodel.core.index import parse_config, parse_index
from funcmodel.core.limits import LIMITS, Limits
from funcmodel.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    IndexMismatchError,
    UnknownFormatError,
    UnsafePathError,
)
from funcmodel.records.checkpoint import CheckpointSpec, FileSpec, IndexSpec
from funcmodel.records.expressions import Expr, FileRef, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.plans import StateDictPlan
from funcmodel.run.files import open_regular
from funcmodel.run.formats import FORMATS, Format, format_of

Path: TypeAlias = str | os.PathLike[str]
Which: TypeAlias = Literal["single", "index"]
Symlinks: TypeAlias = Literal["contained", "follow"]


def scan(
    path: Path | Sequence[Path],
    *,
    variant: str | None = None,
    subfolder: str | None = None,
    formats: tuple[Format, ...] = FORMATS,
    which: Which | None = None,
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
    job = _Job(variant=variant, formats=formats, which=which, limits=limits, symlinks=symlinks)
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
    job = _Job(variant=variant, formats=formats, which=which, limits=limits, symlinks=symlinks)
    where = _joined(path, subfolder)
    found = _checkpoint(where, job)
    file = os.path.join(where, "config.json")
    if not os.path.isdir(where) or not os.path.lexists(file):
        return found
    return evolve(found, config=parse_config(_text(file, job.root(where), job), path=file))


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
            entries[name] = Read(ref, name, stored.spec, stored.start)
    return StateDictPlan(FrozenMap(entries))


@frozen(kw_only=True)
class _Job:
    """The options of one scan."""

    variant: str | None
    formats: tuple[Format, ...]
    which: Which | None
    limits: Limits
    symlinks: Symlinks

    def root(self, folder: str) -> str | None:
        return folder if self.symlinks == "contained" else None


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


def _checkpoint(where: str, job: _Job) -> CheckpointSpec:
    try:
        names = os.listdir(where)
    except NotADirectoryError:
        return _file(where, job)
    except FileNotFoundError as error:
        raise _unlisted(where, "does not exist; check the path") from error
    except (OSError, ValueError) as error:
        raise _unlisted(where, f"cannot be opened ({error}); check the path") from error
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
            raise _ambiguous(where, (single, *indexes))
        if index is not None:
            return _sharded(where, where, index, names, format_, job)
        if single is not None:
            spec = _header(os.path.join(where, single), job.root(where), format_, job)
            ignored = leftovers(names, (single,))
            return CheckpointSpec(path=where, files=(spec,), variant=job.variant, ignored=ignored)
    raise _nothing(where, names, job)


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
    with open_regular(path, root=root) as file:
        return format_.scan(file, job.limits)


def _text(path: str, root: str | None, job: _Job) -> bytes:
    with open_regular(path, root=root) as file:
        if file.nbytes > job.limits.index_bytes:
            raise CheckpointError(
                f"{path}: {file.nbytes} bytes of JSON, at most {job.limits.index_bytes} are read",
                code="INDEX_TOO_LARGE",
                path=path,
            )
        return file.read(0, file.nbytes)


def _index(path: str, root: str | None, format_: Format, job: _Job) -> IndexSpec:
    return parse_index(_text(path, root, job), path=path, limits=job.limits, suffixes=(format_.suffix,))


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
    if not _agree(index, files):
        raise _disagreement(index, files)
    ignored = leftovers(names, (*shards, os.path.basename(index.path)))
    return CheckpointSpec(path=where, files=tuple(files.values()), index=index, variant=job.variant, ignored=ignored)


def _agree(index: IndexSpec, files: Mapping[str, FileSpec]) -> bool:
    """Whether each key of the index stands in the header of its shard, and each name of a header in the index."""
    where = index.weight_map
    if sum(len(file.tensors) for file in files.values()) != len(where):
        return False
    return all(where.get(name) == shard for shard, file in files.items() for name in file.tensors)


# -- errors ------------------------------------------------------------------------------------------------------------


def _disagreement(index: IndexSpec, files: Mapping[str, FileSpec]) -> IndexMismatchError:
    held: dict[str, list[str]] = {}
    for shard, file in files.items():
        for name in file.tensors:
            held.setdefault(name, []).append(shard)
    twice = tuple(key for key, shards in held.items() if len(shards) > 1)
    ghosts = tuple(key for key in index.weight_map if key not in held)
    astray = tuple(key for key, shards in held.items() if index.weight_map.get(key) not in shards)
    code, keys, what = (
        ("KEY_IN_TWO_SHARDS", twice, "in more than one shard")
        if twice
        else ("KEY_NOT_AS_INDEXED", astray, "in another shard than the index says, or not in the index")
        if astray
        else ("INDEXED_KEY_MISSING", ghosts, "in the index and in no shard")
    )
    return IndexMismatchError(
        f"{index.path}: {_some(keys)} {what} ({len(index.weight_map)} keys indexed, {len(held)} found); "
        "index and shards belong to different saves, or the index is wrong",
        code=code,
        path=index.path,
        key=keys[0],
        keys=keys,
        files=tuple(held.get(keys[0], ())),
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


def _ambiguous(folder: str, candidates: tuple[str, ...]) -> AmbiguousCheckpointError:
    return AmbiguousCheckpointError(
        f"{folder}: holds {' and '.join(candidates)}, of which one is a leftover; remove it, "
        "or pass which='single' or which='index'",
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


def _unlisted(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: {what}", code="OPEN", path=where)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:120]) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
