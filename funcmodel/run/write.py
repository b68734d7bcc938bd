"""The interpreter of `SavePlan`: headers from the plan first, then tensors stream through one bounded buffer."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import torch
from attrs import frozen

from funcmodel.core.folder import leftovers, sidecars
from funcmodel.core.index import parse_config, render_index
from funcmodel.core.limits import check_choice
from funcmodel.core.shapes import spec_of
from funcmodel.core.wire import BLANK, fingerprint, with_digests
from funcmodel.errors import PlanError, UnsafePathError
from funcmodel.plan.sharding import SUFFIX, variant_of, writers
from funcmodel.records.actions import Publish, WriteIndex, WriteShard, WriteText
from funcmodel.records.checkpoint import CheckpointSpec, FileSpec, IndexSpec, StoredTensor
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.plans import SavePlan
from funcmodel.run.crew import Crew
from funcmodel.run.engine import opened
from funcmodel.run.files import Digest, Hashed
from funcmodel.run.filesystem import REAL, Durability, FileSystem, Symlinks
from funcmodel.run.formats import FORMATS, Format, format_of
from funcmodel.run.outgoing import Outgoing

if TYPE_CHECKING:
    from funcmodel.run.destinations import StagedFile
    from funcmodel.run.staging import Transaction

LiveTensors: TypeAlias = Mapping[str, torch.Tensor]
Path: TypeAlias = str | os.PathLike[str]

_LONGEST: Final = 255  # bytes of a file name, on nearly every system
_MARKED: Final = re.compile(r"-[0-9a-f]{8}-[0-9]+-of-[0-9]+\.safetensors$")
_MARK: Final = len("-00000000")  # of shards whose plain names are taken: every second save needs it


def write(
    plan: SavePlan,
    into: Path,
    *,
    live: LiveTensors | None = None,
    formats: tuple[Format, ...] = FORMATS,
    symlinks: Symlinks = "follow",
    durability: Durability = "full",
    filesystem: FileSystem = REAL,
    digest: Literal["ignore", "check"] = "ignore",
) -> CheckpointSpec:
    """Write a checkpoint. Readers see the old one or the new one; the old one after an error before the commit.

    Everything is staged beside its final name; one rename commits; what the plan replaces is removed only then. Peak
    memory is the headers, one tensor that must be computed, and at most 16 MiB of buffers, out of a GPU pinned ones,
    for each shard that is being written; how many are at once, their size and the number of cores say. Saving onto the
    files that are being read, or that live tensors are mapped from, is safe: the new files are other files.

    Args:
        plan: what to write.
        into: the folder, created with its parents where it does not exist; or the path of the single file that the
            plan writes, in its folder.
        live: tensors for the `Live` leaves, on any device, of any strides. They are read, never changed.
        formats: the formats of the files that are read and written.
        symlinks: a link in the place of a file is followed, and its target replaced, or refused. Links into the cache
            of huggingface_hub are always refused.
        durability: "full" flushes files and folders, so that a checkpoint that was reported saved survives a loss of
            power; "none" leaves that to the system.
        filesystem: the calls that write, so that tests can make each of them fail.
        digest: "check" first hashes every stored tensor that is read, and compares it with its recorded digest.

    Returns:
        What was written.

    Raises:
        PlanError: the plan cannot be written (a live tensor on meta, a name that is too long); nothing was touched.
        StalePlanError: a source, a live tensor or the folder is not what was planned.
        ChangedError: a source changed while it was read.
        DigestError: a stored tensor is not what was recorded, or nothing is recorded of it; nothing was changed.
        UnsafePathError: a link that may not be followed.
        BusyError: another writer has the folder; nothing was changed.
        SaveError: the system refused; `.committed` says whether readers see the new checkpoint.
        NoSpaceError: the disk is full; `.needed` and `.available` in bytes.
    """
    from funcmodel.run.staging import Transaction  # who only loads needs none of it

    check_choice("symlinks", symlinks, get_args(Symlinks))
    check_choice("durability", durability, get_args(Durability))
    publish = _publish(plan)
    where = _folder(os.path.join(os.getcwd(), into) if not os.path.isabs(into) else os.fspath(into), publish)
    if symlinks == "refuse" and os.path.islink(where):
        raise UnsafePathError(f"{where}: is a link, and links are refused", code="SYMLINK", path=where)
    folder = os.path.realpath(where)
    shards = [_layout(action, formats) for action in plan.actions if isinstance(action, WriteShard)]
    texts = dict(_text(action) for action in plan.actions if isinstance(action, WriteText | WriteIndex))
    entries = {key: expr for shard in shards for key, expr in shard.action.entries.items()}
    check: Digest = Hashed() if digest == "check" else digest
    sources = Outgoing(entries, live or {}, formats, check)
    sizes = {**{shard.file: shard.nbytes for shard in shards}, **{file: len(text) for file, text in texts.items()}}
    if {*sizes} != {*publish.renames, publish.commit}:
        raise PlanError(f"the plan writes {sorted(sizes)} and publishes {sorted((*publish.renames, publish.commit))}")
    with Transaction(folder, publish, symlinks, durability, filesystem, sizes) as transaction:
        transaction.reserve()
        reads = opened(sources.refs.values(), formats, entries.values(), check)
        with reads as files, closing(sources.computed()) as values:

            def write_one(shard: _Shard, staged: "StagedFile", crew: Crew) -> _Shard:
                batches = sources.buffers(shard.action.entries, files, values)
                with torch.no_grad():  # that is a setting of each thread
                    return _write_shard(shard, staged, takewhile(lambda _: not crew.stopped, batches), formats)

            shards = list(_each(shards, transaction, write_one, _writers(shards, sources)))
            for _ in values:  # only a stream that has ended has seen one state of its files
                raise AssertionError("a value that no shard holds")
        for file, text in texts.items():
            transaction.stage(file).write([memoryview(text)], 0)
            transaction.seal(file, len(text))
        transaction.commit()
        return _written(where, os.listdir(folder), publish.commit, plan, shards)


# -- the plan, before anything is touched ------------------------------------------------------------------------------


@frozen
class _Shard:
    """One file of weights, laid out."""

    file: str
    action: WriteShard
    metadata: FrozenMap[str, str]
    tensors: FrozenMap[str, StoredTensor]
    format: str
    header: bytes
    nbytes: int


def _layout(action: WriteShard, formats: tuple[Format, ...], digests: Mapping[str, str] | None = None) -> _Shard:
    """The file that holds these digests; where they are recorded and not known yet, one of the same size."""
    format_ = format_of(action.file, formats)
    if format_.write is None:
        raise PlanError(f"{action.file}: files of the format {format_.name!r} are only read")
    specs = {key: spec_of(expr) for key, expr in action.entries.items()}
    metadata = action.metadata
    if action.digests != "none":
        metadata = with_digests(metadata, digests or dict.fromkeys(("", *specs), BLANK))
    header, offsets = format_.write(specs, metadata)
    starts = dict(offsets.items())
    tensors: dict[str, StoredTensor] = {}
    end = len(header)
    for key, spec in specs.items():
        start, end = end, end + spec.nbytes
        if starts[key] != start:
            raise PlanError(f"{action.file}: the format leaves a gap before {key!r}, at byte {start}")
        tensors[key] = StoredTensor(spec, start, end)
    return _Shard(action.file, action, metadata, FrozenMap(tensors), format_.name, header, end)


def _text(action: WriteText | WriteIndex) -> tuple[str, bytes]:
    text = action.text if isinstance(action, WriteText) else render_index(action.weight_map, action.metadata)
    try:
        return action.file, text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PlanError(f"{action.file}: half a character (a lone surrogate), which UTF-8 cannot hold") from error


def _publish(plan: SavePlan) -> Publish:
    found = [action for action in plan.actions if isinstance(action, Publish)]
    if len(found) != 1:
        raise PlanError(f"a save plan holds one Publish, found {len(found)}; make it with plan_save")
    for name in (*found[0].renames, found[0].commit, *found[0].removes):
        plain = name not in found[0].removes
        if (
            not {"", ".", ".."}.isdisjoint(name.split("/"))
            or any(c in name for c in "\\:\0")
            or (plain and "/" in name)
        ):
            raise UnsafePathError(
                f"{name!r} leaves the folder; a plan names files of one folder", code="PATH", path=name
            )
    for name in (*found[0].renames, found[0].commit):
        shard = name in found[0].renames and name.endswith(SUFFIX) and not _MARKED.search(name)
        most, nbytes = _LONGEST - _MARK * shard, len(name.encode("utf-8", "surrogatepass"))
        if nbytes > most:
            raise PlanError(f"{name!r:.80}...: has {nbytes} bytes, a file name at most {most}; choose a shorter one")
    return found[0]


def _folder(path: str, publish: Publish) -> str:
    """The folder that a path means."""
    if not path.endswith(SUFFIX) or os.path.isdir(path):
        return path
    if os.path.basename(path) != publish.commit:
        name = os.path.basename(path).removesuffix(SUFFIX)
        raise PlanError(
            f"{path}: the plan writes {publish.commit!r}; to write exactly this file, plan it with "
            f"plan_save(..., name={name!r}, max_shard_size=None)"
        )
    return os.path.dirname(path) or os.curdir


# -- bytes -------------------------------------------------------------------------------------------------------------


def _writers(shards: Sequence[_Shard], sources: Outgoing) -> int:
    """How many shards are written at once here."""
    most = writers([shard.nbytes for shard in shards], sources.kind)
    if most == 1:
        return 1
    from funcmodel.run.machine import threads

    return min(most, threads())


def _each(
    shards: Sequence[_Shard],
    transaction: "Transaction",
    write_one: "Callable[[_Shard, StagedFile, Crew], _Shard]",
    at_once: int,
) -> Iterator[_Shard]:
    """Write shards, so many at once, each complete on the disk when it is given back."""
    for start in range(0, len(shards), at_once):
        written = list(shards[start : start + at_once])
        crew = Crew()

        def take(at: int, staged: "StagedFile", written: list[_Shard] = written, crew: Crew = crew) -> None:
            written[at] = write_one(written[at], staged, crew)
            if len(written) > 1 and transaction.durability == "full":
                transaction.filesystem.fsync(staged.fd)  # beside the others; sealing it finds nothing left to do

        crew.together([partial(take, at, transaction.stage(shard.file)) for at, shard in enumerate(written)])
        for shard in written:
            transaction.seal(shard.file, shard.nbytes)
        yield from written


def _write_shard(
    shard: _Shard, staged: "StagedFile", batches: Iterator[list[memoryview]], formats: tuple[Format, ...]
) -> _Shard:
    """The shard as it stands in the file."""
    if shard.action.digests != "none":
        return _write_hashed(shard, staged, batches, formats)
    at = staged.write([memoryview(shard.header)], 0)
    for batch in batches:
        at = staged.write(batch, at)
        del batch  # it holds a tensor, and the next one is made when the loop goes on
    return shard


def _write_hashed(
    shard: _Shard, staged: "StagedFile", batches: Iterator[list[memoryview]], formats: tuple[Format, ...]
) -> _Shard:
    """The header comes last: it holds the digests of what has been written by then, and its own."""
    from funcmodel.core.digests import header_digest
    from funcmodel.run.digests import hashing

    found = {"": BLANK}
    at = len(shard.header)
    for batch in hashing(batches, shard.tensors, found):
        at = staged.write(batch, at)
        del batch
    found[""] = header_digest(_layout(shard.action, formats, found).header)
    written = _layout(shard.action, formats, found)
    if len(written.header) != len(shard.header) or written.tensors != shard.tensors:
        raise PlanError(f"{shard.file}: the format {shard.format!r} moves tensors when digests are recorded")
    staged.write([memoryview(written.header)], 0)
    return written


# -- what is there now ------------------------------------------------------------------------------------------------


def _written(where: str, names: list[str], commit: str, plan: SavePlan, shards: list[_Shard]) -> CheckpointSpec:
    """The checkpoint as a scan would find it, from what was written."""
    index = None
    config = None
    for action in plan.actions:
        if isinstance(action, WriteIndex):
            size = len(_text(action)[1])
            index = IndexSpec(
                path=os.path.join(where, action.file),
                weight_map=action.weight_map,
                metadata=action.metadata,
                nbytes=size,
            )
        elif isinstance(action, WriteText) and action.file == "config.json":
            config = parse_config(action.text)
    files = [_file_spec(os.path.join(where, shard.file), shard) for shard in shards]
    return CheckpointSpec(
        path=where,
        files=tuple(sorted(files, key=lambda file: file.path)),
        index=index,
        variant=variant_of(commit),
        config=config,
        ignored=leftovers(names, [commit, *(shard.file for shard in shards)]),
        digests=sidecars(names, [shard.file for shard in shards]),
    )


def _file_spec(path: str, shard: _Shard) -> FileSpec:
    return FileSpec(
        path=path,
        nbytes=shard.nbytes,
        tensors=shard.tensors,
        metadata=shard.metadata,
        fingerprint=fingerprint(shard.header, shard.nbytes),
        format=shard.format,
    )
