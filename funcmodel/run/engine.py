"""The engine owns bytes: fresh memory, coalesced ranges of files, a few threads. It knows `Read` and no expression."""

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from operator import itemgetter
from types import MappingProxyType
from typing import Final, Protocol, TypeAlias

import numpy as np
import torch
from attrs import frozen

from funcmodel.errors import NoMemoryError
from funcmodel.records.dtypes import DType
from funcmodel.records.expressions import Expr, FileRef, Read
from funcmodel.run.files import Digest, SourceFile
from funcmodel.run.formats import Format, ReadRange, format_named, open_source, range_reader
from funcmodel.run.tensors import torch_dtype, torch_shape

Piece: TypeAlias = tuple[int, memoryview]
Job: TypeAlias = "tuple[Source, int, list[memoryview]]"

SLAB: Final = 4 << 20  # small tensors share memory up to this size
SMALL: Final = 64 << 10  # and are smaller than this
RANGE: Final = 16 << 20  # one call reads at most this much
THREADED: Final = 8 << 20  # less than this is not worth a thread
IOVECS: Final = 1024  # the kernel's limit
ALIGNED: Final = 64
# Faults on 4 KiB pages cost more than the copy from the page cache; Linux grants 2 MiB pages where it is asked.
_ADVICE: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)
_HUGE: Final = 2 << 20
_HARMLESS: Final = 1 << 30  # less than this is not compared with what the machine has
_SHARED: Final = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
# torch's dtype to numpy's; the types that numpy lacks are carried by integers of their size.
_NATIVE: Final = MappingProxyType({getattr(torch, name): np.dtype(name) for name in _SHARED if hasattr(torch, name)})
_CARRIER: Final = MappingProxyType({size: np.dtype(f"uint{8 * size}") for size in (1, 2, 4, 8)})


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


def memory(nbytes: int) -> memoryview:
    """Fresh writable memory that starts at a multiple of 64 and lives as long as a view of it does.

    Raises:
        NoMemoryError: the machine has not so much.
    """
    if nbytes < SMALL:
        spare = memoryview(bytearray(nbytes + ALIGNED))
        start = -torch.frombuffer(spare, dtype=torch.uint8).data_ptr() % ALIGNED
        return spare[start : start + nbytes]
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _no_memory(nbytes, None) from error
    if _ADVICE is not None and nbytes >= _HUGE:
        pages.madvise(_ADVICE)
    return memoryview(pages)


def require_memory(nbytes: int) -> None:
    """Refuse what no other program's end could make room for. The system itself may promise it, and kill later.

    Args:
        nbytes: of all tensors that will be alive at once.

    Raises:
        NoMemoryError: it is more than the machine has.
    """
    if nbytes < _HARMLESS:
        return
    try:
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with open("/proc/meminfo", encoding="ascii") as file:
            has += sum(int(line.split()[1]) << 10 for line in file if line.startswith("SwapTotal:"))
    except (OSError, ValueError, AttributeError):
        return  # this system does not say
    if nbytes > has:
        raise _no_memory(nbytes, has)


def _no_memory(nbytes: int, has: int | None) -> NoMemoryError:
    found = "" if has is None else f", the machine has {has}"
    return NoMemoryError(
        f"{nbytes} bytes of tensors do not fit into memory{found}; take fewer keys, or stream them",
        needed=nbytes,
        available=has,
    )


def tensor_at(where: memoryview, start: int, kind: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor on bytes of `where`. Its storage is its own: exact in size, with its own version counter.

    A view of one large tensor would do neither: an in-place change of a neighbor would count as a change of it.
    """
    if 0 in shape:
        return torch.empty(shape, dtype=kind, device="cpu")
    # By numpy, because torch.frombuffer makes one axis only and the view that gives it others costs twice as much.
    native = _NATIVE.get(kind)
    if native is not None:
        return torch.from_numpy(np.ndarray(shape, native, where, start))
    return torch.from_numpy(np.ndarray(shape, _CARRIER[kind.itemsize], where, start)).view(kind)


@contextmanager
def opened(
    refs: Iterable[FileRef],
    formats: tuple[Format, ...],
    exprs: Iterable[Expr] = (),
    digest: Digest = "ignore",
) -> Iterator[dict[FileRef, Source]]:
    """Every file, opened and checked against its fingerprint before the first byte is read, closed whatever happens.

    Args:
        refs: the files.
        formats: the formats that they may have.
        exprs: what will be read of them.
        digest: "check", or a `Hashed`: each tensor of which `exprs` read anything is first compared with its digest.

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


def perform(work: Iterable[Job]) -> None:
    """Read everything, in a few threads where it is much.

    Whatever is raised, `KeyboardInterrupt` too, no thread still reads when this returns.
    """
    work = iter(work)
    while batch := list(islice(work, 1024)):
        if len(batch) == 1 or sum(len(view) for _, _, views in batch for view in views) < THREADED:
            for file, offset, views in batch:
                file.readv_into(views, offset)
            continue
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(batch))) as pool:
            waiting = [pool.submit(file.readv_into, views, offset) for file, offset, views in batch]
            try:
                for done in waiting:
                    done.result()
            finally:
                pool.shutdown(cancel_futures=True)


