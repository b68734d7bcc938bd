"""What an unfinished save left in a folder: which side a reader takes, and how the next save ends it."""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from attrs import frozen

from funcmodel.core.journal import JOURNAL, Journal, Side, hidden, is_part, parse_journal, side
from funcmodel.errors import CheckpointError
from funcmodel.records.mapping import FrozenMap
from funcmodel.run.destinations import lstat
from funcmodel.run.files import READ, prefix_fingerprint
from funcmodel.run.filesystem import REAL, FileSystem

_LARGEST: Final = 8 << 20  # bytes of a journal; that is some 30,000 files
_OURS: Final = (".safetensors", ".json")  # how the names end of what a journal can make a save remove or rename
_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})


@frozen
class Standing:
    """A folder with a journal, as its readers must see it.

    Attributes:
        journal: the journal; None where there is none that can be read.
        holds: the checkpoint that the folder holds; None where the journal does not fit.
        hidden: names that belong to the other checkpoint.
        pending: files of the checkpoint that still wait under another name, final name to that name.
    """

    journal: Journal | None = None
    holds: Side | None = None
    hidden: frozenset[str] = frozenset()
    pending: FrozenMap[str, str] = FrozenMap()

    @property
    def decided(self) -> frozenset[str]:
        """The files that belong to either checkpoint; none where nothing is decided."""
        if self.journal is None or self.holds is None:
            return frozenset()
        return frozenset((*self.journal.old, *self.journal.new))


def standing(folder: str, filesystem: FileSystem = REAL) -> Standing:
    """Read a folder's journal and decide. Nothing is changed.

    A journal that cannot be parsed, or that does not fit the files, decides nothing: the folder is then judged as if
    it were not there.

    Raises:
        OSError: the system cannot read the folder.
    """
    try:
        journal = parse_journal(_content(filesystem, os.path.join(folder, JOURNAL)), path=os.path.join(folder, JOURNAL))
    except CheckpointError:
        return Standing()
    found = _fingerprints(filesystem, folder, {journal.commit, journal.head, *journal.old, *journal.new})
    waiting = {
        name for name, part in journal.parts.items() if lstat(os.path.join(folder, part), filesystem) is not None
    }
    holds = side(journal, found, waiting)
    if holds is None:
        return Standing(journal)
    pending = {}
    if holds == "new":
        pending = {name: journal.parts[name] for name in waiting if found.get(name) != journal.new.get(name)}
    return Standing(journal, holds, hidden(journal, holds), FrozenMap(pending))


def recover(folder: str, filesystem: FileSystem, flush: Callable[[], None]) -> None:
    """Finish what an earlier save had committed, take back what it had not, and remove what it staged.

    Only files that are, byte for byte, what the journal says are removed. The caller holds the folder's lock.

    Raises:
        OSError: the system refused; the journal is still there then, so that the next save tries again.
    """
    names = filesystem.listdir(folder)
    if JOURNAL in names:
        found = standing(folder, filesystem)
        if found.journal is not None and found.holds is not None:
            settle(found.journal, found.holds, folder, filesystem, flush)
        unlink(filesystem, os.path.join(folder, JOURNAL))
        flush()  # while there is a journal, its parts tell the side
    for path in (os.path.join(folder, name) for name in names if is_part(name)):
        left = lstat(path, filesystem)
        if left is not None and stat.S_ISREG(left.st_mode):
            unlink(filesystem, path)


def settle(journal: Journal, holds: Side, folder: str, filesystem: FileSystem, flush: Callable[[], None]) -> None:
    """Give the files of one side their names and remove those of the other. The journal itself stays."""
    flush()  # what committed may not be on the disk yet
    if holds == "new" and _name_pending(journal, folder, filesystem):
        flush()
    for batch in partitioned(sorted(_superseded(journal, holds))):
        for name in batch:
            path = os.path.join(folder, name)
            expected = journal.old[name] if holds == "new" else journal.new[name]
            ours = name.endswith(_OURS) and _inside(filesystem, folder, path)
            if ours and _fingerprint(filesystem, path) == expected:
                unlink(filesystem, path)
        if batch:
            flush()


