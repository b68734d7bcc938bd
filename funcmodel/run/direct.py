"""Reads past the page cache: for large files of which little is in it, and which nobody will soon read again."""

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from typing import Final

import numpy as np
from attrs import define, field

from funcmodel.run.files import READ, SourceFile

_BLOCK: Final = 4096  # offsets and sizes of direct reads are multiples of it, on every device in use
_SPAN: Final = 8 << 20
_LEAST: Final = 1 << 20  # of less, reading through the cache costs no more
_REFUSED: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})


@define(eq=False)
class DirectFile:
    """An open file that is read past the page cache, and through it where the system refuses that.

    The kernel then writes into page-aligned memory only, so bytes pass through one buffer for each thread.

    Attributes:
        file: the file.
    """

    file: SourceFile
    _fd: int = field(default=-1, init=False)
    _own: threading.local = field(factory=threading.local, init=False)

    def __enter__(self) -> "DirectFile":
        try:
            self._fd = os.open(f"/proc/self/fd/{self.file.fd}", READ | os.O_DIRECT)
        except OSError:
            self._fd = -1  # no such system, no such file system: as any other file
        return self

    def __exit__(self, *_: object) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def readv_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        """As `SourceFile.readv_into`."""
        if self._fd < 0 or sum(map(len, buffers)) < _LEAST:
            self.file.readv_into(buffers, offset)
            return
        for buffer in buffers:
            self._read(buffer, offset)
            offset += len(buffer)

    def _read(self, buffer: memoryview, offset: int) -> None:
        span = self._span()
        done = 0
        while done < len(buffer):
            start = (offset + done) & -_BLOCK
            skipped = offset + done - start
            wanted = min(len(span), skipped + len(buffer) - done)
            try:
                got = os.preadv(self._fd, [span[: -(-wanted // _BLOCK) * _BLOCK]], start)
            except OSError as error:
                if error.errno not in _REFUSED:
                    # Through the cache once more: a block that cannot be read is reported as everywhere else.
                    self.file.read_into(buffer[done:], offset + done)
                    return
                got = 0
            fresh = min(got, wanted) - skipped
            if fresh <= 0:  # refused, or the end of a file that was cut short
                self.file.read_into(buffer[done:], offset + done)
                return
            # Not by memoryviews: their copy would keep every other thread from running.
            np.copyto(np.frombuffer(buffer, np.uint8, fresh, done), np.frombuffer(span, np.uint8, fresh, skipped))
            done += fresh

    def _span(self) -> memoryview:
        found = getattr(self._own, "span", None)
        if found is None:
            pages = mmap.mmap(-1, _SPAN, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            found = self._own.span = memoryview(pages)
        return found
