"""Files as memory: mapped for those who ask to borrow, or held still while something is computed out of them."""

import errno
import fcntl
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import torch
from attrs import define, field

from funcmodel.errors import ChangedError, NoMemoryError
from funcmodel.run.files import SourceFile

_LEASE: Final[int | None] = getattr(fcntl, "F_SETLEASE", None)
_SIGNAL: Final[int | None] = getattr(fcntl, "F_SETSIG", None)


def mapping(file: SourceFile) -> memoryview:
    """All bytes of an open file as private pages: writing to them changes no file and nobody else's bytes.

    The mapping lives as long as a view of it does, and holds no descriptor.

    Raises:
        ChangedError: the file is shorter than it was when it was opened.
        NoMemoryError: the process may not have so many addresses.
    """
    try:
        # By its descriptor, since its name may lead to another file by now.
        storage: Any = torch.UntypedStorage.from_file(f"/proc/self/fd/{file.fd}", False, file.nbytes)
    except RuntimeError as error:
        if os.fstat(file.fd).st_size < file.nbytes:
            raise ChangedError(
                f"{file.path}: was cut short since it was opened; read it again when its writer is finished",
                path=file.path,
                expected=file.nbytes,
                found=os.fstat(file.fd).st_size,
            ) from error
        try:
            return memoryview(
                mmap.mmap(file.fd, file.nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            )
        except OSError as second:
            if second.errno != errno.ENOMEM:
                raise
            raise NoMemoryError(
                f"{file.path}: its {file.nbytes} bytes cannot be mapped, because the process may not have so much "
                "address space (ulimit -v); read it into memory of its own in parts",
                needed=file.nbytes,
            ) from second
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy().data


@define(eq=False)
class Mappings:
    """Private mappings of one file: tensors that share bytes of the file share no memory.

    Attributes:
        file: the file.
    """

    file: SourceFile
    _pages: list[memoryview] = field(factory=list, init=False)
    _taken: list[int] = field(factory=list, init=False)  # up to where each is given away

    def apart(self, start: int, stop: int) -> memoryview:
        """The file's bytes, of which nobody was given those from `start` to `stop`; asked in ascending order."""
        for at, taken in enumerate(self._taken):
            if taken <= start:
                self._taken[at] = stop
                return self._pages[at]
        self._pages.append(mapping(self.file))
        self._taken.append(stop)
        return self._pages[-1]


@define(eq=False)
class Held:
    """Mappings of open files, each used only while nobody can change the file.

    Whoever maps a file dies when another process cuts it short. A lease makes the kernel hold such a process back, and
    tell us, until we let go; it is given only while nobody has the file open for writing. Where there are no leases
    (another system, a network, a file of another user), nothing is mapped. The kernel waits for us no longer than
    /proc/sys/fs/lease-break-time says, 45 seconds where nobody changed it: who is stopped for longer in the middle of a
    copy is not protected.
    """

    _mapped: dict[int, Any] = field(factory=dict, init=False)
    _leased: list[int] = field(factory=list, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)

    def bytes_of(self, file: SourceFile) -> memoryview | None:
        """The file's bytes, to be used before anything else is done; None where it cannot be held still.

        Several threads may ask.
        """
        with self._lock:
            return self._bytes_of(file)

    def _bytes_of(self, file: SourceFile) -> memoryview | None:
        found = self._mapped.get(file.fd)
        if found is None:
            found = self._mapped[file.fd] = self._take(file)
        if found is False:
            return None
        if not _leased(file.fd):  # somebody waits to write
            self._drop(file.fd)
            self._mapped[file.fd] = False
            return None
        return found  # type: ignore[no-any-return]

    def _take(self, file: SourceFile) -> Any:
        if not _lease(file.fd):
            return False
        self._leased.append(file.fd)
        # It may have been changed between our opening it and the lease; a file of another size must not be touched.
        if os.fstat(file.fd).st_size != file.nbytes:
            return False
        try:
            return mapping(file)
        except NoMemoryError:  # of addresses; buffers need few
            return False

    def _drop(self, fd: int) -> None:
        self._mapped.pop(fd, None)
        if fd in self._leased:
            self._leased.remove(fd)
            with suppress(OSError):  # the kernel took it back, from who would not let go in time
                fcntl.fcntl(fd, _LEASE or 0, fcntl.F_UNLCK)

    def release(self) -> None:
        """Let every writer go on."""
        for fd in [*self._leased]:
            self._drop(fd)
        self._mapped.clear()


@contextmanager
def held() -> Iterator[Held]:
    """`Held` that lets go at the end of the block. It must end before the files are closed."""
    found = Held()
    try:
        yield found
    finally:
        found.release()


def _lease(fd: int) -> bool:
    if _LEASE is None or _SIGNAL is None:
        return False
    try:
        # The signal that tells of a writer would be SIGIO, which ends a process. This one is ignored where nobody wants
        # it, and nobody is told at all once the descriptor has no owner: the lease is asked before every use instead.
        fcntl.fcntl(fd, _SIGNAL, signal.SIGURG)
        fcntl.fcntl(fd, _LEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETOWN, 0)
    except OSError:
        return False
    return True


def _leased(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK
