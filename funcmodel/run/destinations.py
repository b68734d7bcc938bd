"""Where a staged file goes: links followed or refused, and the file itself while it is written."""

import errno
import os
import stat
from collections.abc import Iterable
from itertools import islice
from typing import Final

from attrs import define, field

from funcmodel.errors import UnsafePathError
from funcmodel.run.filesystem import REAL, FileSystem, Symlinks

_IOVECS: Final = 1024  # the kernel's limit
_GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR})


@define(eq=False)
class StagedFile:
    """A file under a temporary name beside its final one.

    Attributes:
        final: where it goes, links resolved.
        temporary: where it is; it starts with a dot and does not end like weights, so that no reader takes it.
        fd: open for reading and writing.
        filesystem: the calls to make.
        fingerprint: of what was written, once it is sealed.
        time: of the last write in nanoseconds, once it is sealed.
    """

    final: str
    temporary: str
    fd: int
    filesystem: FileSystem = REAL
    fingerprint: str = field(default="", init=False)
    time: int = field(default=0, init=False)

    def write(self, buffers: Iterable[memoryview], offset: int) -> int:
        """Write buffers one after the other from `offset` on, however short the kernel's writes are.

        Returns:
            The offset behind the last byte.

        Raises:
            OSError: the kernel's.
        """
        waiting = iter(buffers)
        while batch := list(islice(waiting, _IOVECS)):
            batch.reverse()
            while batch:
                count = self.filesystem.pwritev(self.fd, batch[::-1], offset)
                if not count and any(batch):
                    raise OSError(errno.EIO, "the system wrote nothing and gave no reason", self.temporary)
                offset += count
                while batch and count >= len(batch[-1]):
                    count -= len(batch.pop())
                if count:
                    batch[-1] = batch[-1][count:]
        return offset

    def close(self) -> None:
        """Give the descriptor back. A second call does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self.filesystem.close(fd)


def destination(path: str, symlinks: Symlinks, filesystem: FileSystem = REAL) -> str:
    """The path that a file gets, with a link at its end followed or refused.

    Raises:
        UnsafePathError: a link that may not be followed, or no regular file in the place of one.
        OSError: the system refused.
    """
    found = lstat(path, filesystem)
    if found is None or stat.S_ISREG(found.st_mode):
        return path
    if not stat.S_ISLNK(found.st_mode):
        raise UnsafePathError(f"{path}: is no regular file; remove it", code="NOT_REGULAR_FILE", path=path)
    target = filesystem.realpath(path)
    if symlinks == "refuse":
        raise UnsafePathError(
            f"{path}: is a link to {target}, and links are refused; pass symlinks='follow' to replace its target",
            code="SYMLINK",
            path=path,
        )
    _check_unshared(path, target)
    home, there = lstat(os.path.dirname(target), filesystem), lstat(target, filesystem)
    if home is None or not stat.S_ISDIR(home.st_mode) or not (there is None or stat.S_ISREG(there.st_mode)):
        raise UnsafePathError(
            f"{path}: is a link to {target}, where no file can be written; remove it", code="SYMLINK", path=path
        )
    return target


def check_removable(path: str, filesystem: FileSystem = REAL) -> None:
    """Refuse to remove a link into a cache that others share.

    Raises:
        UnsafePathError: it is one; code "SYMLINK_CACHE".
        OSError: the system refused.
    """
    found = lstat(path, filesystem)
    if found is not None and stat.S_ISLNK(found.st_mode):
        _check_unshared(path, filesystem.realpath(path))


def lstat(path: str, filesystem: FileSystem = REAL) -> os.stat_result | None:
    """What a path is; None where there is nothing.

    Raises:
        OSError: the system refused.
    """
    try:
        return filesystem.lstat(path)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise


def _check_unshared(path: str, target: str) -> None:
    if os.path.basename(os.path.dirname(target)) == "blobs":
        raise UnsafePathError(
            f"{path}: is a link into the cache of huggingface_hub, whose files are shared; save somewhere else",
            code="SYMLINK_CACHE",
            path=path,
        )
