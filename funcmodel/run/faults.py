"""File systems that fail and die: what a saver is tested with. The package itself never imports this.

Every function takes a `FileSystem` and makes another, so they compose: `counted(faulty(REAL, 3, errno.ENOSPC))`.

* `counted` writes down each call;
* `faulty` lets the n-th one fail, write less than it was given, or be the one at which the process dies;
* `disk` and `restore` turn a folder into a value and back;
* `funcmodel.run.powerloss` goes on to what a loss of power could leave of a save.

To try a saver at every point: count the calls of one good run, then repeat it with a fault at each of them.

Example:
    >>> import os, tempfile
    >>> from funcmodel.run.filesystem import CREATE, REAL
    >>> def save(fs, path, text):
    ...     fd = fs.open(path, CREATE, 0o666)
    ...     try:
    ...         fs.pwritev(fd, [memoryview(text)], 0)
    ...         fs.fsync(fd)
    ...     finally:
    ...         fs.close(fd)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fs, trace = counted(REAL)
    ...     save(fs, f"{folder}/0", b"text")
    ...     points = sum(changes(call) for call in trace)
    ...     sizes = []
    ...     for at in range(1, points + 1):
    ...         try:
    ...             save(faulty(REAL, at, "die"), f"{folder}/{at}", b"text")
    ...         except Crash:
    ...             sizes.append(os.path.getsize(f"{folder}/{at}") if os.path.exists(f"{folder}/{at}") else None)
    >>> points, sizes
    (3, [None, 0, 4])
"""

import os
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any, Final, Literal, TypeAlias

from attrs import evolve, field, fields, frozen

from funcmodel.records.mapping import FrozenMap
from funcmodel.run.filesystem import FileSystem

Fault: TypeAlias = int | Literal["short", "die"]

_CHANGE: Final = frozenset({"pwritev", "fsync", "fchmod", "flock", "replace", "unlink", "mkdir", "rmdir"})
_BY_FD: Final = frozenset({"pwritev", "pread", "fsync", "close", "fchmod", "fstat", "flock"})


class Crash(BaseException):
    """The process died at this call: the call did not happen, and none after it will."""


@frozen
class Call:
    """One call of a `FileSystem`.

    Attributes:
        name: the function, as `FileSystem` calls it.
        path: what it is about; for a descriptor, the path that it was opened by.
        detail: the other arguments: flags and mode, the second path, offset and size in bytes.
        outcome: "" if it did what was asked for, else the name of the exception, or "short".
    """

    name: str
    path: str
    detail: tuple[Any, ...] = ()
    outcome: str = ""


def changes(call: Call) -> bool:
    """Whether a call changes the disk, its durability or a lock; the usual choice for `faulty`."""
    if call.name == "open":
        return bool(call.detail[0] & (os.O_CREAT | os.O_TRUNC))
    return call.name in _CHANGE


def every(call: Call) -> bool:  # noqa: ARG001
    """Every call, reading ones too."""
    return True


def intercepted(
    filesystem: FileSystem, around: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]
) -> FileSystem:
    """A file system each of whose calls goes through `around(name, function, arguments)`.

    Example:
        >>> from funcmodel.run.filesystem import REAL
        >>> intercepted(REAL, lambda name, function, arguments: name).listdir("/nowhere")
        'listdir'
    """

    def through(name: str) -> Callable[..., Any]:
        function = getattr(filesystem, name)
        return lambda *arguments: around(name, function, arguments)

    return FileSystem(**{f.name: through(f.name) for f in fields(FileSystem)})