# -- whole stored tensors ----------------------------------------------------------------------------------------------


@frozen
class _Layout:
    """What a spec means in memory."""

    nbytes: int
    kind: torch.dtype
    shape: tuple[int, ...]


class _Slab:
    """Memory that small tensors will share: planned first, then allocated in one go."""

    def __init__(self) -> None:
        self.top = 0
        self.spans: list[tuple[list[Piece], int, int, int]] = []  # (pieces of its file, offset, position, bytes)
        self.members: list[tuple[str, int, _Layout]] = []

    def allocate(self, found: dict[str, torch.Tensor]) -> None:
        """Tensors on fresh memory, and the pieces that fill it."""
        where = memory(self.top)
        for pieces, offset, position, size in self.spans:
            pieces.append((offset, where[position : position + size]))
        for key, position, layout in self.members:
            found[key] = tensor_at(where, position, layout.kind, layout.shape)


def read_plain(wanted: Iterable[tuple[str, Read]], files: Mapping[FileRef, Source]) -> dict[str, torch.Tensor]:
    """Whole stored tensors, each byte moved once, from the file into the tensor's own memory.

    Tensors of at least 64 KiB own their memory; smaller ones share slabs of at most 4 MiB, each at a multiple of 64.

    Raises:
        PlanError: torch has no such dtype.
        TruncatedError: a file ended early.
    """
    found: dict[str, torch.Tensor] = {}
    by_file: dict[int, tuple[FileRef, list[tuple[int, str, _Layout]]]] = {}
    layouts: dict[tuple[tuple[int, ...], DType], _Layout] = {}
    for key, read in wanted:
        spec, ref = read.spec, read.file
        layout = layouts.get((spec.shape, spec.dtype))
        if layout is None:
            shape = torch_shape(spec)
            layout = _Layout(spec.nbytes, torch_dtype(spec.dtype), shape)
            layouts[(spec.shape, spec.dtype)] = layout
        group = by_file.get(id(ref))
        if group is None:
            group = by_file[id(ref)] = (ref, [])
        group[1].append((read.offset, key, layout))
    slab = _Slab()
    work: list[tuple[Source, list[Piece]]] = []
    for ref, entries in by_file.values():
        pieces: list[Piece] = []
        work.append((files[ref], pieces))
        slab = _place(sorted(entries, key=itemgetter(0)), pieces, slab, found)
    if slab.members:
        slab.allocate(found)
    for _, pieces in work:
        pieces.sort(key=itemgetter(0))
    perform(job for file, pieces in work for job in jobs(file, pieces))
    return found


def _place(
    entries: list[tuple[int, str, _Layout]], pieces: list[Piece], slab: _Slab, found: dict[str, torch.Tensor]
) -> _Slab:
    """Give every tensor of one file its memory, in file order; the slab is handed on to the next file."""
    first = size = end = 0  # the run of small tensors that is being collected: it lies in memory as it lies in the file
    at = -1
    for offset, key, layout in entries:
        nbytes = layout.nbytes
        if nbytes >= SMALL:
            where = memory(nbytes)
            found[key] = tensor_at(where, 0, layout.kind, layout.shape)
            pieces.append((offset, where))
            continue
        if not nbytes:
            found[key] = torch.empty(layout.shape, dtype=layout.kind, device="cpu")
            continue
        top = slab.top
        position = (top + ALIGNED - 1) & -ALIGNED
        if position + nbytes > SLAB:
            if size:
                slab.spans.append((pieces, first, at, size))
            slab.allocate(found)
            slab, position, size = _Slab(), 0, 0
        if size and offset == end and position == top:
            size += nbytes
        else:
            if size:
                slab.spans.append((pieces, first, at, size))
            first, at, size = offset, position, nbytes
        end = offset + nbytes
        slab.top = position + nbytes
        slab.members.append((key, position, layout))
    if size:
        slab.spans.append((pieces, first, at, size))
    return slab
