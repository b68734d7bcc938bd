"""The interpreter of `SavePlan`: headers from the plan first, then tensors stream through one bounded buffer."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import torch
from attrs import frozen

from funcmodel.core.folder import leftovers, sidecars
from funcmodel.core.index import parse_config, render_index
from funcmodel.core.limits import check_choice
from funcmodel.core.shapes import spec_of
from funcmodel.core.wire import BLANK, fingerprint, with_digests
from funcmodel.errors import PlanError, UnsafePathError
from funcmodel.plan.sharding import SUFFIX, variant_of
from funcmodel.records.actions import Publish, WriteIndex, WriteShard, WriteText
from funcmodel.records.checkpoint import CheckpointSpec, FileSpec, IndexSpec, StoredTensor
from funcmodel.records.expressions import Expr, FileRef, Live, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.plans import SavePlan
from funcmodel.run.checks import check_plan
from funcmodel.run.engine import Source, opened
from funcmodel.run.evaluate import stream
from funcmodel.run.files import Digest, Hashed
from funcmodel.run.filesystem import REAL, Durability, FileSystem, Symlinks
from funcmodel.run.formats import FORMATS, Format, format_of
from funcmodel.run.tensors import FROM_TORCH, byte_view

if TYPE_CHECKING:
    from funcmodel.run.destinations import StagedFile

LiveTensors: TypeAlias = Mapping[str, torch.Tensor]
Path: TypeAlias = str | os.PathLike[str]

_LONGEST: Final = 255  # bytes of a file name, on nearly every system
_MARKED: Final = re.compile(r"-[0-9a-f]{8}-[0-9]+-of-[0-9]+\.safetensors$")
_MARK: Final = len("-00000000")  # of shards whose plain names are taken: every second save needs it
_BUFFER: Final = 16 << 20  # stored bytes pass through a buffer of this size
_SLAB: Final = 4 << 20  # small tensors are joined into blocks of this size
_SMALL: Final = 64 << 10  # and are smaller than this
_PIECE: Final = 8 << 20  # what is not contiguous on the CPU is made so in pieces of this size


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
    memory is the headers, one tensor that must be computed, and at most 32 MiB of buffers. Saving onto the files that
    are being read, or that live tensors are mapped from, is safe: the new files are other files.

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
    sources = _Sources(entries, live or {}, formats, check)
    sizes = {**{shard.file: shard.nbytes for shard in shards}, **{file: len(text) for file, text in texts.items()}}
    if {*sizes} != {*publish.renames, publish.commit}:
        raise PlanError(f"the plan writes {sorted(sizes)} and publishes {sorted((*publish.renames, publish.commit))}")
    with Transaction(folder, publish, symlinks, durability, filesystem, sizes) as transaction:
        transaction.reserve()
        reads = opened(sources.refs.values(), formats, entries.values(), check)
        with reads as files, closing(sources.computed()) as values, torch.no_grad():
            for at, shard in enumerate(shards):
                staged = transaction.stage(shard.file)
                shards[at] = _write_shard(shard, staged, sources.buffers(shard, files, values), formats)
                transaction.seal(shard.file, shard.nbytes)
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
    specs = {key: expr.spec if isinstance(expr, Read | Live) else spec_of(expr) for key, expr in action.entries.items()}
    metadata = action.metadata
    if action.digests != "none":
        metadata = with_digests(metadata, digests or dict.fromkeys(("", *specs), BLANK))
    header, offsets = format_.write(specs, metadata)
    tensors: dict[str, StoredTensor] = {}
    end = len(header)
    for key, spec in specs.items():
        start, end = end, end + spec.nbytes
        if offsets[key] != start:
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


# -- bytes ------------------------------------------------------------------------------------------------------------


class _Sources:
    """Where the bytes come from: stored tensors as they stand, live tensors as they lie, everything else computed."""

    def __init__(
        self, entries: Mapping[str, Expr], live: LiveTensors, formats: tuple[Format, ...], digest: Digest
    ) -> None:
        self._computed = {key: expr for key, expr in entries.items() if not isinstance(expr, Read | Live)}
        self._live = live
        self._formats = formats
        self._digest = digest
        self._buffer = memoryview(b"")  # made when the first stored tensor is copied
        self.refs = {id(ref): ref for ref in check_plan(self._computed, live)}
        for key, expr in entries.items():
            if isinstance(expr, Read):
                if not 0 <= expr.offset <= expr.file.nbytes - expr.spec.nbytes:
                    check_plan({key: expr}, live)
                self.refs[id(expr.file)] = expr.file
            elif isinstance(expr, Live):
                _check_live(expr, live)

    def computed(self) -> Any:
        """The tensors that are neither stored nor live as they are wanted, in the order of the entries."""
        return stream(self._computed, live=self._live, formats=self._formats, digest=self._digest)

    def buffers(
        self, shard: _Shard, files: Mapping[FileRef, Source], values: Iterator[tuple[str, torch.Tensor]]
    ) -> Iterator[list[memoryview]]:
        """The data of a shard, in order. Each batch must be written before the next is asked for."""
        for kind, run in groupby(shard.action.entries.items(), key=lambda entry: type(entry[1])):
            if kind is Read:
                yield from self._stored((expr for _, expr in run if isinstance(expr, Read)), files)
            elif kind is Live:
                yield from _joined(self._live[expr.key] for _, expr in run if isinstance(expr, Live))
            else:
                yield from _joined(next(values)[1] for _ in run)

    def _stored(self, reads: Iterable[Read], files: Mapping[FileRef, Source]) -> Iterator[list[memoryview]]:
        """Stored bytes through one buffer; tensors that are neighbors on both sides are read in one call."""
        buffer = self._buffer = self._buffer or memoryview(bytearray(_BUFFER))
        filled = 0
        for ref, start, stop in _ranges(reads):
            while start < stop:
                count = min(stop - start, _BUFFER - filled)
                files[ref].readv_into([buffer[filled : filled + count]], start)
                filled += count
                start += count
                if filled == _BUFFER:
                    yield [buffer]
                    filled = 0
        if filled:
            yield [buffer[:filled]]


def _check_live(leaf: Live, live: LiveTensors) -> None:
    """What `check_plan` checks, with one look at tensors that are as planned: there may be 100,000 of them."""
    tensor, spec = live.get(leaf.key), leaf.spec
    if not (
        isinstance(tensor, torch.Tensor)
        and tensor.shape == spec.shape
        and FROM_TORCH.get(tensor.dtype) is spec.dtype
        and not tensor.is_meta
        and tensor.layout is torch.strided
    ):
        check_plan({leaf.key: leaf}, live)


def _ranges(reads: Iterable[Read]) -> Iterator[tuple[FileRef, int, int]]:
    """The byte ranges of stored tensors, those joined that follow one another in their file."""
    ref, start, stop = None, 0, 0
    for read in reads:
        if read.file is not ref or read.offset != stop:
            if ref is not None:
                yield ref, start, stop
            ref, start, stop = read.file, read.offset, read.offset
        stop += read.spec.nbytes
    if ref is not None:
        yield ref, start, stop


def _joined(tensors: Iterable[torch.Tensor]) -> Iterator[list[memoryview]]:
    """The bytes of tensors: small ones copied together, large ones as they lie in memory."""
    small: list[torch.Tensor] = []
    size = 0
    kind = None
    for tensor in tensors:
        nbytes = tensor.nbytes
        fits = nbytes <= _SMALL and tensor.is_cpu
        if small and not (fits and tensor.dtype is kind and size + nbytes <= _SLAB):
            yield [byte_view(torch.cat(small))]
            small, size = [], 0
        if fits:
            small.append(tensor.reshape(-1))
            size, kind = size + nbytes, tensor.dtype
        else:
            yield from _pieces(tensor)
        del tensor  # or the next one would be made while this one is still held
    if small:
        yield [byte_view(torch.cat(small))]


def _pieces(tensor: torch.Tensor) -> Iterator[list[memoryview]]:
    """The bytes of one tensor in row-major order, without a copy where it lies so on the CPU."""
    plain = tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    if plain:
        yield [byte_view(tensor)]
    elif tensor.nbytes <= _PIECE:
        yield [byte_view(tensor.cpu().resolve_conj().resolve_neg().contiguous())]
    else:
        rows = max(1, _PIECE * len(tensor) // tensor.nbytes)
        for part in torch.split(tensor, rows) if len(tensor) > 1 else tensor.unbind():
            yield from _pieces(part)


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
