"""What an unfinished save left in a folder: which side a reader takes, and how the next save ends it."""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Final

from attrs import evolve, frozen

from funcmodel.core.folder import STEMS
from funcmodel.core.journal import JOURNAL, Journal, Side, Survey, changed, hidden, is_part, parse_journal, side
from funcmodel.errors import CheckpointError
from funcmodel.plan.sharding import SUFFIX, rivals
from funcmodel.records.mapping import FrozenMap
from funcmodel.run.destinations import lstat
from funcmodel.run.files import READ, prefix_fingerprint
from funcmodel.run.filesystem import REAL, FileSystem

_LARGEST: Final = 12 << 20  # bytes of a journal; that is some 30,000 files
_WHOLE: Final = 64 << 20  # bytes of a text that are hashed
_CHUNK: Final = 1 << 20
_HEX: Final = frozenset("0123456789abcdef")
_OURS: Final = (SUFFIX, ".json")  # how the names end of what a journal can make a save remove or rename
_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})


@frozen
class Standing:
    """A folder with a journal, as its readers must see it.

    Attributes:
        journal: the journal; None where there is none that can be read.
        holds: the checkpoint that the folder holds; None where the journal does not fit.
        hidden: names that belong to the other checkpoint.
        pending: files of the checkpoint that still wait under another name, final name to that name.
        changed: files of either checkpoint that somebody else has written since.
    """

    journal: Journal | None = None
    holds: Side | None = None
    hidden: frozenset[str] = frozenset()
    pending: FrozenMap[str, str] = FrozenMap()
    changed: frozenset[str] = frozenset()

    @property
    def decided(self) -> frozenset[str]:
        """The files that belong to either checkpoint; none where nothing is decided, or by somebody else since."""
        if self.journal is None or self.holds is None or self.changed:
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
    survey = _survey(journal, folder, filesystem)
    holds = side(journal, survey)
    if holds is None:
        return Standing(journal)
    pending = {}
    if holds == "new":
        pending = {n: journal.parts[n] for n in survey.waiting if survey.found.get(n) != journal.new.get(n)}
    other = changed(journal, survey)
    return Standing(journal, holds, hidden(journal, holds) - other, FrozenMap(pending), other)


def recover(
    folder: str, filesystem: FileSystem, flush: Callable[[], None], own: Callable[[str], bool] = lambda _: False
) -> None:
    """Finish what an earlier save had committed, take back what it had not, and remove what it staged.

    Only files that have the size, the header and the time that the journal recorded are removed; those of a copy, which
    has other times, by size and header alone. The caller holds the folder's lock.

    Args:
        folder: its path, links resolved.
        filesystem: the calls to make.
        flush: flushes the names of the folder, and of those that `own` was asked for.
        own: locks another folder, to which a link of this one leads, before a text gets its name there; whether this
            could be done.

    Raises:
        OSError: the system refused; the journal is still there then, so that the next save tries again.
    """
    names = filesystem.listdir(folder)
    if JOURNAL in names:
        found = standing(folder, filesystem)
        if found.journal is not None and found.holds is not None:
            settle(found.journal, found.holds, folder, filesystem, flush, own)
        unlink(filesystem, os.path.join(folder, JOURNAL))
        flush()  # while there is a journal, its parts tell the side
    for path in (os.path.join(folder, name) for name in names if is_part(name)):
        left = lstat(path, filesystem)
        if left is not None and stat.S_ISREG(left.st_mode):
            unlink(filesystem, path)