def counted(filesystem: FileSystem) -> tuple[FileSystem, list[Call]]:
    """The same file system, and the list that its calls are appended to, failed ones too."""
    paths: dict[int, str] = {}
    trace: list[Call] = []

    def around(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        call = _call(name, arguments, paths)
        try:
            result = function(*arguments)
        except BaseException as error:
            trace.append(evolve(call, outcome=type(error).__name__))
            raise
        finally:
            if name == "close":
                paths.pop(arguments[0], None)
        if name == "open":
            paths[result] = call.path
        trace.append(evolve(call, outcome="short") if name == "pwritev" and result < call.detail[1] else call)
        return result

    return intercepted(filesystem, around), trace


def faulty(
    filesystem: FileSystem,
    at: int,
    fault: Fault,
    *,
    persistent: bool = False,
    only: Callable[[Call], bool] = changes,
) -> FileSystem:
    """A file system whose `at`-th call goes wrong.

    Args:
        filesystem: what serves the calls that go well.
        at: which call, counted from 1 among those that `only` accepts; with "short" among those that write.
        fault: the `errno` of an `OSError`; or "short", to write half of what is given; or "die", to raise `Crash` at
            that call and at every later one of any kind. A process that dies gives its descriptors back and with them
            its locks, so those that were opened here are closed.
        persistent: whether every later call that `only` accepts goes wrong too.
        only: which calls can go wrong.

    Raises:
        ValueError: `at` is less than 1.
    """
    if at < 1:
        raise ValueError(f"calls are counted from 1, found {at}")
    paths: dict[int, str] = {}
    strikes = _striker(at, fault, persistent, only)

    def around(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        call = _call(name, arguments, paths)
        struck = strikes(call)
        if struck and fault == "die":
            for fd in list(paths):
                filesystem.close(fd)
            raise Crash(call)
        if struck and fault == "short":
            return function(arguments[0], _half(arguments[1]), arguments[2])
        if name == "close":  # one that fails has closed all the same
            paths.pop(arguments[0], None)
            function(*arguments)
        if struck:
            raise OSError(fault, os.strerror(int(fault)), call.path)
        if name == "close":
            return None
        result = function(*arguments)
        if name == "open":
            paths[result] = call.path
        return result

    return intercepted(filesystem, around)


def _striker(at: int, fault: Fault, persistent: bool, only: Callable[[Call], bool]) -> Callable[[Call], bool]:
    """Counts calls, and says of each whether it is one that goes wrong."""
    lock = Lock()
    seen, dead = 0, False

    def strikes(call: Call) -> bool:
        nonlocal seen, dead
        with lock:
            if dead:
                raise Crash(call)
            if not only(call) or (fault == "short" and call.name != "pwritev"):
                return False
            seen += 1
            dead = seen == at and fault == "die"
            return seen == at or (persistent and seen > at)

    return strikes


def _call(name: str, arguments: tuple[Any, ...], paths: Mapping[int, str]) -> Call:
    first, *rest = arguments
    if name == "pwritev":
        rest = [rest[1], sum(buffer.nbytes for buffer in rest[0])]
    return Call(name, paths.get(first, "") if name in _BY_FD else os.fspath(first), tuple(rest))


def _half(buffers: Sequence[memoryview]) -> list[memoryview]:
    """The first half of what is to be written, at least one byte of it."""
    left = (sum(buffer.nbytes for buffer in buffers) + 1) // 2
    kept = []
    for buffer in buffers:
        kept.append(buffer.cast("B")[:left])
        left -= kept[-1].nbytes
    return kept


# -- folders as values -------------------------------------------------------------------------------------------------


@frozen
class Disk:
    """A folder with everything below it, as a value.

    Attributes:
        files: path below the folder to content. Names of one file are told apart like copies.
        links: path to target.
        folders: paths of the folders below it.
        times: path to when a file was last written, in nanoseconds. Folders that differ in these alone are equal.
    """

    files: FrozenMap[str, bytes] = FrozenMap()
    links: FrozenMap[str, str] = FrozenMap()
    folders: frozenset[str] = frozenset()
    times: FrozenMap[str, int] = field(default=FrozenMap(), eq=False)


def disk(folder: str | os.PathLike[str]) -> Disk:
    """What a folder holds now.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        ...     restore(Disk(FrozenMap({"x/y": b"z"}), folders=frozenset({"x"})), a)
        ...     restore(disk(a), b)
        ...     disk(b).files
        FrozenMap({'x/y': b'z'})
    """
    root = os.fspath(folder)
    files, links, folders, times = {}, {}, set(), {}
    for where, inner, names in os.walk(root):
        for name in (*inner, *names):
            path = os.path.join(where, name)
            below = os.path.relpath(path, root)
            if os.path.islink(path):
                links[below] = os.readlink(path)
            elif name in inner:
                folders.add(below)
            else:
                with open(path, "rb") as file:
                    files[below] = file.read()
                    times[below] = os.fstat(file.fileno()).st_mtime_ns
    return Disk(FrozenMap(files), FrozenMap(links), frozenset(folders), FrozenMap(times))


def restore(state: Disk, folder: str | os.PathLike[str]) -> None:
    """Write a state into a folder, which is made if it does not exist and must hold none of these names."""
    root = os.fspath(folder)
    os.makedirs(root, exist_ok=True)
    for path in sorted(state.folders):
        os.mkdir(os.path.join(root, path))
    for path, target in state.links.items():
        os.symlink(target, os.path.join(root, path))
    for path, content in state.files.items():
        with open(os.path.join(root, path), "xb") as file:
            file.write(content)
        if path in state.times:
            os.utime(os.path.join(root, path), ns=(state.times[path],) * 2)
