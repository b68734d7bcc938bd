"""Files as readers need them: regular, inside their folder, checked on what was opened and not on its name."""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from hashlib import blake2b
from io import BytesIO, FileIO
from types import TracebackType
from typing import Final, Literal, TypeAlias

from attrs import define, field

from funcmodel.errors import ChangedError, CheckpointError, StalePlanError, UnsafePathError

# O_NONBLOCK: opening a FIFO must not wait for a writer. It has no effect on regular files.
READ: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_MOST_BUFFERS: Final = 1024  # IOV_MAX of Linux and macOS
_CHUNK: Final = 1 << 20
_MOST_HASHED: Final = 1 << 30  # a header may announce anything
Identity: TypeAlias = tuple[int, int, int, int]


@define(eq=False)
class Hashed:
    """What was hashed and found to be as recorded: several calls that share one hash each tensor once.

    Attributes:
        sound: the identity of an open file, and name, first byte and size of what is stored in it.
    """

    sound: set[tuple[Identity, str, int, int]] = field(factory=set)


Digest: TypeAlias = Literal["ignore", "check"] | Hashed
"""Whether stored tensors are compared with their recorded digests before they are read."""


@define(eq=False)
class SourceFile:
    """A regular file that is open for reading. Reads carry their own offset, so threads may share one.

    It is closed at the latest when it is dropped: an interrupt may come before anybody holds it.

    Attributes:
        path: as it was opened.
        fd: the descriptor.
        nbytes: size in bytes when it was opened.
        identity: device, inode, size and time of the last change (ns) when it was opened.
    """

    path: str
    fd: int
    nbytes: int
    identity: Identity
    _open: FileIO

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            ChangedError: the file ends earlier than it did when it was opened.
            CheckpointError: the system cannot read it; code "READ".
        """
        done, wanted = 0, len(buffer)
        while done < wanted:
            count = self._readv([buffer[done:] if done else buffer], offset + done)
            done += count

    def readv_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill `buffers`, one after the other, with the bytes from `offset` on.

        Raises:
            ChangedError: the file ends earlier than it did when it was opened.
            CheckpointError: the system cannot read it; code "READ".
        """
        waiting = [b for b in buffers if len(b)]
        waiting.reverse()
        while waiting:
            batch = waiting[-_MOST_BUFFERS:]
            batch.reverse()
            count = self._readv(batch, offset)
            offset += count
            while count and count >= len(waiting[-1]):
                count -= len(waiting.pop())
            if count:
                waiting[-1] = waiting[-1][count:]

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, which must lie in the file.

        Raises:
            ChangedError: the file ends earlier than it did when it was opened.
            CheckpointError: the system cannot read it; code "READ".
        """
        buffer = BytesIO()
        if stop > start:
            buffer.seek(stop - start - 1)
            buffer.write(b"\0")
            with buffer.getbuffer() as view:
                self.read_into(view, start)
        return buffer.getvalue()  # hands its memory over, where a bytearray would be copied

    def _readv(self, buffers: list[memoryview], offset: int) -> int:
        try:
            count = os.preadv(self.fd, buffers, offset)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read at byte {offset} ({error.strerror}); check the disk",
                code="READ",
                path=self.path,
                errno=error.errno,
            ) from error
        if not count:
            ended = min(offset, os.fstat(self.fd).st_size)
            raise ChangedError(
                f"{self.path}: ended at byte {ended}, had {self.nbytes} bytes when it was opened; "
                "another process writes to it, so read it again when it is finished",
                path=self.path,
                expected=self.nbytes,
                found=ended,
            )
        return count

    def verify_unchanged(self) -> None:
        """Compare the open file with what it was when it was opened.

        Raises:
            ChangedError: size or time of the last change differ.
        """
        now = _identity(os.fstat(self.fd))
        if now != self.identity:
            raise ChangedError(
                f"{self.path}: changed while it was read (size {self.identity[2]} -> {now[2]} bytes, "
                f"time of change {self.identity[3]} -> {now[3]} ns); read it again when its writer is finished",
                path=self.path,
                expected=self.identity,
                found=now,
            )

    def verify_named(self) -> None:
        """Compare the open file with what its name leads to now.

        Raises:
            StalePlanError: it was replaced or removed since it was opened.
        """
        try:
            now = os.stat(self.path)
        except OSError:
            now = None
        if now is None or (now.st_dev, now.st_ino) != self.identity[:2]:
            raise StalePlanError(
                f"{self.path}: was replaced while the files of its checkpoint were opened; scan and plan again",
                path=self.path,
                expected=self.identity[:2],
                found=None if now is None else (now.st_dev, now.st_ino),
            )

    @property
    def closed(self) -> bool:
        """Whether the descriptor was given back."""
        return self._open.closed

    def close(self) -> None:
        """Close the descriptor. A second call does nothing."""
        self._open.close()

    def __enter__(self) -> "SourceFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_regular(path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> SourceFile:
    """Open a regular file for reading, without ever waiting for one that is none.

    Args:
        path: the file.
        root: the folder in which the file must lie once every link is resolved, checked on the opened file. From a
            snapshot of the Hugging Face cache (`.../snapshots/<revision>/`) links into the `blobs` folder beside
            `snapshots` are accepted too. None: the caller names the file and trusts its links.

    Returns:
        The open file; close it, or use it as a context manager.

    Raises:
        CheckpointError: it cannot be opened; code "OPEN", `errno` where the system gave one.
        UnsafePathError: it is no regular file (code "NOT_REGULAR_FILE") or lies outside (code "SYMLINK_ESCAPES").
    """
    name = os.fspath(path)
    opened: list[FileIO] = []
    try:
        if stat.S_ISDIR(os.stat(name).st_mode):
            raise _irregular(name)
        # One step of Python, so that no interrupt comes between the descriptor and what closes it. No `__del__` of our
        # own does: an interrupt that came while it ran would be lost.
        opened.extend(map(FileIO, map(os.open, (name,), (READ,))))
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a FIFO where the flag is not honored
            raise _irregular(name) from error
        what = "raise the limit (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else "check the path"
        raise CheckpointError(
            f"{name}: cannot be opened ({error.strerror}); {what}", code="OPEN", path=name, errno=error.errno
        ) from error
    except ValueError as error:  # NUL, or a character that file names cannot hold
        raise CheckpointError(f"{name!r}: is no file name ({error})", code="OPEN", path=name) from error
    file = opened[0]
    try:
        fd = file.fileno()
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _irregular(name)
        if root is not None:
            _check_inside(name, fd, found, os.fspath(root))
        return SourceFile(name, fd, found.st_size, _identity(found), file)
    except BaseException:
        file.close()
        raise


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _irregular(name: str) -> UnsafePathError:
    return UnsafePathError(
        f"{name}: is no regular file; weights are read from regular files only", code="NOT_REGULAR_FILE", path=name
    )


def _check_inside(name: str, fd: int, found: os.stat_result, root: str) -> None:
    target = _resolved(name, fd, found)
    # No part of a resolved path is a link, so none of the folder is either; ".." may mean another one, though.
    if ".." not in root.split(os.sep) and _within(target, os.path.abspath(root)):
        return
    root = os.path.realpath(root)
    if _within(target, root) or os.path.dirname(target) in _blob_folders(root):
        return
    raise UnsafePathError(
        f"{name}: is a link to {target}, outside {root}; pass that file itself, or symlinks='follow' if you trust it",
        code="SYMLINK_ESCAPES",
        path=name,
        target=target,
    )


def _within(target: str, folder: str) -> bool:
    return target.startswith(folder if folder.endswith(os.sep) else folder + os.sep)


def _resolved(name: str, fd: int, found: os.stat_result) -> str:
    """Where the opened file itself lies."""
    by_fd = f"/proc/self/fd/{fd}"
    try:
        return os.readlink(by_fd)
    except FileNotFoundError:
        pass
    target = os.path.realpath(name)  # without /proc: the name's target must be the file that was opened
    if not os.path.samestat(os.stat(target), found):
        raise ChangedError(f"{name}: was replaced while it was opened; try again", path=name)
    return target


def _blob_folders(root: str) -> tuple[str, ...]:
    """`<repo>/blobs` for a root `<repo>/snapshots/<revision>` or a folder below it."""
    parts = root.split(os.sep)
    return tuple(
        os.sep.join((*parts[:i], "blobs"))
        for i, part in enumerate(parts)
        if part == "snapshots" and i > 1 and len(parts) > i + 1
    )


def prefix_fingerprint(read: Callable[[int, int], bytes], nbytes: int) -> str:
    """BLAKE2b-128 of a file's size and of as many first bytes as its first eight announce, at most 1 GiB, in hex.

    That is the header of a safetensors file, and the whole of a text.

    Args:
        read: the bytes from one offset to another.
        nbytes: size of the file in bytes.
    """
    digest = blake2b(digest_size=16)
    start = read(0, min(8, nbytes))
    stop = min(8 + int.from_bytes(start, "little"), nbytes, _MOST_HASHED)
    digest.update(start)
    for at in range(8, stop, _CHUNK):
        digest.update(read(at, min(at + _CHUNK, stop)))
    digest.update(nbytes.to_bytes(8, "little"))
    return digest.hexdigest()
