"""The engine owns bytes: fresh memory, coalesced ranges of files, a few threads. It knows `Read` and no expression."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from operator import itemgetter
from typing import Final, Protocol, TypeAlias

import torch
from attrs import frozen

from funcmodel.plan.routing import SLAB, span_of
from funcmodel.records.expressions import Expr, FileRef, Read
from funcmodel.records.routes import Route, Routing
from funcmodel.run.crew import Crew
from funcmodel.run.files import Digest, SourceFile
from funcmodel.run.formats import Format, ReadRange, format_named, open_source, range_reader
from funcmodel.run.memory import ALIGNED, PAGE, memory, tensor_at, tensors_at
from funcmodel.run.tensors import torch_dtype, torch_shape

Piece: TypeAlias = tuple[int, memoryview]
Job: TypeAlias = "tuple[Source, int, list[memoryview]]"

RANGE: Final = 16 << 20  # one call reads at most this much
THREADED: Final = 8 << 20  # less than this is not worth a thread
IOVECS: Final = 1024  # the kernel's limit
_GLANCE: Final = 256  # so many calls are work for threads, however small
_CALLS: Final = 32  # of which one takes so many at a time,
_SHARE: Final = 256 << 10  # but no more than it must to have so many bytes


class Source(Protocol):
    """An open file, to those who only read it. Reads carry their own offset, so threads may share it."""

    def readv_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill `buffers`, one after the other, with the bytes from `offset` on, or raise."""


@frozen
class _Decoded:
    """A file whose bytes do not stand there as tensors hold them."""

    file: SourceFile
    read: ReadRange

    def readv_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        for buffer in buffers:
            self.read(self.file, buffer, offset)
            offset += len(buffer)


def source(format_: Format, file: SourceFile) -> Source:
    """An open file, read as tensors hold its bytes.

    Raises:
        CheckpointError: the file cannot be decoded.
    """
    read = range_reader(format_, file)
    return file if read is None else _Decoded(file, read)


def plain_file(of: Source) -> SourceFile | None:
    """The file of a source whose bytes stand in it as tensors hold them, however they are read; else None."""
    if isinstance(of, SourceFile):
        return of
    return None if isinstance(of, _Decoded) else getattr(of, "file", None)


@contextmanager
def opened(
    refs: Iterable[FileRef],
    formats: tuple[Format, ...],
    exprs: Iterable[Expr] = (),
    digest: Digest = "ignore",
    routes: Routing | None = None,
) -> Iterator[dict[FileRef, Source]]:
    """Every file, opened and checked against its fingerprint before the first byte is read, closed whatever happens.

    Args:
        refs: the files.
        formats: the formats that they may have.
        exprs: what will be read of them.
        digest: "check", or a `Hashed`: each tensor of which `exprs` read anything is first compared with its digest.
        routes: which of them are read past the page cache; by default none.

    Raises:
        StalePlanError: a file is not the one that was planned.
        DigestError: a tensor is not what was recorded, or nothing is recorded of it.
        ChangedError: a file changed before the block ended.
    """
    with ExitStack() as stack:
        files: dict[FileRef, SourceFile] = {}
        sources: dict[FileRef, Source] = {}
        for ref in refs:
            if ref not in files:
                file = files[ref] = stack.enter_context(open_source(ref, formats=formats))
                sources[ref] = source(format_named(ref.format, formats), file)
        if len(files) > 1:  # one that was replaced before the next was opened is of another generation
            for file in files.values():
                file.verify_named()
        if digest != "ignore":
            from funcmodel.run.digests import check_reads

            reads = {ref: (file, sources[ref].readv_into) for ref, file in files.items()}
            check_reads(exprs, reads, formats, digest)
        if routes is not None and routes.direct:
            from funcmodel.run.direct import DirectFile

            own = threading.local()
            for ref, file in files.items():
                if ref.path in routes.direct and sources[ref] is file:
                    sources[ref] = stack.enter_context(DirectFile(file, span_of(routes), own))
        yield sources
        for file in files.values():
            file.verify_unchanged()


def jobs(file: Source, pieces: Iterable[Piece]) -> Iterator[Job]:
    """Pieces as calls: what is adjacent in the file goes into one, at most 16 MiB and 1024 buffers each."""
    start = end = room = 0
    views: list[memoryview] = []
    for offset, view in pieces:
        at, size = 0, len(view)
        while at < size:
            if offset + at != end or not room or len(views) == IOVECS:
                if views:
                    yield file, start, views
                start, room, views = offset + at, RANGE, []
            part = view if size <= room and not at else view[at : at + room]
            views.append(part)
            at += len(part)
            room -= len(part)
            end = offset + at
    if views:
        yield file, start, views


def perform(work: Iterable[Job], threads: int) -> None:
    """Read everything, in so many threads where it is much.

    Whatever is raised, `KeyboardInterrupt` too, no thread still reads when this returns.
    """
    work = iter(work)
    first = list(islice(work, _GLANCE))
    much = len(first) == _GLANCE or sum(len(view) for _, _, views in first for view in views) >= THREADED
    if threads == 1 or len(first) == 1 or not much:
        for file, offset, views in chain(first, work):
            file.readv_into(views, offset)
        return
    shares, crew = _shares(chain(first, work)), Crew()

    def read() -> None:
        while (share := crew.next(shares)) is not None:
            for file, offset, views in share:
                file.readv_into(views, offset)

    crew.together([read] * min(threads, len(first)))


