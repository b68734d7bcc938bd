"""What the machine can do at best: each function makes one act that is measured beside ours and the peers'.

Memory that is read into is warm (touched before), except where a name says fresh. Threads read and write pieces of
16 MiB, or of 8 MiB past the page cache, without a lock in between.
"""

import json
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.measure import Unavailable
from tests.benchmarks.model import Tensors

Act = Callable[[Any], Any]
Piece = tuple[int, memoryview]

PIECE = 16 << 20
DIRECT_PIECE = 8 << 20
PAGE = 4096


def cores() -> int:
    return len(os.sched_getaffinity(0))


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads that outlive a run, so that no sample pays for their start."""
    return ThreadPoolExecutor(threads)


def spread(work: Callable[[Any], Any], parts: Sequence[Any], threads: int) -> None:
    """`work` on every part, by so many threads; each takes every n-th part, in order."""

    def share(first: int) -> None:
        for part in parts[first::threads]:
            work(part)

    if threads == 1:
        share(0)
    else:
        list(pool(threads).map(share, range(threads)))


def byte_view(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def cut(views: Sequence[Piece], step: int = PIECE) -> list[Piece]:
    return [(at + i, view[i : i + step]) for at, view in views for i in range(0, len(view), step)]


def offsets(path: Path) -> dict[str, int]:
    """Where each tensor of a safetensors file begins, from the header alone."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def memcpy(nbytes: int, threads: int) -> Act:
    """Copy into warm memory."""
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    spans = [slice(i, i + PIECE) for i in range(0, nbytes, PIECE)]
    return lambda _: spread(lambda span: np.copyto(target[span], source[span]), spans, threads)


def first_touch(nbytes: int, *, huge: bool) -> Act:
    """Write once into memory that the system has not yet given: a fault per page of 4 KiB or, if asked for, 2 MiB."""

    def act(_: Any) -> mmap.mmap:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        np.frombuffer(pages, np.uint8).fill(1)
        return pages

    return act


def preadv_into(path: Path, tensors: Tensors, threads: int) -> Act:
    """Read a file, through the page cache, into the very tensors that others load into."""
    starts = offsets(path)
    pieces = cut([(starts[key], byte_view(tensor)) for key, tensor in tensors.items()])
    return lambda _: _preadv(path, pieces, threads, os.O_RDONLY)


def _preadv(path: Path, pieces: list[Piece], threads: int, flags: int) -> None:
    fd = os.open(path, flags)

    def read(piece: Piece) -> None:
        at, view = piece
        done = 0
        while done < len(view):
            count = os.preadv(fd, [view[done:]], at + done)
            if not count:
                raise EOFError(path)
            done += count

    try:
        spread(read, pieces, threads)
    finally:
        os.close(fd)