def partitioned(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Indexes and other texts, and the rest. Until an index is gone for good, what it leads to must be there."""
    found = list(names)
    return [name for name in found if name.endswith(".json")], [name for name in found if not name.endswith(".json")]


def _name_pending(journal: Journal, folder: str, filesystem: FileSystem) -> bool:
    """Rename what still waits, unless somebody has changed the file since; whether there was any."""
    moved = False
    for name, part in journal.parts.items():
        source, target = os.path.join(folder, part), filesystem.realpath(os.path.join(folder, name))
        if (
            name != journal.commit
            and name.endswith(_OURS)
            and _inside(filesystem, folder, source)
            and _inside(filesystem, folder, target)
            and _fingerprint(filesystem, source) == journal.new.get(name, "")
            and _fingerprint(filesystem, target) in (None, journal.old.get(name))
        ):
            filesystem.replace(source, target)
            moved = True
    return moved


def _superseded(journal: Journal, holds: Side) -> frozenset[str]:
    """What is hidden, and an index that replaced another one in vain."""
    in_vain = holds == "old" and journal.by == "removal" and journal.new[journal.head] != journal.old.get(journal.head)
    return hidden(journal, holds) | ({journal.head} if in_vain else set())


def fingerprints(folder: str, names: frozenset[str], filesystem: FileSystem = REAL) -> FrozenMap[str, str]:
    """The files among `names` that are there, each with its fingerprint, damaged or not.

    Raises:
        OSError: the system cannot read one of them.
    """
    return FrozenMap(_fingerprints(filesystem, folder, set(names)))


def unlink(filesystem: FileSystem, path: str) -> None:
    """Remove a file that may be gone already."""
    try:
        filesystem.unlink(path)
    except FileNotFoundError:
        return


def _fingerprints(filesystem: FileSystem, folder: str, names: set[str]) -> dict[str, str]:
    found = ((name, _fingerprint(filesystem, os.path.join(folder, name))) for name in sorted(names))
    return {name: mark for name, mark in found if mark is not None}


def _fingerprint(filesystem: FileSystem, path: str) -> str | None:
    """The fingerprint of a regular file; None where there is none."""
    try:
        with _regular(filesystem, path) as (fd, size):
            return prefix_fingerprint(lambda start, stop: _read(filesystem, fd, start, stop), size) if fd >= 0 else None
    except PermissionError:
        return "unreadable"  # another user's; it can be replaced all the same


def _content(filesystem: FileSystem, path: str) -> bytes:
    """A small file, whole; one that is missing, irregular or too large is no content."""
    with _regular(filesystem, path) as (fd, size):
        return _read(filesystem, fd, 0, size) if 0 <= size <= _LARGEST else b""


@contextmanager
def _regular(filesystem: FileSystem, path: str) -> Iterator[tuple[int, int]]:
    """The descriptor and the size of a regular file, -1 and -1 where there is none."""
    try:
        fd = filesystem.open(path, READ, 0)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        yield -1, -1
        return
    try:
        found = filesystem.fstat(fd)
        yield (fd, found.st_size) if stat.S_ISREG(found.st_mode) else (-1, -1)
    finally:
        filesystem.close(fd)


def _read(filesystem: FileSystem, fd: int, start: int, stop: int) -> bytes:
    """Bytes of an open file, fewer where it ends early."""
    found = bytearray()
    while start + len(found) < stop and (more := filesystem.pread(fd, stop - start - len(found), start + len(found))):
        found += more
    return bytes(found)


def _inside(filesystem: FileSystem, folder: str, path: str) -> bool:
    """Whether a file lies in the folder, however its own folder is reached. A link in its place is judged as itself."""
    home = filesystem.realpath(os.path.dirname(path))
    return home == os.path.dirname(path) and (home == folder or home.startswith(os.path.join(folder, "")))
