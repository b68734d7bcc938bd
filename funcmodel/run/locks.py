"""One writer per folder: an exclusive lock that dies with its process.

The lock is the kernel's, on an open file: it is gone when the process is, and the file that is left means nothing.

Where the file system has no such locks, a folder `.funcmodel.lock.held` that is not empty is the lock. It is made
aside, with one file in it whose name says who has made it, and then renamed, which fails where there is a folder that
is not empty. Who finds that its owner is dead removes the file of that very name, whatever has happened meanwhile; the
folder is empty then, and the next rename replaces it. So of many that find the owner dead one gets the lock.
"""

import errno
import os
import stat
from collections.abc import Callable
from typing import Any, Final

from attrs import define, field

from funcmodel.core.journal import JOURNAL, LOCK
from funcmodel.errors import BusyError, UnsafePathError
from funcmodel.run.filesystem import CREATE, NO_LOCKS, SHARED, THERE, FileSystem
from funcmodel.run.owners import Owner, current, holders, named

HELD: Final = f"{LOCK}.held"

_WIDTH: Final = 256  # the owner's line is padded to it, so that a longer one from before leaves no rest
_TRIES: Final = 100  # how often others may come and go between two of our calls
_IRREGULAR: Final = frozenset({errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV})
# What systems answer when a folder has the new name already, or when they get a request twice that they have granted.
_TAKEN: Final = frozenset(
    {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EACCES, errno.EPERM}
)


@define(eq=False)
class _Lock:
    """A lock that is held, or being taken.

    Attributes:
        fds: the open file whose lock is the kernel's; none where the system has no such locks.
        name: that of the file which says that the folder is ours; "" where the lock is the kernel's.
        taken: whether it is held.
    """

    fds: list[int] = field(factory=list)
    name: str = ""
    taken: bool = False


