"""`FileSystem`: all that a save does to the disk, as one record of functions, so that each call can be made to fail.

`REAL` is the system's. `funcmodel.run.faults` makes others of it that fail, or die, at their n-th call;
`funcmodel.run.powerloss` remembers what a loss of power could leave behind.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Literal, TypeAlias

from attrs import evolve, frozen

Symlinks: TypeAlias = Literal["follow", "refuse"]
Durability: TypeAlias = Literal["full", "none"]

FOLDER: Final = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
# O_NONBLOCK: a pipe or a device in the place of a lock must not keep the writer waiting.
THERE: Final = os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
SHARED: Final = THERE | os.O_RDWR | os.O_CREAT

NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


@frozen(kw_only=True)
class FileSystem:
    """The calls that a save makes; each is named after the function of `os` whose arguments and errors it has.

    Attributes:
        open: path, flags, mode to a descriptor. Folders are opened with `FOLDER`, to be flushed.
        pwritev: descriptor, buffers, offset to the number of bytes written, which may be fewer than were given.
        pread: descriptor, count, offset to bytes.
        fsync: flush a file's bytes, or a folder's names, to the disk.
        close: give a descriptor back.
        fchmod: set the mode of an open file.
        fstat: what an open file is.
        flock: take the exclusive lock of an open file without waiting: whether it was free. An error of `NO_LOCKS`
            where the system has no such locks.
        replace: rename a file over whatever has the new name.
        unlink: remove a name.
        mkdir: make a folder.
        rmdir: remove an empty folder.
        stat: what a path leads to.
        lstat: what a path is.
        listdir: the names in a folder.
        realpath: a path with every link resolved.
        statvfs: how full the disk below a path is.
    """

    open: Callable[[str, int, int], int] = os.open
    pwritev: Callable[[int, Sequence[memoryview], int], int] = os.pwritev
    pread: Callable[[int, int, int], bytes] = os.pread
    fsync: Callable[[int], None] = os.fsync
    close: Callable[[int], None] = os.close
    fchmod: Callable[[int, int], None] = os.fchmod
    fstat: Callable[[int], os.stat_result] = os.fstat
    flock: Callable[[int], bool] = _lock
    replace: Callable[[str, str], None] = os.replace
    unlink: Callable[[str], None] = os.unlink
    mkdir: Callable[[str], None] = os.mkdir
    rmdir: Callable[[str], None] = os.rmdir
    stat: Callable[[str], os.stat_result] = os.stat
    lstat: Callable[[str], os.stat_result] = os.lstat
    listdir: Callable[[str], list[str]] = os.listdir
    realpath: Callable[[str], str] = os.path.realpath
    statvfs: Callable[[str], os.statvfs_result] = os.statvfs


REAL: Final = FileSystem()


class OpenFiles:
    """A file system's calls, where what was opened is closed at the latest when this object is closed or dropped.

    An interrupt strikes between any two steps of Python, also between the call that opens a file and the assignment
    that keeps its descriptor. Here these two are one step, and so are forgetting a descriptor and closing it. It is
    for one thread.
    """

    def __init__(self, filesystem: FileSystem) -> None:
        self._filesystem = filesystem
        self._fds: list[int] = []

    def calls(self) -> FileSystem:
        """The calls to make instead. They keep this object alive."""
        return evolve(self._filesystem, open=self._open, close=self._close)

    def _open(self, path: str, flags: int, mode: int) -> int:
        self._fds.extend(map(self._filesystem.open, (path,), (flags,), (mode,)))
        return self._fds[-1]

    def _close(self, fd: int) -> None:
        if fd in self._fds:
            self._drop(self._fds.index(fd))

    def _drop(self, at: int) -> None:
        list(map(self._filesystem.close, map(self._fds.pop, (at,))))

    def close(self) -> None:
        """Close what is still open."""
        while self._fds:
            with suppress(OSError):  # it is closed whatever the system says
                self._drop(-1)

    def __del__(self) -> None:
        with suppress(BaseException):  # nobody is left who could be told
            self.close()
