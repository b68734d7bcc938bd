"""Reads past the page cache: for large files of which little is in it, and which nobody will soon read again."""

import mmap
import os
import threading
from collections.abc import Sequence
from io import FileIO

import numpy as np
from attrs import define, field

from funcmodel.plan.routing import BLOCK, SPAN
from funcmodel.run.files import READ, SourceFile


@define(eq=False)
class DirectFile:
    """An open file that is read past the page cache, and through it where the system refuses that.

    The kernel then writes whole blocks, to addresses that are multiples of a block. Where file and memory both start on
    one, bytes go there at once; all else passes through memory that each thread has for itself.

    Attributes:
        file: the file.
        span: how many bytes of it, whole blocks.
        own: where it is, shared by all files that are read in one go.
    """

    file: SourceFile
    span: int = SPAN
    own: threading.local = field(factory=threading.local)
    _open: list[FileIO] = field(factory=list, init=False)

    def __enter__(self) -> "DirectFile":
        try:
            # One step, as in `open_regular`: no interrupt leaves a descriptor that nobody closes.
            name = f"/proc/self/fd/{self.file.fd}"
            self._open.extend(map(FileIO, map(os.open, (name,), (READ | os.O_DIRECT,))))
        except OSError:
            pass  # no such system, no such file system: as any other file
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.pop().close()

    def readv_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        """As `SourceFile.readv_into`."""
        if not self._open or not buffers:
            self.file.readv_into(buffers, offset)
            return
        buffer = buffers[0]
        if len(buffers) == 1 and len(buffer) >= BLOCK and not offset % BLOCK and not _address(buffer) % BLOCK:
            whole, done = len(buffer) // BLOCK * BLOCK, 0
            while done < whole and (got := self._direct(buffer[done:whole], offset + done) // BLOCK * BLOCK):
                done += got
            if done == whole:
                buffers, offset = (buffer[whole:],), offset + whole
        self._through(buffers, offset)

    def read_pages(self, where: memoryview, start: int, stop: int, offset: int) -> None:
        """Fill `where[start:stop]` with the bytes from `offset` on; the rest of the first and last page may change too.

        Nothing is copied where a byte's place in its page is that in the file.
        """
        at, last, done = start - offset % BLOCK, -(-stop // BLOCK) * BLOCK, start
        if self._open and at >= 0 and last <= len(where) and not (_address(where) + at) % BLOCK:
            got = BLOCK
            while at < stop and got and not got % BLOCK:  # refused, or the end of a file that was cut short
                got = self._direct(where[at:last], offset - start + at)
                at += got
            done = max(start, min(at, stop))
        if done < stop:
            self.readv_into((where[done:stop],), offset + done - start)

    def _through(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Read buffers, one after the other, by way of this thread's pages."""
        stop = offset + sum(map(len, buffers))
        waiting = [buffer for buffer in reversed(buffers) if len(buffer)]
        span = self._span() if waiting else None
        while offset < stop:
            start = offset // BLOCK * BLOCK
            got = 0 if span is None else self._direct(span[: -(-(stop - start) // BLOCK) * BLOCK], start)
            fresh = min(start + got, stop) - offset
            if fresh <= 0 or span is None:  # refused, or the end of a file that was cut short
                self.file.readv_into(waiting[::-1], offset)
                return
            at = offset - start
            offset += fresh
            while fresh:
                buffer = waiting.pop()
                size = min(fresh, len(buffer))
                # Not by memoryviews: their copy would keep every other thread from running.
                np.copyto(np.frombuffer(buffer, np.uint8, size), np.frombuffer(span, np.uint8, size, at))
                at += size
                fresh -= size
                if size < len(buffer):
                    waiting.append(buffer[size:])

    def _direct(self, where: memoryview, start: int) -> int:
        """How many bytes were read; 0 where the system refuses, which says why when it is asked through the cache."""
        try:
            return os.preadv(self._open[0].fileno(), [where], start)
        except OSError:
            return 0

    def _span(self) -> memoryview | None:
        found = getattr(self.own, "span", None)
        if found is None:
            try:
                # With room for the rest of the first and the last block, or a few bytes would be a read of their own.
                pages = mmap.mmap(-1, self.span + 2 * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, OverflowError):
                return None  # of memory
            found = self.own.span = memoryview(pages)
        return found


def _address(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)