@define(eq=False)
class FolderLocks:
    """The folders that a save writes to, locked one by one without waiting.

    Attributes:
        filesystem: the calls to make.
    """

    filesystem: FileSystem
    _held: dict[str, _Lock] = field(factory=dict, init=False)

    def take(self, folder: str) -> bool:
        """Lock a folder, unless it is locked by this very object: whether it was not.

        Raises:
            BusyError: another writer has it.
            UnsafePathError: in the place of the lock lies something else, or in that of the journal what no save can
                remove.
            OSError: the system refused.
        """
        if folder in self._held:
            return False
        self._check_journal(os.path.join(folder, JOURNAL))
        for _ in range(_TRIES):
            lock = self._held[folder] = _Lock()  # kept before anything is taken: what an interrupt leaves is given back
            try:
                self._take(folder, lock)
            finally:
                if not lock.taken:
                    self._let_go(folder, lock)
            if lock.taken:
                return True
        raise BusyError(f"{folder}: other writers come and go; try again", committed="no", path=folder)

    def release(self) -> None:
        """Give everything back. The file goes first: who opened it meanwhile sees that it is gone, and tries again."""
        while self._held:
            folder, lock = next(iter(self._held.items()))
            path = os.path.join(folder, LOCK)
            if lock.taken and (lock.name or self._quietly(self._leads_to, path, *lock.fds)):
                self._give_name_back(folder, lock)
                self._quietly(self.filesystem.unlink, path)
                lock.taken = False
            self._let_go(folder, lock)

    def _check_journal(self, path: str) -> None:
        try:
            if stat.S_ISDIR(self.filesystem.lstat(path).st_mode):
                raise _irregular(path)
        except FileNotFoundError:
            return

    def _let_go(self, folder: str, lock: _Lock) -> None:
        """Give a lock back, and leave its file where it is: one that nobody holds is no lock."""
        self._give_name_back(folder, lock)
        while lock.fds:
            self._quietly(self.filesystem.close, lock.fds.pop())  # it is closed whatever the system says
        self._held.pop(folder, None)

    def _take(self, folder: str, lock: _Lock) -> None:
        """Lock what has the lock's name; it is taken if it still has it then."""
        path = os.path.join(folder, LOCK)
        refused = self._open(path, lock.fds)
        fd = lock.fds[0]
        if not stat.S_ISREG(self.filesystem.fstat(fd).st_mode):
            raise _irregular(path)
        try:
            free = self.filesystem.flock(fd)
        except OSError as error:
            if error.errno == errno.EBADF and refused is not None:
                raise refused from error  # some systems lock only what may be written
            if error.errno not in NO_LOCKS:
                raise
            self.filesystem.close(lock.fds.pop())
            self._take_by_name(folder, lock)
            return
        if not free:
            raise self._busy(folder, fd)
        lock.taken = self._leads_to(path, fd)
        if lock.taken and refused is None:
            line = current().name(os.urandom(8).hex()).ljust(_WIDTH)
            self.filesystem.pwritev(fd, [memoryview(line.encode())], 0)

    def _open(self, path: str, fds: list[int]) -> PermissionError | None:
        """Open the lock's file; another user's only to read it, which is enough: what writing it was refused with."""
        try:
            fds.append(self.filesystem.open(path, SHARED, 0o666))
        except PermissionError as error:
            try:
                fds.append(self.filesystem.open(path, THERE, 0))
            except FileNotFoundError:
                raise error from None
            return error
        except OSError as error:
            if error.errno in _IRREGULAR:
                raise _irregular(path) from error
            raise
        return None

    def _leads_to(self, path: str, fd: int) -> bool:
        try:
            return os.path.samestat(self.filesystem.lstat(path), self.filesystem.fstat(fd))
        except FileNotFoundError:
            return False

    def _busy(self, folder: str, fd: int) -> BusyError:
        try:
            owner = named(self.filesystem.pread(fd, _WIDTH, 0).decode("ascii", "replace").strip())
        except OSError:
            owner = None
        path = os.path.join(folder, LOCK)
        if owner is None or owner.alive() is not False:
            return _busy(folder, path, owner, "try again when it is finished")
        others = holders(fd)
        found = f"now pid {', '.join(map(str, others))}" if others else f"'fuser {path}' tells which"
        advice = f"it is dead, but what it forked still has its lock ({found}): end that, or wait until it ends"
        return _busy(folder, path, owner, advice, others)

    # -- where the file system has no locks --------------------------------------------------------------------------

    def _take_by_name(self, folder: str, lock: _Lock) -> None:
        held, lock.name = os.path.join(folder, HELD), current().name(os.urandom(8).hex())
        aside = f"{held}.{lock.name}"
        self.filesystem.mkdir(aside)
        self.filesystem.close(self.filesystem.open(os.path.join(aside, lock.name), CREATE, 0o666))
        for _ in range(_TRIES):
            try:
                self.filesystem.replace(aside, held)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                names = self._names(held)
                if lock.name not in names:
                    if not names and error.errno in (errno.EACCES, errno.EPERM, errno.ENOENT) and self._gone(held):
                        raise
                    self._clear(folder, names)
                    continue
            lock.taken = True
            self._sweep(folder)
            return

    def _clear(self, folder: str, names: list[str]) -> None:
        """Remove what a dead owner has left in the folder that is the lock."""
        held = os.path.join(folder, HELD)
        for name in names:
            owner = named(name)
            if owner is None or owner.alive() is not False:
                advice = "try again when it is finished" if owner and owner.alive() else f"if it is dead, remove {held}"
                raise _busy(folder, held, owner, advice)
            try:
                self.filesystem.unlink(os.path.join(held, name))
            except FileNotFoundError:
                continue  # another was faster, and may have the lock now
        self._quietly(self.filesystem.rmdir, held)  # some systems rename no folder over one that is empty

    def _sweep(self, folder: str) -> None:
        """Remove what processes left aside that died while they were taking the lock."""
        for name in self._quietly(self.filesystem.listdir, folder) or ():
            owner = named(name.removeprefix(f"{HELD}."))
            if name.startswith(f"{HELD}.") and owner is not None and owner.alive() is False:
                aside = os.path.join(folder, name)
                self._quietly(self.filesystem.unlink, os.path.join(aside, name.removeprefix(f"{HELD}.")))
                self._quietly(self.filesystem.rmdir, aside)

    def _give_name_back(self, folder: str, lock: _Lock) -> None:
        if not lock.name:
            return
        held = os.path.join(folder, HELD)
        for where in (held, held, f"{held}.{lock.name}"):  # twice: nobody else may remove it while this process lives
            self._quietly(self.filesystem.unlink, os.path.join(where, lock.name))
            self._quietly(self.filesystem.rmdir, where)
        lock.name = ""

    def _names(self, held: str) -> list[str]:
        """What is in the folder that is the lock; nothing if it is not there."""
        try:
            if not stat.S_ISDIR(self.filesystem.lstat(held).st_mode):
                raise _irregular(held)
            return self.filesystem.listdir(held)
        except FileNotFoundError:
            return []

    def _gone(self, path: str) -> bool:
        try:
            self.filesystem.lstat(path)
        except FileNotFoundError:
            return True
        return False

    def _quietly(self, call: Callable[..., Any], *arguments: object) -> Any:
        """A call whose failure changes nothing for who has the lock, or had it."""
        try:
            return call(*arguments)
        except OSError:
            return None


def _irregular(path: str) -> UnsafePathError:
    message = f"{path}: saves put a file of their own there, and it is something else; remove it. Nothing was changed"
    return UnsafePathError(message, code="NOT_REGULAR_FILE", path=path)


def _busy(folder: str, lock: str, owner: Owner | None, advice: str, others: tuple[int, ...] = ()) -> BusyError:
    return BusyError(
        f"{folder}: {owner or 'another writer'} is saving into it; {advice}. Nothing was changed",
        committed="no",
        path=folder,
        lock=lock,
        owner=str(owner) if owner else None,
        pid=owner and owner.pid,
        host=owner and owner.host,
        alive=owner and owner.alive(),
        holders=others,
    )
