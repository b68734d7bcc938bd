"""A folder's next checkpoint: staged beside the old one, made visible by one rename, the old one removed only then."""

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from itertools import islice
from types import TracebackType
from typing import Final, Literal, TypeAlias

from attrs import define, field

from funcmodel.errors import FuncmodelError, NoSpaceError, SaveError, StalePlanError, UnsafePathError
from funcmodel.plan.sharding import SUFFIX, rivals
from funcmodel.records.actions import Publish
from funcmodel.records.tensors import format_size
from funcmodel.run.existing import listed

Symlinks: TypeAlias = Literal["follow", "refuse"]
Durability: TypeAlias = Literal["full", "none"]

_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_IOVECS: Final = 1024  # the kernel's limit
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@define(eq=False)
class StagedFile:
    """A file under a temporary name beside its final one.

    Attributes:
        final: where it goes, links resolved.
        temporary: where it is; it starts with a dot and does not end like weights, so that no reader takes it.
        fd: open for reading and writing.
    """

    final: str
    temporary: str
    fd: int

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
                count = os.pwritev(self.fd, batch[::-1], offset)
                if not count and any(batch):
                    raise OSError(errno.EIO, "the system wrote nothing and gave no reason", self.temporary)
                offset += count
                while batch and count >= len(batch[-1]):
                    count -= len(batch.pop())
                if count:
                    batch[-1] = batch[-1][count:]
        return offset