def page_aligned(nbytes: int) -> memoryview:
    """Warm memory that starts on a page and ends with one."""
    held = mmap.mmap(-1, -(-nbytes // PAGE) * PAGE)
    np.frombuffer(held, np.uint8).fill(1)
    return memoryview(held)


def direct(path: Path, into: memoryview, threads: int) -> Act:
    """Read a whole file past the page cache into `page_aligned` memory. Only the last piece may read short."""
    size = path.stat().st_size
    _require_direct(path)
    pieces = cut([(0, into)], DIRECT_PIECE)

    def act(_: Any) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            spread(lambda piece: _whole(fd, piece, size), pieces, threads)
        finally:
            os.close(fd)

    return act


def direct_copied(path: Path, into: memoryview, threads: int) -> Act:
    """The same, by way of a buffer for each thread, as it must be where memory does not start on a page."""
    size = path.stat().st_size
    _require_direct(path)
    pieces = cut([(0, into)], DIRECT_PIECE)
    own = threading.local()

    def act(_: Any) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

        def read(piece: Piece) -> None:
            at, view = piece
            if not hasattr(own, "buffer"):
                own.buffer = memoryview(mmap.mmap(-1, DIRECT_PIECE))
            _whole(fd, (at, own.buffer[: len(view)]), size)
            np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(own.buffer, np.uint8, len(view)))

        try:
            spread(read, pieces, threads)
        finally:
            os.close(fd)

    return act


def _require_direct(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError) as error:
        raise Unavailable(f"this file system refuses O_DIRECT: {error}") from error


def _whole(fd: int, piece: Piece, size: int) -> None:
    at, view = piece
    count = os.preadv(fd, [view], at)
    if count != min(len(view), size - at):
        raise EOFError(f"{count} of {len(view)} bytes at {at}")


def preadv_fresh(path: Path, threads: int) -> Act:
    """Read a file, through the page cache, into memory that the system has not yet given, in huge pages."""
    size = path.stat().st_size

    def act(_: Any) -> mmap.mmap:
        pages = _fresh(size)
        _preadv(path, cut([(0, memoryview(pages))]), threads, os.O_RDONLY)
        return pages

    return act


def _fresh(nbytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def mapped_copy(path: Path, tensors: Tensors) -> Act:
    """Map a float32 file and `copy_` each tensor into an existing one of another dtype, with all of torch's threads."""
    return lambda _: _copy_out(path, tensors)


def mapped_copy_fresh(path: Path, tensors: Tensors) -> Act:
    """The same into memory that the system has not yet given, in huge pages."""

    def act(_: Any) -> Tensors:
        pages = torch.frombuffer(_fresh(sum(tensor.nbytes for tensor in tensors.values())), dtype=torch.uint8)
        parts = torch.split(pages, [tensor.nbytes for tensor in tensors.values()])
        views = zip(tensors.items(), parts, strict=True)
        fresh = {key: part.view(tensor.dtype).view(tensor.shape) for (key, tensor), part in views}
        _copy_out(path, fresh)
        return fresh

    return act


def _copy_out(path: Path, tensors: Tensors) -> None:
    starts = offsets(path)
    mapped = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    whole = torch.empty(0, dtype=torch.float32)
    for key, tensor in tensors.items():
        stored = whole.set_(mapped, starts[key] // 4, tensor.shape, tensor.stride())
        tensor.copy_(stored)


def raw_write(tensors: Tensors, files: int, threads: int) -> Act:
    """Write the bytes of the tensors into so many new files of equal size, and flush nothing."""
    pieces = cut([(0, byte_view(tensor)) for tensor in tensors.values()], PIECE)
    ends = list(accumulate(len(view) for _, view in pieces))
    shares: list[list[memoryview]] = [[] for _ in range(files)]
    for (_, view), end in zip(pieces, ends, strict=True):
        shares[min(files - 1, (end - 1) * files // ends[-1])].append(view)

    def act(folder: Path) -> None:
        def write(number: int) -> None:
            with open(folder / f"raw-{number}", "wb", buffering=0) as file:
                for view in shares[number]:
                    written = 0
                    while written < len(view):
                        written += file.write(view[written:]) or 0

        spread(write, range(files), min(threads, files))

    return act


def raw_write_one(tensors: Tensors, threads: int, *, allocated: bool = False) -> Act:
    """Write the bytes of the tensors into one new file, by so many threads, its room allocated first or not."""
    views = [byte_view(tensor) for tensor in tensors.values()]
    starts = [0, *accumulate(map(len, views))]
    pieces = cut(list(zip(starts, views, strict=False)), PIECE)

    def act(folder: Path) -> None:
        fd = os.open(folder / "raw", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            if allocated:
                os.posix_fallocate(fd, 0, starts[-1])
            spread(lambda piece: _pwrite(fd, piece), pieces, threads)
        finally:
            os.close(fd)

    return act


def direct_write(nbytes: int, threads: int) -> Act:
    """Write one new file past the page cache out of memory that happens to start on a page."""
    pieces = cut([(0, page_aligned(nbytes))], DIRECT_PIECE)

    def act(folder: Path) -> None:
        try:
            fd = os.open(folder / "raw", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
        except (OSError, AttributeError) as error:
            raise Unavailable(f"this file system refuses O_DIRECT: {error}") from error
        try:
            spread(lambda piece: _pwrite(fd, piece), pieces, threads)
        finally:
            os.close(fd)

    return act


def _pwrite(fd: int, piece: Piece) -> None:
    at, view = piece
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], at + done)
