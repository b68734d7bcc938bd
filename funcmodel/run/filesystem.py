"""`FileSystem`: all that a save does to the disk, as one record of functions, so that each call can be made to fail.

`REAL` is the system's. `funcmodel.run.faults` makes others of it that fail, or die, at their n-th call;
`funcmodel.run.powerloss` remembers what a loss of power could leave behind.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias

from attrs import frozen

Symlinks: TypeAlias = Literal["follow", "refuse"]
Durability: TypeAlias = Literal["full", "none"]

FOLDER: Final = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
SHARED: Final = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)

_UNSUPPORTED: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return True
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
        flock: take the exclusive lock of an open file without waiting: whether it was free. True, too, where the
            system has no such locks.
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
