"""A folder's next checkpoint: staged beside the old one, made visible by one call, the old one removed only then.

Which call commits depends on what the folder holds, because readers look for a single file before they look for an
index:

| the folder holds | a save of     | commits by                                   | and then removes   |
|------------------|---------------|----------------------------------------------|--------------------|
| nothing          | a single file | the rename of that file                      |                    |
| nothing          | shards        | the rename of the index                      |                    |
| a single file    | a single file | the rename of the new file over the old one  |                    |
| a single file    | shards        | the removal of the old file                  |                    |
| shards           | a single file | the rename of that file                      | index, then shards |
| shards           | shards        | the rename of the new index over the old one | the old shards     |
| both of them     | shards        | the same; who looks for a single file first  | the old file,      |
|                  |               | sees the old one until it is removed         | the old shards     |
| another format   | either        | what it would be for nothing                 |                    |

A single file that is itself one of the shards which an index lists belongs to the index, for our readers. A save of
a single file then commits by the rename over that shard, one of shards by the rename of the index; from before until
after it the journal says which of the two counts.

Shards get their names before the commit; they are names that the old index does not list. Beside another format
safetensors is what readers take first, and its files are not ours to remove.

A variant is a checkpoint of its own, and so are adapters and files of another format: they stay, even where an index
lists them as its shards. Texts such as `config.json` are published with the shards where they are new, and
right after the commit where they replace others. Until then the journal, `.funcmodel-save.json`, tells funcmodel's
readers to take the new text from where it is staged; readers that do not know it can meet new weights beside an old
text between those two renames, and nowhere else. A text that stays the same is not touched. One that a link leads to
another folder is staged in that one; the next save into this folder locks both and finishes it. But a save into the
other folder that comes before it takes what is staged there for a dead writer's, and the text stays the old one.

In order: lock the folder; finish or take back what a writer that died has left; stage and flush every file; publish the
journal; publish shards and new texts; commit; publish the other texts; remove what is superseded; remove the journal;
unlock. Folders are flushed between any two of these steps. A flush that failed is never repeated, because the kernel
forgets what it could not write: the staged file is thrown away. A save that is one rename needs no journal.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from types import TracebackType
from typing import Final, Literal

from attrs import define, evolve, field

from funcmodel.core.journal import JOURNAL, Journal, part_name, render_journal
from funcmodel.errors import FuncmodelError, NoSpaceError, SaveError, StalePlanError
from funcmodel.plan.sharding import SUFFIX, rivals
from funcmodel.records.actions import Publish
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import format_size
from funcmodel.run.destinations import StagedFile, check_removable, destination, lstat
from funcmodel.run.existing import listed
from funcmodel.run.filesystem import CREATE, FOLDER, REAL, Durability, FileSystem, OpenFiles, Symlinks
from funcmodel.run.journal import (
    fingerprint_as,
    fingerprints,
    is_foreign,
    partitioned,
    recover,
    settle,
    surveyed,
    unlink,
)
from funcmodel.run.locks import FolderLocks

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@define(eq=False)
class Transaction:
    """One save into one folder; a context manager that leaves nothing of itself behind unless it was committed.

    Attributes:
        folder: where the checkpoint goes, links resolved.
        publish: what becomes visible, in which order.
        symlinks: whether a link in place of a file is followed to its target or refused.
        durability: whether files and folders are flushed to the disk before and after the commit.
        filesystem: the calls to make.
        sizes: bytes of each file that will be staged.
        committed: whether a reader of the folder sees the new checkpoint, for good.
    """

    folder: str
    publish: Publish
    symlinks: Symlinks = "follow"
    durability: Durability = "full"
    filesystem: FileSystem = REAL
    sizes: Mapping[str, int] = FrozenMap()
    committed: Literal["yes", "no", "unknown"] = field(default="no", init=False)
    _staged: dict[str, StagedFile] = field(factory=dict, init=False)
    _published: list[str] = field(factory=list, init=False)
    _made: list[str] = field(factory=list, init=False)
    _mark: str = field(factory=lambda: os.urandom(4).hex(), init=False)
    _pending: list[str] = field(factory=list, init=False)
    _numbers: Iterator[int] = field(factory=count, init=False)
    _journal: Journal | None = field(default=None, init=False)
    _locks: FolderLocks = field(init=False)
    _files: OpenFiles = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._files = OpenFiles(self.filesystem)
        self.filesystem = self._files.calls()
        self._locks = FolderLocks(self.filesystem)
        commit = self.publish.commit
        removes = tuple(n for n in self.publish.removes if n.endswith(".json") or not is_foreign(n, commit))
        self.publish = evolve(self.publish, removes=removes)

    def __enter__(self) -> "Transaction":
        try:
            self._make_folder()
            self._own(self.folder)
            return self
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end(error)
        finally:
            self._locks.release()
            self._files.close()
        if self.committed == "no":
            for path in reversed(self._made):
                self._quietly(self.filesystem.rmdir, path)
        if isinstance(error, OSError) and not isinstance(error, FuncmodelError):
            raise self._error(error) from error

    def reserve(self) -> None:
        """Refuse a folder that is not the planned one, links that may not be followed, and a disk that is too small.

        Raises:
            StalePlanError: the folder holds a checkpoint that the plan does not replace.
            UnsafePathError: a link that may not be followed, or no regular file in the place of one.
            BusyError: another writer has the folder that a link leads to.
            NoSpaceError: the disk has not so many bytes.
        """
        self._check_folder()
        for name in self.publish.removes:
            check_removable(os.path.join(self.folder, name), self.filesystem)
        wanted: dict[int, tuple[str, int]] = {}
        for name, size in self.sizes.items():
            where = os.path.dirname(self._destination(name))
            self._own(where)
            device = self.filesystem.stat(where).st_dev
            wanted[device] = where, wanted.get(device, ("", 0))[1] + size
        for where, needed in wanted.values():
            available = self._available(where)
            if available is not None and available < needed:
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
        staged = self._staged[name] = self._create(final)
        mode = self._mode(name, final)
        if mode is not None and mode != stat.S_IMODE(self.filesystem.fstat(staged.fd).st_mode):
            self.filesystem.fchmod(staged.fd, mode)
        return staged

    def seal(self, name: str, nbytes: int) -> None:
        """Declare a staged file complete: count its bytes, flush it, close it.

        Raises:
            SaveError: it has not the size that was planned.
        """
        self._seal(name, nbytes)

    def commit(self) -> None:
        """Publish what is staged, then remove what it replaces; see the table above.

        Raises:
            StalePlanError: a name that the plan takes for free is taken.
            OSError: the kernel's; `committed` says how far it went.
        """
        self._check_folder()
        publish = self._unchanged_left_out()
        journal = self._planned(publish)
        replacing = [name for name in publish.renames if name in journal.old]
        if publish.renames or len(journal.old.keys() - {publish.commit}):
            self._write_journal(journal)
        early = [name for name in publish.renames if name not in replacing]
        for name in early:
            self._published.append(name)
            self._rename(name)
        if early:
            self._flush_folders()
        if journal.by == "removal":
            self._published.append(publish.commit)
            self._rename(publish.commit)
            self._flush_folders()
        self._pending = replacing
        self.committed = "unknown"
        if journal.by == "removal":
            unlink(self.filesystem, os.path.join(self.folder, journal.commit))
        else:
            self._rename(publish.commit)
        self._flush_folders()
        self.committed = "yes"
        self._rename_pending()
        self._remove([name for name in publish.removes if name != journal.commit])
        if self._journal is not None:
            unlink(self.filesystem, os.path.join(self.folder, JOURNAL))

    # -- how it ends -------------------------------------------------------------------------------------------------

    def _end(self, error: BaseException | None) -> None:
        """Leave the folder in order. What the system refused once is left to the next save, which the journal tells."""
        for staged in self._staged.values():
            self._quietly(staged.close)
        if self.committed == "unknown" and self._still_old():
            self.committed = "no"
        if self.committed == "no":
            self._quietly(self._discard)
        elif error is not None and not isinstance(error, OSError):
            self._quietly(self._finish)

    def _still_old(self) -> bool:
        """Whether the call that commits did not happen, after it, or what follows it, has failed."""
        waits = self._staged[self.publish.commit].temporary
        if self._journal is not None and self._journal.by == "removal":
            waits = os.path.join(self.folder, self._journal.commit)
        try:
            return lstat(waits, self.filesystem) is not None
        except OSError:
            return False

    def _rename_pending(self) -> None:
        """Give texts that replace others their names."""
        renamed = bool(self._pending)
        while self._pending:
            if lstat(self._staged[self._pending[0]].temporary, self.filesystem):
                self._rename(self._pending[0])
            del self._pending[0]
        if renamed:
            self._flush_folders()

    def _finish(self) -> None:
        """After an interrupt behind the commit: do what was left to do."""
        self._flush_folders()
        self.committed = "yes"
        self._rename_pending()
        if self._journal is not None:
            settle(self._journal, "new", self.folder, self.filesystem, self._flush_folders)
            unlink(self.filesystem, os.path.join(self.folder, JOURNAL))

    def _discard(self) -> None:
        """Remove every trace, in an order that leaves the old checkpoint the visible one wherever it stops."""
        for name in reversed(self._published):
            staged = self._staged[name]
            if lstat(staged.temporary, self.filesystem) is None:  # else what has its name is not ours
                unlink(self.filesystem, staged.final)
        if self._published:
            self._flush_folders()
        if self._journal is not None:
            unlink(self.filesystem, os.path.join(self.folder, JOURNAL))
            self._flush_folders()  # while there is a journal, its parts tell the side
        for staged in self._staged.values():
            self._quietly(unlink, self.filesystem, staged.temporary)

    def _quietly(self, call: Callable[..., None], *args: object) -> None:
        """A step of cleaning up, whose failure must not hide the error that led here."""
        try:
            call(*args)
        except OSError:
            return

    # -- what lies in the folder -------------------------------------------------------------------------------------

    def _make_folder(self) -> None:
        """The folder and its parents; those that are new go again if nothing is committed."""
        missing, at = [], self.folder
        while at and lstat(at, self.filesystem) is None:
            missing.append(at)
            at = os.path.dirname(at)
        for path in reversed(missing):
            try:
                self.filesystem.mkdir(path)
            except FileExistsError:
                continue  # another writer was faster
            self._made.append(path)
        if not stat.S_ISDIR(self.filesystem.stat(self.folder).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.folder)

    def _own(self, folder: str) -> None:
        """Lock a folder, and clear what a writer that died has left in it."""
        if self._locks.take(folder):
            linked = [folder]

            def own(other: str) -> bool:
                if self._locks.take(other):
                    linked.append(other)
                return True

            for each in linked:  # it grows meanwhile
                recover(each, self.filesystem, lambda: self._flush(linked), own)

    def _destination(self, name: str) -> str:
        return destination(os.path.join(self.folder, name), self.symlinks, self.filesystem)

    def _check_folder(self) -> None:
        """Refuse a folder whose checkpoint is not the one that the plan replaces: the two would mix."""
        commit, removes = self.publish.commit, set(self.publish.removes)
        wrong = {name for name in rivals(commit) if name not in removes and self._there(name)}
        wrong |= {name for name in self.publish.renames if name.endswith(SUFFIX) and self._there(name)}
        if commit.endswith(".json") and self._there(commit):
            held = listed(os.path.join(self.folder, commit))
            wrong |= {name for name in held if not is_foreign(name, commit)} - removes
        if wrong:
            raise StalePlanError(
                f"{self.folder}: holds files that the plan neither replaces nor avoids "
                f"({', '.join(sorted(wrong)[:4])}); plan the save again with existing=existing_checkpoint(folder)",
                path=self.folder,
                names=tuple(sorted(wrong)),
            )

    def _mode(self, name: str, final: str) -> int | None:
        """The mode of the file replaced; shards under new names take that of the weights they replace."""
        paths = [final]
        if name.endswith(SUFFIX):
            paths += [os.path.join(self.folder, old) for old in self.publish.removes if old.endswith(SUFFIX)]
        for path in paths:
            try:
                return stat.S_IMODE(self.filesystem.stat(path).st_mode)
            except FileNotFoundError:
                continue
        return None

    def _own_name(self, name: str) -> bool:
        home = os.path.dirname(os.path.join(self.folder, name))
        return self.filesystem.realpath(home) == home

    def _there(self, name: str) -> bool:
        try:
            return lstat(os.path.join(self.folder, name), self.filesystem) is not None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # of an index that would lie beside a single file
                return False
            raise

    def _available(self, where: str) -> int | None:
        """Bytes that may still be written below a folder; None where the system does not say."""
        found = self.filesystem.statvfs(where)
        return found.f_bavail * found.f_frsize if found.f_blocks else None

    # -- steps -------------------------------------------------------------------------------------------------------

    def _create(self, final: str) -> StagedFile:
        temporary = os.path.join(os.path.dirname(final), part_name(f"{self._mark}-{next(self._numbers):05d}"))
        return StagedFile(final, temporary, self.filesystem.open(temporary, CREATE, 0o666), self.filesystem)

    def _seal(self, name: str, nbytes: int) -> None:
        staged = self._staged[name]
        found = self.filesystem.fstat(staged.fd).st_size
        if found != nbytes:
            raise SaveError(
                f"{staged.final}: {nbytes} bytes were planned and {found} written; nothing was changed",
                committed="no",
                expected=nbytes,
                found=found,
            )
        read = lambda start, stop: self.filesystem.pread(staged.fd, stop - start, start)  # noqa: E731
        staged.fingerprint = fingerprint_as(name, read, nbytes)
        if self.durability == "full":
            self.filesystem.fsync(staged.fd)
        staged.time = self.filesystem.fstat(staged.fd).st_mtime_ns  # some systems set it with the flush
        staged.close()

    def _unchanged_left_out(self) -> Publish:
        """The plan without the texts that the folder holds already, byte for byte."""
        texts = frozenset(name for name in self.publish.renames if not name.endswith(SUFFIX))
        found = fingerprints(self.folder, texts, self.filesystem)
        same = {name for name in texts if found.get(name) == self._staged[name].fingerprint}
        for name in same:
            unlink(self.filesystem, self._staged[name].temporary)
            del self._staged[name]
        return evolve(self.publish, renames=tuple(name for name in self.publish.renames if name not in same))

    def _planned(self, publish: Publish) -> Journal:
        single = [name for name in rivals(publish.commit) if name.endswith(SUFFIX) and name in publish.removes]
        by_removal = bool(single) and self._there(single[0]) and not self._there(publish.commit)
        removes = [name for name in publish.removes if self._own_name(name)]
        files = frozenset((*removes, *publish.renames, publish.commit))
        parts = {name: os.path.relpath(staged.temporary, self.folder) for name, staged in self._staged.items()}
        old = surveyed(self.folder, files, self.filesystem)
        return Journal(
            commit=single[0] if by_removal else publish.commit,
            by="removal" if by_removal else "rename",
            head=publish.commit,
            old=old.found,
            new=FrozenMap({name: staged.fingerprint for name, staged in self._staged.items()}),
            parts=FrozenMap(parts),
            old_times=old.times,
            new_times=FrozenMap({name: staged.time for name, staged in self._staged.items()}),
        )

    def _write_journal(self, journal: Journal) -> None:
        text = render_journal(journal).encode()
        staged = self._staged[JOURNAL] = self._create(os.path.join(self.folder, JOURNAL))
        staged.write([memoryview(text)], 0)
        self._seal(JOURNAL, len(text))
        self._journal = journal
        self._flush_folders()  # a journal without its parts would tell the wrong side
        self.filesystem.replace(staged.temporary, staged.final)
        self._flush_folders()

    def _rename(self, name: str) -> None:
        staged = self._staged[name]
        self.filesystem.replace(staged.temporary, staged.final)

    def _remove(self, names: Iterable[str]) -> None:
        """Remove what is superseded, an index before the shards that it names."""
        first, rest = partitioned(names)
        for batch in (first, rest):
            for name in batch:
                if self._own_name(name):
                    unlink(self.filesystem, os.path.join(self.folder, name))
            if batch:
                self._flush_folders()

    def _flush_folders(self) -> None:
        folders = {self.folder, *(os.path.dirname(staged.final) for staged in self._staged.values())}
        self._flush(sorted(folders.union(map(os.path.dirname, self._made))))

    def _flush(self, folders: Iterable[str]) -> None:
        if self.durability == "none":
            return
        for path in folders:
            fd = self.filesystem.open(path, FOLDER, 0)
            try:
                self.filesystem.fsync(fd)
            finally:
                self.filesystem.close(fd)

    def _error(self, error: OSError) -> SaveError:
        where = error.filename or self.folder
        done = {
            "no": "readers see what they saw before",
            "yes": "the new checkpoint is complete and visible; the next save removes what is left of the old one",
            "unknown": "the new checkpoint is visible, but the system did not confirm that it is on the disk",
        }[self.committed]
        message = f"{where}: {error.strerror or error}; {done}"
        if error.errno not in _FULL:
            return SaveError(message, committed=self.committed)
        try:
            available = self._available(self.folder)
        except OSError:
            available = None
        needed = sum(self.sizes.values())
        return NoSpaceError(message, committed=self.committed, needed=needed, available=available)
