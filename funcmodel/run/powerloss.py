"""What a loss of power could leave of a save: watch it with `simulated`, then ask `power_losses` for every state.

Written bytes, and the time of the last write, are safe once their file was flushed, names once their folder was. Until
then

* a file may be found as it was last flushed, empty, half written or whole;
* of the operations on the names of a folder since its last flush the disk kept the first few (model "A", as a file
  system with an ordered journal does), or any of them (model "B", which is all that POSIX promises). A rename within a
  folder happens whole or not at all.

Example:
    >>> import os, tempfile
    >>> from funcmodel.run.faults import restore
    >>> from funcmodel.run.filesystem import CREATE, REAL
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     restore(Disk(FrozenMap({"a": b"old"})), folder)
    ...     fs, recording = simulated(REAL, folder)
    ...     fd = fs.open(f"{folder}/new", CREATE, 0o666)
    ...     fs.pwritev(fd, [memoryview(b"text")], 0)
    ...     fs.close(fd)
    ...     fs.replace(f"{folder}/new", f"{folder}/a")
    4
    >>> for state in power_losses(recording, "A"):
    ...     print(dict(state.files))
    {'a': b'old'}
    {'a': b'old', 'new': b''}
    {'a': b'old', 'new': b'te'}
    {'a': b'old', 'new': b'text'}
    {'a': b''}
    {'a': b'te'}
    {'a': b'text'}
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from random import Random
from threading import Lock
from typing import Any, Final, Literal, TypeAlias

from attrs import define, field, frozen

from funcmodel.records.mapping import FrozenMap
from funcmodel.run.faults import Disk, intercepted
from funcmodel.run.filesystem import FileSystem

Model: TypeAlias = Literal["A", "B"]
Held: TypeAlias = tuple[bytes, int]
"""What a file holds, and when it was last written."""

_MOST: Final = 4096  # subsets, and choices of contents, that are all tried; of more there is a sample

# -- what reaches the disk ---------------------------------------------------------------------------------------------


@frozen
class Event:
    """One step that a loss of power can undo, or that makes earlier ones safe.

    Attributes:
        kind: bytes were written or cut off; names of a folder were changed, all at once; a file's bytes or a folder's
            names were flushed.
        node: the number of the file or folder.
        data: what was written.
        at: offset of the first byte written, or the size that was left.
        time: of the last write since then, in nanoseconds.
        names: the names that changed, to the file or folder that each of them now is; None for none.
        failed: the flush failed. Systems then forget what was waiting, and a second flush does not bring it back.
    """

    kind: Literal["write", "cut", "names", "flush"]
    node: int
    data: bytes = b""
    at: int = 0
    time: int = 0
    names: FrozenMap[str, int | None] = FrozenMap()
    failed: bool = False


@define(eq=False)
class Recording:
    """What happened below a folder while it was watched: see `simulated`.

    Attributes:
        root: the folder, links resolved.
        files: contents at the start, by number; all of it counts as safe.
        times: when each of them was last written.
        links: targets of links, by number.
        folders: what each folder held at the start, by number; the root is 0.
        events: what happened since.
    """

    root: str
    files: dict[int, bytes] = field(factory=dict)
    times: dict[int, int] = field(factory=dict)
    links: dict[int, str] = field(factory=dict)
    folders: dict[int, dict[str, int]] = field(factory=lambda: {0: {}})
    events: list[Event] = field(factory=list)
    _now: dict[int, dict[str, int]] = field(factory=dict)  # every folder that there ever was
    _open: dict[int, int] = field(factory=dict)
    _next: int = 1

    def _new(self) -> int:
        self._next += 1
        return self._next - 1

    def _start(self, where: str, node: int) -> None:
        for entry in os.scandir(where):
            number = self.folders[node][entry.name] = self._new()
            if entry.is_symlink():
                self.links[number] = os.readlink(entry.path)
            elif entry.is_dir():
                self.folders[number] = {}
                self._start(entry.path, number)
            else:
                with open(entry.path, "rb") as file:
                    self.files[number] = file.read()
                    self.times[number] = os.fstat(file.fileno()).st_mtime_ns
        self._now[node] = dict(self.folders[node])

    def _locate(self, path: str, *, follow: bool = False) -> tuple[int, str] | None:
        """The folder's number and the name in it; None for a path that is not below the root."""
        parent, name = os.path.split(os.path.realpath(path) if follow else os.path.abspath(path))
        below = os.path.relpath(os.path.realpath(parent), self.root)
        node = 0
        for part in () if below == "." else below.split(os.sep):
            if part == os.pardir or part not in self._now[node]:
                return None
            node = self._now[node][part]
        return node, name

    def _rename(self, node: int, names: Mapping[str, int | None]) -> None:
        for name, value in names.items():
            if value is None:
                self._now[node].pop(name, None)
            else:
                self._now[node][name] = value
        self.events.append(Event("names", node, names=FrozenMap(names)))

    def _opened(self, fd: int, path: str, flags: int) -> None:
        if os.path.realpath(path) == self.root:
            self._open[fd] = 0
            return
        place = self._locate(path, follow=not flags & getattr(os, "O_NOFOLLOW", 0))
        if place is None:
            return
        node, name = place
        if name not in self._now[node]:
            if not flags & os.O_CREAT:
                return  # somebody else has made it since
            self._rename(node, {name: self._new()})
        elif flags & os.O_TRUNC:
            self.events.append(Event("cut", self._now[node][name], time=os.fstat(fd).st_mtime_ns))
        self._open[fd] = self._now[node][name]

    def _happened(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Record a call that went well."""
        first = arguments[0]
        if name == "open":
            self._opened(result, first, arguments[1])
        elif name == "close":
            self._open.pop(first, None)
        elif name == "pwritev" and first in self._open:
            data = b"".join(arguments[1])[:result]
            time = os.fstat(first).st_mtime_ns
            self.events.append(Event("write", self._open[first], data, arguments[2], time))
        elif name == "fsync" and first in self._open:
            self.events.append(Event("flush", self._open[first]))
        elif name in ("unlink", "rmdir") and (place := self._locate(first)) is not None:
            self._rename(place[0], {place[1]: None})
        elif name == "mkdir" and (place := self._locate(first)) is not None:
            node = self._new()
            self._now[node] = {}
            self._rename(place[0], {place[1]: node})
        elif name == "replace":
            self._replaced(self._locate(first), self._locate(arguments[1]))

    def _replaced(self, source: tuple[int, str] | None, target: tuple[int, str] | None) -> None:
        if source is None or target is None:
            if source is not target:
                raise ValueError(f"a file was renamed across the border of {self.root}, the folder that is recorded")
            return
        node = self._now[source[0]][source[1]]
        if source[0] == target[0]:
            self._rename(source[0], {source[1]: None, target[1]: node})
        else:  # a disk may keep either half of it
            self._rename(target[0], {target[1]: node})
            self._rename(source[0], {source[1]: None})


def simulated(filesystem: FileSystem, root: str | os.PathLike[str]) -> tuple[FileSystem, Recording]:
    """The same file system, and a recording of all that its calls do below `root`, for `power_losses`.

    What `root` holds now counts as safe. The calls are performed; contents are kept in memory.

    Args:
        filesystem: what performs the calls. A `faulty` one is recorded with its faults.
        root: an existing folder; to record how a folder comes into being, give the one above it.
    """
    recording = Recording(os.path.realpath(root))
    recording._start(recording.root, 0)
    lock = Lock()

    def around(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        with lock:
            try:
                result = function(*arguments)
            except OSError:
                if name == "fsync" and arguments[0] in recording._open:
                    recording.events.append(Event("flush", recording._open[arguments[0]], failed=True))
                raise
            recording._happened(name, arguments, result)
            return result

    return intercepted(filesystem, around), recording


# -- what a loss of power leaves ---------------------------------------------------------------------------------------


@define(eq=False)
class _File:
    """What is safe of a file, what was written since, and whether a failed flush has made that doubtful for good."""

    safe: Held = b"", 0
    base: Held = b"", 0
    now: Held = b"", 0
    lost: bool = False

    def possible(self) -> tuple[Held, ...]:
        if self.now == self.safe and not self.lost:
            return (self.safe,)
        half = len(self.now[0]) // 2
        halved = self.now[0][:half] + self.base[0][half:], self.now[1]
        return tuple({held[0]: held for held in (self.safe, self.base, halved, self.now)}.values())


@define(eq=False)
class _Platter:
    """What the disk is sure to hold, and what it may hold, after the events so far."""

    recording: Recording
    files: dict[int, _File] = field(factory=dict)
    names: dict[int, dict[str, int | None]] = field(factory=dict)
    pending: dict[int, list[FrozenMap[str, int | None]]] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        held = {node: (data, self.recording.times.get(node, 0)) for node, data in self.recording.files.items()}
        self.files = {node: _File(*(each,) * 3) for node, each in held.items()}
        self.names = {node: {**names} for node, names in self.recording.folders.items()}

    def take(self, event: Event) -> None:
        node = event.node
        if event.kind == "names":
            self.pending.setdefault(node, []).append(event.names)
        elif event.kind == "flush" and node in self.recording._now:
            for names in self.pending.pop(node, ()) if not event.failed else ():
                self.names.setdefault(node, {}).update(names)
        else:
            file = self.files.setdefault(node, _File())
            if event.kind == "write":
                now = file.now[0]
                kept = now[: event.at].ljust(event.at, b"\0")
                file.now = kept + event.data + now[event.at + len(event.data) :], event.time
            elif event.kind == "cut":
                file.base = file.now = file.now[0][: event.at], event.time
            elif event.failed:
                file.lost = True
            elif not file.lost:
                file.safe = file.base = file.now

    def states(self, model: Model) -> Iterator[Disk]:
        nodes = sorted(self.pending)
        counts = [len(self.pending[node]) for node in nodes]
        kept = [_prefixes(n) if model == "A" else _subsets(n) for n in counts]
        seen: set[frozenset[tuple[str, int]]] = set()
        for choice in product(*kept):
            names = dict(self.names)
            for node, chosen in zip(nodes, choice, strict=True):
                names[node] = dict(self.names.get(node, {}))
                for i in chosen:
                    names[node].update(self.pending[node][i])
            tree = dict(_tree(names))
            if (key := frozenset(tree.items())) not in seen:
                seen.add(key)
                yield from self._filled(tree)

    def _filled(self, tree: Mapping[str, int]) -> Iterator[Disk]:
        links = FrozenMap({p: self.recording.links[node] for p, node in tree.items() if node in self.recording.links})
        folders = frozenset(p for p, node in tree.items() if node in self.recording._now)
        files = {p: node for p, node in tree.items() if p not in links and p not in folders}
        numbers = sorted(set(files.values()))
        for contents in _choices([self.files.get(n, _File()).possible() for n in numbers]):
            held = dict(zip(numbers, contents, strict=True))
            names = FrozenMap({p: held[node][0] for p, node in files.items()})
            yield Disk(names, links, folders, FrozenMap({p: held[node][1] for p, node in files.items()}))


def power_losses(recording: Recording, model: Model = "B", upto: int | None = None) -> Iterator[Disk]:
    """Every state of the disk, each once, that a loss of power could leave.

    All subsets of up to 12 operations on a folder are tried, and all combinations of up to 4,096 contents. Of more it
    is a sample, the same each time: all prefixes, all but one, each alone, and 4,096 drawn by a fixed seed.

    Args:
        recording: what happened.
        model: "A" or "B"; see the module.
        upto: how many of the recording's events have happened; all of them by default, as after the save returned.
    """
    platter = _Platter(recording)
    for event in recording.events[:upto]:
        platter.take(event)
    return _once(platter.states(model))


def power_losses_during(recording: Recording, model: Model = "B") -> Iterator[Disk]:
    """Every state, each once, that a loss of power could leave at any time from the first event to the last.

    States are asked for before each flush and at the end: what was possible earlier still is then, but for more of the
    contents that a file had between two writes.
    """
    return _once(_at_flushes(recording, model))


def _at_flushes(recording: Recording, model: Model) -> Iterator[Disk]:
    platter = _Platter(recording)
    for event in recording.events:
        if event.kind == "flush":
            yield from platter.states(model)
        platter.take(event)
    yield from platter.states(model)


def _once(states: Iterator[Disk]) -> Iterator[Disk]:
    seen: set[Disk] = set()
    for state in states:
        if state not in seen:
            seen.add(state)
            yield state


def _tree(folders: Mapping[int, Mapping[str, int | None]], node: int = 0, path: str = "") -> Iterator[tuple[str, int]]:
    """Path and number of everything that the root leads to."""
    for name, inner in folders.get(node, {}).items():
        if inner is not None:
            yield path + name, inner
            if inner in folders:
                yield from _tree(folders, inner, f"{path}{name}{os.sep}")


def _prefixes(n: int) -> list[tuple[int, ...]]:
    return [tuple(range(stop)) for stop in range(n + 1)]


def _subsets(n: int) -> list[tuple[int, ...]]:
    """Subsets of `range(n)`: all of them if there are no more than are all tried."""
    if 2**n <= _MOST:
        return [tuple(i for i in range(n) if mask >> i & 1) for mask in range(2**n)]
    most = tuple(range(n))
    drawn = Random(n)
    return list(
        dict.fromkeys(
            [
                *_prefixes(n),
                *(most[:i] + most[i + 1 :] for i in most),
                *((i,) for i in most),
                *(tuple(i for i in most if drawn.random() < 0.5) for _ in range(_MOST)),
            ]
        )
    )


def _choices(options: Sequence[Sequence[Held]]) -> Iterator[tuple[Held, ...]]:
    """One of each: all combinations if there are no more than are all tried."""
    if prod(map(len, options)) <= _MOST:
        yield from product(*options)
        return
    drawn = Random(len(options))
    whole = tuple(several[-1] for several in options)
    for i, several in enumerate(options):
        yield from ((*whole[:i], one, *whole[i + 1 :]) for one in several)
    for _ in range(_MOST):
        yield tuple(drawn.choice(several) for several in options)