def settle(
    journal: Journal,
    holds: Side,
    folder: str,
    filesystem: FileSystem,
    flush: Callable[[], None],
    own: Callable[[str], bool] = lambda _: False,
) -> None:
    """Give the files of one side their names and remove those of the other. The journal itself stays.

    The arguments are those of `recover`.
    """
    flush()  # what committed may not be on the disk yet
    survey = _survey(journal, folder, filesystem)
    if holds == "new" and _name_pending(journal, survey, folder, filesystem, own):
        flush()
    for batch in partitioned(sorted(_superseded(journal, holds) - changed(journal, survey))):
        for name in batch:
            path = os.path.join(folder, name)
            expected = journal.old[name] if holds == "new" else journal.new[name]
            ours = name.endswith(".json") or not is_foreign(name, journal.head)
            if (
                ours
                and _inside(filesystem, folder, path)
                and _mark(filesystem, path, name) == (expected, survey.times.get(name))
            ):
                unlink(filesystem, path)
        if batch:
            flush()


def partitioned(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Indexes and other texts, and the rest. Until an index is gone for good, what it leads to must be there."""
    found = list(names)
    return [name for name in found if name.endswith(".json")], [name for name in found if not name.endswith(".json")]


def is_foreign(file: str, commit: str) -> bool:
    """Whether a file says by its name that it is no part of a checkpoint, whatever an index of that one lists.

    Adapters, other variants, weights of another well-known name and files of other formats do so. A shard may bear any
    name that is none of these.

    Args:
        file: name of a file, below the folder.
        commit: the checkpoint's only file of weights, or its index.

    Example:
        >>> [is_foreign(f"{name}.safetensors", "model.safetensors") for name in ("model-00001-of-00002", "part1")]
        [False, False]
        >>> [is_foreign(f"{name}.safetensors", "model.safetensors") for name in ("adapter_model", "model.fp16")]
        [True, True]
    """
    name = file.rpartition("/")[2]
    if not name.endswith(SUFFIX):
        return True
    own = next((n for n in (commit, *rivals(commit)) if n.endswith(SUFFIX)), commit).removesuffix(SUFFIX)
    whole = _untagged(name.removesuffix(SUFFIX))
    stem = whole.partition(".")[0]
    return whole != own and (stem in STEMS or whole.startswith(f"{own}."))


def _untagged(body: str) -> str:
    """The name before the numbers of a shard, and before the mark where it bears one."""
    parts = body.rsplit("-", 3)
    if len(parts) == 4 and parts[2] == "of" and parts[1].isdecimal() and parts[3].isdecimal():
        body, dash, tag = parts[0].rpartition("-")
        return body if dash and len(tag) == 8 and _HEX.issuperset(tag) else parts[0]
    return body


def _name_pending(
    journal: Journal, survey: Survey, folder: str, filesystem: FileSystem, own: Callable[[str], bool]
) -> bool:
    """Rename what still waits, unless somebody has changed the file since; whether there was any."""
    moved = False
    for name, part in journal.parts.items():
        source = os.path.normpath(os.path.join(folder, part))
        target = filesystem.realpath(os.path.join(folder, name))
        if (
            name in survey.waiting
            and name != journal.commit
            and name.endswith(_OURS)
            and _reachable(journal, survey, name, (source, target), folder, filesystem)
            and _fingerprint(filesystem, source, name) == journal.new.get(name, "")
            and _fingerprint(filesystem, target, name) in (None, journal.old.get(name))
            and (_inside(filesystem, folder, target) or own(os.path.dirname(target)))
        ):
            filesystem.replace(source, target)
            moved = True
    return moved


def _reachable(
    journal: Journal, survey: Survey, name: str, paths: tuple[str, str], folder: str, filesystem: FileSystem
) -> bool:
    """Whether a part and its target lie in the folder; or side by side where a link leads, and the part is the one."""
    source, target = paths
    if _inside(filesystem, folder, source) and _inside(filesystem, folder, target):
        return True
    home = os.path.dirname(target)
    beside = os.path.dirname(source) == home and filesystem.realpath(home) == home
    return beside and name.endswith(".json") and survey.waiting[name] == journal.new_times.get(name)


def _superseded(journal: Journal, holds: Side) -> frozenset[str]:
    """What is hidden, and an index that replaced another one in vain."""
    in_vain = holds == "old" and journal.by == "removal" and journal.new[journal.head] != journal.old.get(journal.head)
    return hidden(journal, holds) | ({journal.head} if in_vain else set())


def fingerprints(folder: str, names: frozenset[str], filesystem: FileSystem = REAL) -> FrozenMap[str, str]:
    """The files among `names` that are there, each with its fingerprint, damaged or not.

    Raises:
        OSError: the system cannot read one of them.
    """
    return surveyed(folder, names, filesystem).found


def surveyed(folder: str, names: frozenset[str], filesystem: FileSystem = REAL) -> Survey:
    """The same, with the times of these files.

    Raises:
        OSError: the system cannot read one of them.
    """
    marks = {name: _mark(filesystem, os.path.join(folder, name), name) for name in sorted(names)}
    there = {name: mark for name, mark in marks.items() if mark is not None}
    return Survey(
        found=FrozenMap({name: fingerprint for name, (fingerprint, _) in there.items()}),
        times=FrozenMap({name: time for name, (_, time) in there.items()}),
    )


def fingerprint_as(name: str, read: Callable[[int, int], bytes], nbytes: int) -> str:
    """What tells one file of a name from another: of weights the size and the header, of texts the whole.

    Args:
        name: the name that it has or is to get.
        read: the bytes from one offset to another.
        nbytes: size of the file in bytes. Of a text that is larger than 64 MiB the rest is not looked at.
    """
    if name.endswith(SUFFIX):
        return prefix_fingerprint(read, nbytes)
    digest = blake2b(digest_size=16)
    stop = min(nbytes, _WHOLE)
    for at in range(0, stop, _CHUNK):
        digest.update(read(at, min(at + _CHUNK, stop)))
    digest.update(nbytes.to_bytes(8, "little"))
    return digest.hexdigest()


def unlink(filesystem: FileSystem, path: str) -> None:
    """Remove a file that may be gone already."""
    try:
        filesystem.unlink(path)
    except FileNotFoundError:
        return


def _survey(journal: Journal, folder: str, filesystem: FileSystem) -> Survey:
    names = frozenset((journal.commit, journal.head, *journal.old, *journal.new))
    parts = {name: lstat(os.path.join(folder, part), filesystem) for name, part in journal.parts.items()}
    waiting = {name: found.st_mtime_ns for name, found in parts.items() if found is not None}
    return evolve(surveyed(folder, names, filesystem), waiting=FrozenMap(waiting))


def _fingerprint(filesystem: FileSystem, path: str, name: str) -> str | None:
    """The fingerprint of a regular file; None where there is none."""
    mark = _mark(filesystem, path, name)
    return None if mark is None else mark[0]


def _mark(filesystem: FileSystem, path: str, name: str) -> tuple[str, int] | None:
    """The fingerprint of a regular file, as one of that name, and its time; None where there is none."""
    try:
        with _regular(filesystem, path) as (fd, size, time):
            if fd < 0:
                return None
            return fingerprint_as(name, lambda start, stop: _read(filesystem, fd, start, stop), size), time
    except PermissionError:
        return "unreadable", filesystem.stat(path).st_mtime_ns  # another user's; it can be replaced all the same


def _content(filesystem: FileSystem, path: str) -> bytes:
    """A small file, whole; one that is missing, irregular or too large is no content."""
    with _regular(filesystem, path) as (fd, size, _):
        return _read(filesystem, fd, 0, size) if 0 <= size <= _LARGEST else b""


@contextmanager
def _regular(filesystem: FileSystem, path: str) -> Iterator[tuple[int, int, int]]:
    """The descriptor, the size and the time of a regular file, -1 for the first two where there is none."""
    try:
        fd = filesystem.open(path, READ, 0)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        yield -1, -1, 0
        return
    try:
        found = filesystem.fstat(fd)
        yield (fd, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else (-1, -1, 0)
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
