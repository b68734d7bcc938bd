"""The probe: what the machine has to give, and what a plan's files lie on. Looks, and changes nothing."""

import errno
import os
import re
from collections.abc import Iterable
from time import monotonic_ns
from typing import Final, Literal, TypeAlias, get_args

from funcmodel.core.limits import check_choice
from funcmodel.errors import FuncmodelError
from funcmodel.plan.routing import HOT, LARGE
from funcmodel.records.expressions import FileRef
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.routes import Machine, Storage
from funcmodel.run.files import READ, SourceFile, open_regular
from funcmodel.run.formats import FORMATS, Format, format_named
from funcmodel.run.groups import memory_left, quotas, text_of

Look: TypeAlias = Literal["at everything", "at file systems"]

_MOST_THREADS: Final = 8  # more of them only wait for one another
_SAMPLES: Final = 32
_PAGE: Final = 4096
_OWN_READS: Final = "/proc/thread-self/io"
_SHIFTS: Final = 1009  # a prime, so that clocks which tick in round numbers reach all of them
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")
_DIRECT: Final[int | None] = getattr(os, "O_DIRECT", None)
_NOWAIT: Final[int | None] = getattr(os, "RWF_NOWAIT", None)
_RANDOM: Final[int | None] = getattr(os, "POSIX_FADV_RANDOM", None)
# Where a page of a mapping comes from this machine's own disk or memory.
_LOCAL: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "overlay", "tmpfs", "ramfs", "erofs"})
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})


def machine(
    refs: Iterable[FileRef] = (),
    *,
    formats: tuple[Format, ...] = FORMATS,
    smallest: int = LARGE,
    look: Look = "at everything",
) -> Machine:
    """What choosing routes needs to know.

    Args:
        refs: the files of a plan.
        formats: the formats that they may have.
        smallest: files of fewer bytes are not looked at; they are read the same way whatever they lie on.
        look: "at everything", or only "at file systems": not at how much of each file is in the page cache, nor at how
            much memory is left, which who maps everything need not know.

    Example:
        >>> machine().threads >= 1
        True
    """
    check_choice("look", look, get_args(Look))
    wanted = {ref.path: ref for ref in refs if ref.nbytes >= smallest}
    if not wanted:
        return Machine(threads=min(_MOST_THREADS, _processors()))
    mounts = text_of("/proc/self/mountinfo")
    storage = {path: _storage(ref, formats, mounts, look) for path, ref in wanted.items()}
    cold = any(found.cached < HOT for found in storage.values())
    return Machine(
        threads=threads() if look == "at everything" else min(_MOST_THREADS, _processors()),
        available=available() if cold else None,
        storage=FrozenMap(storage),
    )


def threads() -> int:
    """How many threads may run at once: of the machine's processors, those that this process may use."""
    return max(1, min(_MOST_THREADS, _processors(), *quotas()))


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available() -> int | None:
    """Bytes of memory that can be had without pushing anything out but the page cache; None where nobody says."""
    free = free_memory(text_of("/proc/meminfo"))
    return min([*([] if free is None else [free]), *memory_left()], default=None)


# -- what the kernel's files say: pure ---------------------------------------------------------------------------------


def free_memory(text: str) -> int | None:
    r"""Bytes that can be had, from `/proc/meminfo`.

    Example:
        >>> free_memory("MemTotal:  8 kB\nMemAvailable:  5 kB\n")
        5120
    """
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        size = rest.split()
        if name == "MemAvailable" and size and size[0].isdigit():
            return int(size[0]) << 10
    return None


def kind_of_device(text: str, major: int, minor: int) -> str:
    r"""The kind of file system on a device, from `/proc/self/mountinfo`; empty where none is mounted under that number.

    Example:
        >>> kind_of_device("22 1 8:1 / / rw - ext4 /dev/a rw\n", 8, 1), kind_of_device("", 0, 5)
        ('ext4', '')
    """
    _, found, rest = text.partition(f" {major}:{minor} ")
    return rest.partition("\n")[0].partition(" - ")[2].split(" ")[0] if found else ""


def mount_table(text: str) -> dict[str, str]:
    r"""Mount point to kind of file system, from `/proc/self/mountinfo`; of two on one point the upper one.

    Example:
        >>> mount_table("22 1 8:1 / / rw - ext4 /dev/a rw\n23 22 0:5 / /a\\040b rw shared:1 - nfs4 host:/x rw\n")
        {'/': 'ext4', '/a b': 'nfs4'}
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        place, _, rest = line.partition(" - ")
        fields, kind = place.split(" "), rest.split(" ")[0]
        if len(fields) > 4 and fields[4] and kind:
            found[_ESCAPED.sub(lambda code: chr(int(code[1], 8)), fields[4])] = kind
    return found


# -- files -------------------------------------------------------------------------------------------------------------


def _kind(file: SourceFile, mounts: str) -> str:
    """The file system that a file lies on: by its device, or else by the longest mount point above it."""
    device = file.identity[0]
    if found := kind_of_device(mounts, os.major(device), os.minor(device)):
        return found
    table, folder = mount_table(mounts), os.path.realpath(file.path)
    while folder not in table:
        above = os.path.dirname(folder)
        if above == folder:
            return ""
        folder = above
    return table[folder]


def _storage(ref: FileRef, formats: tuple[Format, ...], mounts: str, look: Look) -> Storage:
    try:
        format_ = format_named(ref.format, formats, path=ref.path)
        with open_regular(ref.path) as file:
            kind = _kind(file, mounts)
            sampled = look == "at everything" and kind not in _IN_MEMORY
            return Storage(
                kind=kind,
                mappable=format_.read is None and format_.decode is None and kind in _LOCAL,
                cached=_cached(file) if sampled else 1.0,
                direct=sampled and _direct(file),
            )
    except (FuncmodelError, OSError):
        return Storage()  # opening it in earnest will say what is wrong


def _cached(file: SourceFile) -> float:
    """The part of a file that is in the page cache, from a few samples; 1 where the kernel does not tell."""
    if _NOWAIT is None or not file.nbytes:
        return 1.0
    byte = bytearray(1)
    if _RANDOM is not None:
        os.posix_fadvise(file.fd, 0, 0, _RANDOM)  # what is fetched all the same is one page, and no more behind it
    missing, before = 0, fetched(text_of(_OWN_READS))
    shift = monotonic_ns() % _SHIFTS  # a page that was not there may be on its way now, so the next look is at others
    for i in range(_SAMPLES):
        try:
            os.preadv(file.fd, [byte], file.nbytes * (_SHIFTS * i + shift) // (_SHIFTS * _SAMPLES), _NOWAIT)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                return 1.0
            missing += 1
    # Of a page that was missing the kernel may have asked the disk, and got it, before it looked.
    late = (fetched(text_of(_OWN_READS)) - before) // _PAGE
    return 1.0 - min(_SAMPLES, max(missing, late)) / _SAMPLES


def fetched(text: str) -> int:
    r"""Bytes that a thread had fetched from disks, from `/proc/thread-self/io`.

    Example:
        >>> fetched("rchar: 9\nread_bytes: 8192\n"), fetched("")
        (8192, 0)
    """
    for line in text.splitlines():
        name, _, size = line.partition(": ")
        if name == "read_bytes" and size.isdigit():
            return int(size)
    return 0


def _direct(file: SourceFile) -> bool:
    if _DIRECT is None:
        return False
    try:
        os.close(os.open(f"/proc/self/fd/{file.fd}", READ | _DIRECT))
    except OSError:
        return False
    return True
