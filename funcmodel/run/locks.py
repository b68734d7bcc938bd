"""One writer per folder: an exclusive lock that dies with its process."""

import errno
import json
import os
import socket
from typing import Final

from attrs import define, field

from funcmodel.core.journal import LOCK
from funcmodel.errors import BusyError
from funcmodel.run.filesystem import SHARED, FileSystem

_WIDTH: Final = 256  # the owner's line is padded to it, so that a longer one from before leaves no rest
_TRIES: Final = 100  # how often the file may be removed by its last owner between our opening and locking it


@define(eq=False)
class FolderLocks:
    """The folders that a save writes to, locked one by one without waiting.

    The lock is the kernel's, on an open file: it is gone when the process is, and the file that is left means nothing.

    Attributes:
        filesystem: the calls to make.
    """

    filesystem: FileSystem
    _held: dict[str, int] = field(factory=dict, init=False)

    def take(self, folder: str) -> bool:
        """Lock a folder, unless it is locked by this very object: whether it was not.

        Raises:
            BusyError: another writer has it; `owner` says which one, as "pid 12 on host".
            OSError: the system refused.
        """
        path = os.path.join(folder, LOCK)
        if path in self._held:
            return False
        for _ in range(_TRIES):
            fd = self.filesystem.open(path, SHARED, 0o666)
            try:
                if not self.filesystem.flock(fd):
                    owner = _owner(self.filesystem, fd)
                    raise BusyError(
                        f"{folder}: {owner or 'another writer'} is saving into it; try again when it is finished. "
                        "Nothing was changed",
                        committed="no",
                        owner=owner,
                        path=folder,
                    )
                if self._still_there(path, fd):
                    self._held[path] = fd
                    line = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).ljust(_WIDTH)
                    self.filesystem.pwritev(fd, [memoryview(line.encode())], 0)
                    return True
            finally:
                if path not in self._held:
                    self.filesystem.close(fd)
        raise BusyError(f"{folder}: other writers come and go; try again", committed="no", owner=None, path=folder)

    def release(self) -> None:
        """Give everything back. The file goes first: who opened it meanwhile sees that it is gone, and tries again."""
        while self._held:
            path, fd = next(iter(self._held.items()))
            try:
                if self._still_there(path, fd):
                    self.filesystem.unlink(path)
            except OSError:
                pass  # a file that nobody holds is no lock
            finally:
                del self._held[path]
                _close(self.filesystem, fd)

    def _still_there(self, path: str, fd: int) -> bool:
        try:
            return os.path.samestat(self.filesystem.lstat(path), self.filesystem.fstat(fd))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise


def _close(filesystem: FileSystem, fd: int) -> None:
    try:
        filesystem.close(fd)
    except OSError:
        return  # the kernel has closed it whatever it says


def _owner(filesystem: FileSystem, fd: int) -> str | None:
    try:
        found = json.loads(filesystem.pread(fd, _WIDTH, 0))
        return f"pid {int(found['pid'])} on {found['host']!s:.200}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