@define(eq=False)
class Transaction:
    """One save into one folder; a context manager that leaves nothing of itself behind unless it was committed.

    Attributes:
        folder: where the checkpoint goes, links resolved.
        publish: what becomes visible, in which order.
        symlinks: whether a link in place of a file is followed to its target or refused.
        durability: whether files and folders are flushed to the disk before and after the commit.
        committed: whether a reader of the folder sees the new checkpoint.
    """

    folder: str
    publish: Publish
    symlinks: Symlinks
    durability: Durability
    committed: Literal["yes", "no", "unknown"] = field(default="no", init=False)
    _staged: dict[str, StagedFile] = field(factory=dict, init=False)
    _published: list[str] = field(factory=list, init=False)
    _made: list[str] = field(factory=list, init=False)
    _sizes: Mapping[str, int] = field(factory=dict, init=False)
    _mark: str = field(factory=lambda: secrets.token_hex(4), init=False)

    def __enter__(self) -> "Transaction":
        self._make_folder()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for staged in self._staged.values():
            _close(staged)
        if self.committed == "unknown" and os.path.lexists(self._staged[self.publish.commit].temporary):
            self.committed = "no"  # the rename that commits was interrupted before it happened
        if self.committed == "no":
            self._discard()
        elif error is not None:
            _unlink(*(staged.temporary for staged in self._staged.values()), strict=False)
        if isinstance(error, OSError) and not isinstance(error, FuncmodelError):
            raise self._error(error) from error

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Refuse a folder that is not the planned one, links that may not be followed, and a disk that is too small.

        Args:
            sizes: bytes of each file that will be staged.

        Raises:
            StalePlanError: the folder holds a checkpoint that the plan does not replace.
            UnsafePathError: a link that may not be followed, or no regular file in the place of one.
            NoSpaceError: the disk has not so many bytes.
        """
        self._sizes = sizes
        self._check_folder()
        for name in self.publish.removes:
            path = os.path.join(self.folder, name)
            if os.path.islink(path):
                self._check_unshared(path, os.path.realpath(path))
        wanted: dict[int, tuple[str, int]] = {}
        for name, size in sizes.items():
            where = os.path.dirname(self._destination(name))
            device = os.stat(where).st_dev
            wanted[device] = where, wanted.get(device, ("", 0))[1] + size
        for where, needed in wanted.values():
            found = os.statvfs(where)
            available = found.f_bavail * found.f_frsize
            if found.f_blocks and available < needed:
                raise NoSpaceError(
                    f"{where}: {format_size(needed)} needed, {format_size(available)} available; nothing was changed. "
                    "The old checkpoint is removed only after the new one is complete, so both must fit",
                    committed="no",
                    needed=needed,
                    available=available,
                )

    def stage(self, name: str) -> StagedFile:
        """A new file for `name`, with the mode of the file that it will replace, or else as the umask says."""
        final = self._destination(name)
        temporary = os.path.join(os.path.dirname(final), f".fm-{self._mark}-{len(self._staged):05d}.part")
        staged = self._staged[name] = StagedFile(final, temporary, os.open(temporary, _FLAGS, 0o666))
        mode = self._mode(name, final)
        if mode is not None and mode != stat.S_IMODE(os.fstat(staged.fd).st_mode):
            os.fchmod(staged.fd, mode)
        return staged

    def seal(self, name: str, nbytes: int) -> None:
        """Declare a staged file complete: count its bytes, flush it, close it.

        Raises:
            SaveError: it has not the size that was planned.
        """
        staged = self._staged[name]
        found = os.fstat(staged.fd).st_size
        if found != nbytes:
            raise SaveError(
                f"{staged.final}: {nbytes} bytes were planned and {found} written; nothing was changed",
                committed="no",
                expected=nbytes,
                found=found,
            )
        if self.durability == "full":
            os.fsync(staged.fd)
        _close(staged)

    def commit(self) -> None:
        """Publish what is staged, then remove what it replaces.

        Shards first, under names that nothing reads yet, and texts that replace nothing; then the one rename that
        makes the checkpoint visible; then texts that replace one of the old checkpoint; the old files at last.

        Raises:
            OSError: the kernel's; `committed` says how far it went.
        """
        new: list[str] = []
        replacing: list[str] = []
        for name in self.publish.renames:
            fresh = name.endswith(SUFFIX) or not os.path.lexists(self._staged[name].final)
            (new if fresh else replacing).append(name)
        for name in new:
            self._published.append(self._staged[name].final)
            self._rename(name)
        self._flush_folders()
        self.committed = "unknown"
        self._rename(self.publish.commit)
        # Readers that look for a single file first see the old one until it is gone.
        first = [name for name in self.publish.removes if name in rivals(self.publish.commit)]
        if first:
            self._flush_folders()
            self._remove(first)
        self.committed = "yes"
        self._flush_folders()
        rest = [name for name in self.publish.removes if name not in first]
        for name in replacing:
            self._rename(name)
        self._remove(rest)
        if replacing or rest:
            self._flush_folders()

    # -- what lies in the folder ---------------------------------------------------------------------------------

    def _make_folder(self) -> None:
        """The folder and its parents; those that are new go again if nothing is committed."""
        missing, at = [], self.folder
        while at and not os.path.lexists(at):
            missing.append(at)
            at = os.path.dirname(at)
        try:
            for path in reversed(missing):
                os.mkdir(path)
                self._made.append(path)
            if not os.path.isdir(self.folder):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.folder)
        except OSError as error:
            self._discard()
            raise self._error(error) from error

    def _destination(self, name: str) -> str:
        """The path of a file of the folder, with a link at its end followed or refused."""
        path = os.path.join(self.folder, name)
        if not os.path.islink(path):
            if os.path.lexists(path) and not os.path.isfile(path):
                raise UnsafePathError(f"{path}: is no regular file; remove it", code="NOT_REGULAR_FILE", path=path)
            return path
        target = os.path.realpath(path)
        if self.symlinks == "refuse":
            raise UnsafePathError(
                f"{path}: is a link to {target}, and links are refused; pass symlinks='follow' to replace its target",
                code="SYMLINK",
                path=path,
            )
        self._check_unshared(path, target)
        if not os.path.isdir(os.path.dirname(target)) or (os.path.lexists(target) and not os.path.isfile(target)):
            raise UnsafePathError(
                f"{path}: is a link to {target}, where no file can be written; remove it", code="SYMLINK", path=path
            )
        return target

    def _check_unshared(self, path: str, target: str) -> None:
        if os.path.basename(os.path.dirname(target)) == "blobs":
            raise UnsafePathError(
                f"{path}: is a link into the cache of huggingface_hub, whose files are shared; save somewhere else",
                code="SYMLINK_CACHE",
                path=path,
            )

    def _check_folder(self) -> None:
        """Refuse a folder whose checkpoint is not the one that the plan replaces: the two would mix."""
        commit, removes = self.publish.commit, set(self.publish.removes)
        for rival in rivals(commit):
            if rival not in removes and os.path.lexists(os.path.join(self.folder, rival)):
                raise self._stale((rival,))
        path = os.path.join(self.folder, commit)
        if commit.endswith(".json") and os.path.lexists(path) and (unknown := listed(path) - removes):
            raise self._stale(tuple(sorted(unknown)))

    def _stale(self, names: tuple[str, ...]) -> StalePlanError:
        return StalePlanError(
            f"{self.folder}: holds a checkpoint that the plan does not replace ({', '.join(names[:4])}); "
            "plan the save again with existing=existing_checkpoint(folder)",
            path=self.folder,
            names=names,
        )

    def _mode(self, name: str, final: str) -> int | None:
        """The mode of the file replaced; shards under new names take that of the weights they replace."""
        paths = [final]
        if name.endswith(SUFFIX):
            paths += [os.path.join(self.folder, old) for old in self.publish.removes if old.endswith(SUFFIX)]
        for path in paths:
            try:
                return stat.S_IMODE(os.stat(path).st_mode)
            except FileNotFoundError:
                continue
        return None

    # -- steps ---------------------------------------------------------------------------------------------------

    def _rename(self, name: str) -> None:
        staged = self._staged[name]
        os.replace(staged.temporary, staged.final)

    def _remove(self, names: Iterable[str]) -> None:
        _unlink(*(os.path.join(self.folder, name) for name in names))

    def _flush_folders(self) -> None:
        if self.durability == "none":
            return
        folders = {self.folder, *(os.path.dirname(staged.final) for staged in self._staged.values())}
        for path in sorted(folders.union(map(os.path.dirname, self._made))):
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _discard(self) -> None:
        """Remove every trace; what cannot be removed is not worth hiding the error that led here."""
        _unlink(*(staged.temporary for staged in self._staged.values()), *self._published, strict=False)
        for path in reversed(self._made):
            try:
                os.rmdir(path)
            except OSError:
                break

    def _error(self, error: OSError) -> SaveError:
        where = error.filename or self.folder
        done = {
            "no": "nothing was changed",
            "yes": "the new checkpoint is complete and visible, files of the old one are left",
            "unknown": "look at the folder before you trust it",
        }[self.committed]
        message = f"{where}: {error.strerror or error}; {done}"
        if error.errno in _FULL:
            found = os.statvfs(self.folder if os.path.isdir(self.folder) else os.path.dirname(self.folder))
            needed = sum(self._sizes.values())
            available = found.f_bavail * found.f_frsize
            return NoSpaceError(message, committed=self.committed, needed=needed, available=available)
        return SaveError(message, committed=self.committed)


def _close(staged: StagedFile) -> None:
    if staged.fd >= 0:
        fd, staged.fd = staged.fd, -1
        os.close(fd)


def _unlink(*paths: str, strict: bool = True) -> None:
    for path in paths:
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue
        except OSError:
            if strict:
                raise