def _shares(work: Iterable[Job]) -> Iterator[list[Job]]:
    """What a thread takes at a time: one large call, or so many small ones that asking for them costs less."""
    share: list[Job] = []
    size = 0
    for job in work:
        share.append(job)
        size += sum(map(len, job[2]))
        if size >= _SHARE or len(share) == _CALLS:
            yield share
            share, size = [], 0
    if share:
        yield share


# -- whole stored tensors ----------------------------------------------------------------------------------------------


@frozen
class _Layout:
    """What a spec means in memory."""

    nbytes: int
    kind: torch.dtype
    shape: tuple[int, ...]


class _Slab:
    """Memory that small tensors will share: planned first, then allocated in one go.

    Tensors of one layout are noted together, in two lists: a tuple for each would be one more thing for the garbage
    collector to look at, and there may be 100,000.
    """

    def __init__(self) -> None:
        self.top = 0
        self.spans: list[tuple[list[Piece], int, int, int]] = []  # (pieces of its file, offset, position, bytes)
        self.members: dict[int, tuple[_Layout, list[str], list[int]]] = {}

    def allocate(self, found: dict[str, torch.Tensor]) -> None:
        """Tensors on fresh memory, and the pieces that fill it."""
        where = memory(self.top)
        for pieces, offset, position, size in self.spans:
            pieces.append((offset, where[position : position + size]))
        for layout, keys, positions in self.members.values():
            found.update(zip(keys, tensors_at(where, positions, layout.kind, layout.shape), strict=True))


def read_plain(
    wanted: Mapping[str, Read],
    files: Mapping[FileRef, Source],
    routes: Mapping[str, Route],
    threads: int = 1,
    between: int = 0,
) -> dict[str, torch.Tensor]:
    """Whole stored tensors, each byte moved once, from the file into the tensor's own memory.

    Those on the route "slab" share blocks of at most 4 MiB, each tensor at a multiple of 64; others have their own.

    Args:
        wanted: key and tensor.
        files: the open files.
        routes: of all keys.
        threads: how many read.
        between: so many bytes between two tensors on the route "slab" are read with them, and forgotten. None are of a
            file that is decoded: what it would make of other bytes, nobody knows.

    Raises:
        PlanError: torch has no such dtype.
        TruncatedError: a file ended early.
    """
    found: dict[str, torch.Tensor] = {}
    by_file: dict[int, list[str]] = {}
    for key, read in wanted.items():
        group = by_file.get(id(read.file))
        if group is None:
            group = by_file[id(read.file)] = []
        group.append(key)
    slab = _Slab()
    work: list[tuple[Source, list[Piece]]] = []
    for keys in by_file.values():
        source = files[wanted[keys[0]].file]
        pieces: list[Piece] = []
        work.append((source, pieces))
        plain = plain_file(source)
        align = ALIGNED if plain is None or plain is source else PAGE  # past the page cache it arrives in blocks
        gap = between if plain is not None else 0
        keys.sort(key=lambda key: wanted[key].offset)
        slab = _place(keys, wanted, pieces, slab, found, routes, align, gap)
    if slab.members:
        slab.allocate(found)
    for _, pieces in work:
        pieces.sort(key=itemgetter(0))
    perform((job for file, pieces in work for job in jobs(file, pieces)), threads)
    return found


def _place(
    keys: Iterable[str],
    wanted: Mapping[str, Read],
    pieces: list[Piece],
    slab: _Slab,
    found: dict[str, torch.Tensor],
    routes: Mapping[str, Route],
    align: int,
    between: int,
) -> _Slab:
    """Give every tensor of one file its memory, in file order; the slab is handed on to the next file."""
    layouts: dict[int, _Layout] = {}  # by identity: the specs of a file are shared, and hashing one costs more
    first = size = 0  # the run of small tensors that is being collected: it lies in memory as it lies in the file
    end = -1 - between  # of the small tensor before
    forgotten = memoryview(bytearray(between))
    at, top, members = -1, slab.top, slab.members
    for key in keys:
        read = wanted[key]
        offset, spec = read.offset, read.spec
        layout = layouts.get(id(spec))
        if layout is None:
            layout = layouts[id(spec)] = _Layout(spec.nbytes, torch_dtype(spec.dtype), torch_shape(spec))
        nbytes = layout.nbytes
        if not nbytes:
            found[key] = torch.empty(layout.shape, dtype=layout.kind, device="cpu")
            continue
        if routes[key] != "slab":
            where = memory(nbytes, align)
            found[key] = tensor_at(where, 0, layout.kind, layout.shape)
            pieces.append((offset, where))
            continue
        position = (top + ALIGNED - 1) & -ALIGNED
        if position + nbytes > SLAB:
            if size:
                slab.spans.append((pieces, first, at, size))
            slab.top = top
            slab.allocate(found)
            slab = _Slab()
            position = size = 0
            members = slab.members
        if size and offset == end and position == top:
            size += nbytes
        else:
            if size:
                slab.spans.append((pieces, first, at, size))
            if 0 < offset - end <= between:
                pieces.append((end, forgotten[: offset - end]))
            first, at, size = offset, position, nbytes
        end = offset + nbytes
        top = position + nbytes
        group = members.get(id(layout))
        if group is None:
            group = members[id(layout)] = (layout, [], [])
        group[1].append(key)
        group[2].append(position)
    slab.top = top
    if size:
        slab.spans.append((pieces, first, at, size))
    return slab
