"""The journal of an unfinished save: what replaces what, and which of the two a reader of the folder must take."""

import json
from typing import Any, Final, Literal, TypeAlias

from attrs import frozen

from funcmodel.core.limits import LIMITS, Limits
from funcmodel.core.strict_json import parsed
from funcmodel.errors import CheckpointError
from funcmodel.records.mapping import FrozenMap

JOURNAL: Final = ".funcmodel-save.json"
LOCK: Final = ".funcmodel.lock"
_PART: Final = (".fm-", ".part")
_VERSION: Final = 2
_READ: Final = (1, 2)  # the first one recorded no times
_TIMES: Final = 1 << 63  # nanoseconds that a file system can hold, either way

Side: TypeAlias = Literal["old", "new"]


@frozen(kw_only=True)
class Journal:
    """One save, from before its first rename until its last removal.

    Attributes:
        commit: the file whose rename, or whose removal, makes the new checkpoint the visible one.
        by: which of the two.
        head: the file that a reader of the new checkpoint opens first: its only file of weights, or its index.
        old: the files that the save replaces, name to fingerprint.
        new: the files that it writes, name to fingerprint.
        parts: where each new file waits until it gets its name.
        old_times: when the replaced files were last written, in nanoseconds; none in a journal of the first version.
        new_times: when the new files were. A rename keeps the time, and so does a loss of power after a flush.
    """

    commit: str
    by: Literal["rename", "removal"]
    head: str
    old: FrozenMap[str, str] = FrozenMap()
    new: FrozenMap[str, str] = FrozenMap()
    parts: FrozenMap[str, str] = FrozenMap()
    old_times: FrozenMap[str, int] = FrozenMap()
    new_times: FrozenMap[str, int] = FrozenMap()


@frozen(kw_only=True)
class Survey:
    """What lies in the folder of a journal.

    Attributes:
        found: the files that are there, name to fingerprint; at least those that the journal names.
        times: when each of them was last written, in nanoseconds.
        waiting: the new files whose part is still there, by the name they are to get, to the time of the part.
    """

    found: FrozenMap[str, str] = FrozenMap()
    times: FrozenMap[str, int] = FrozenMap()
    waiting: FrozenMap[str, int] = FrozenMap()


def part_name(mark: str) -> str:
    """The name of a staged file.

    Example:
        >>> part_name("1f2e3d4c-00001")
        '.fm-1f2e3d4c-00001.part'
    """
    return f"{_PART[0]}{mark}{_PART[1]}"


def is_part(name: str) -> bool:
    """Whether a name is that of a file which a save has staged.

    Example:
        >>> is_part(".fm-1f2e3d4c-00001.part"), is_part("model.safetensors")
        (True, False)
    """
    return name.startswith(_PART[0]) and name.endswith(_PART[1])


def side(journal: Journal, survey: Survey) -> Side | None:
    """Which checkpoint the folder holds; None where the journal does not fit what is there.

    Fingerprints are those of headers, which two saves of one model have in common. Where a file is what only one side
    recorded, by its fingerprint and its time, that decides. Else, as in a copy whose files have new times, the
    fingerprints decide, and whether the part of a file still waits.

    Args:
        journal: the journal.
        survey: what is there.

    Example:
        >>> journal = Journal(commit="m", by="rename", head="m", new=FrozenMap({"m": "2"}), old=FrozenMap({"m": "1"}))
        >>> side(journal, Survey(found=FrozenMap(m="1"), waiting=FrozenMap(m=0)))
        'old'
        >>> side(journal, Survey(found=FrozenMap(m="2"))), side(journal, Survey(found=FrozenMap(m="3")))
        ('new', None)
    """
    commit, head = survey.found.get(journal.commit), survey.found.get(journal.head)
    if journal.by == "rename":
        if (certain := _certain(journal, journal.commit, survey)) is not None:
            return certain
        if journal.commit in survey.waiting:
            return "old" if commit == journal.old.get(journal.commit) else None
        return "new" if commit is not None and commit == journal.new.get(journal.commit) else None
    if commit is None:
        return "new" if head is not None and head == journal.new.get(journal.head) else None
    return "old" if commit == journal.old.get(journal.commit) else None


def changed(journal: Journal, survey: Survey) -> frozenset[str]:
    """Files that somebody has written since, whatever their headers say: none of ours to hide or to remove.

    None are, where no file at all has the time that the journal recorded of it: that is the copy of a folder, and says
    nothing, as does a journal without times.

    Example:
        >>> journal = Journal(commit="m", by="rename", head="m", new=FrozenMap(m="1"), old=FrozenMap(i="1"),
        ...                   new_times=FrozenMap(m=5), old_times=FrozenMap(i=3))
        >>> changed(journal, Survey(found=FrozenMap(m="1", i="1"), times=FrozenMap(m=5, i=9)))
        frozenset({'i'})
        >>> changed(journal, Survey(found=FrozenMap(m="1", i="1"), times=FrozenMap(m=8, i=9)))
        frozenset()
    """
    recorded = {
        name: {times[name] for times in (journal.old_times, journal.new_times) if name in times}
        for name in (*journal.old_times, *journal.new_times)
    }
    there = {name: times for name, times in recorded.items() if name in survey.times}
    other = frozenset(name for name, times in there.items() if survey.times[name] not in times)
    waits = any(journal.new_times.get(name) == time for name, time in survey.waiting.items())
    return other if waits or len(other) < len(there) else frozenset()


def _certain(journal: Journal, name: str, survey: Survey) -> Side | None:
    """The side that alone recorded the file which has a name; None where both or neither did."""
    mark = survey.found.get(name), survey.times.get(name)
    old = None not in mark and mark == (journal.old.get(name), journal.old_times.get(name))
    new = None not in mark and mark == (journal.new.get(name), journal.new_times.get(name))
    return None if old == new else "old" if old else "new"


def hidden(journal: Journal, holds: Side) -> frozenset[str]:
    """The files that belong to the other side alone, which no reader may take and the next save removes.

    Example:
        >>> journal = Journal(commit="i", by="rename", head="i", old=FrozenMap({"i": "", "a": ""}),
        ...                   new=FrozenMap({"i": "", "b": ""}))
        >>> hidden(journal, "old"), hidden(journal, "new")
        (frozenset({'b'}), frozenset({'a'}))
    """
    old, new = frozenset(journal.old), frozenset(journal.new)
    return new - old if holds == "old" else old - new


def render_journal(journal: Journal) -> str:
    """A journal as JSON text.

    Example:
        >>> journal = Journal(commit="m", by="rename", head="m", new=FrozenMap({"m": "2"}))
        >>> parse_journal(render_journal(journal).encode()) == journal
        True
    """
    names = {field: dict(getattr(journal, field)) for field in ("old", "new", "parts", "old_times", "new_times")}
    head = {"funcmodel_save": _VERSION, "commit": journal.commit, "by": journal.by, "head": journal.head}
    return json.dumps({**head, **names}, indent=1)


def parse_journal(data: bytes, *, path: str = "", limits: Limits = LIMITS) -> Journal:
    """A journal from the bytes of its file. Like all of a checkpoint they are not trusted.

    Raises:
        CheckpointError: it is no journal; code "JOURNAL" or that of the JSON error.

    Example:
        >>> parse_journal(b'{"funcmodel_save": 1, "commit": "../m", "by": "rename", "head": "m", "new": {"m": ""}}')
        Traceback (most recent call last):
        ...
        funcmodel.errors.CheckpointError: : names '../m'; the journal of a save is damaged
    """

    def fail(code: str, found: str, **fields: Any) -> CheckpointError:
        return CheckpointError(f"{path}: {found}; the journal of a save is damaged", code=code, path=path, **fields)

    if len(data) > limits.index_bytes:
        raise fail("INDEX_TOO_LARGE", f"{len(data)} bytes, at most {limits.index_bytes} are read")
    found = parsed(data, fail, depth=limits.json_depth, digits=limits.int_digits)
    if (
        type(found) is not dict
        or type(found.get("funcmodel_save")) is not int
        or found["funcmodel_save"] not in _READ
        or found.get("by") not in ("rename", "removal")
    ):
        raise fail("JOURNAL", "not what this version writes")
    maps: dict[str, FrozenMap[str, str]] = {}
    for field in ("old", "new", "parts"):
        table = found.get(field, {})
        if type(table) is not dict or not all(type(value) is str for value in table.values()):
            raise fail("JOURNAL", f"{field!r} is no table of texts")
        maps[field] = FrozenMap(table)
    times = {field: found.get(f"{field}_times", {}) for field in ("old", "new")}
    for field, table in times.items():
        if type(table) is not dict or not all(type(t) is int and -_TIMES <= t < _TIMES for t in table.values()):
            raise fail("JOURNAL", f"the times of {field!r} are no table of nanoseconds")
        if not table.keys() <= maps[field].keys():
            raise fail("JOURNAL", f"has times of files that {field!r} does not name")
    if found.get("head") not in maps["new"]:
        raise fail("JOURNAL", "its head is none of the new files")
    for name in (found.get("commit"), *maps["old"], *maps["new"], *maps["parts"]):
        # Indexes may list files of folders below; what a save writes lies in the folder itself, and is never hidden.
        if type(name) is not str or not _inside(name) or ("/" in name and name not in maps["old"]):
            raise fail("JOURNAL", f"names {name!r:.80}")
    for part in maps["parts"].values():
        if not is_part(part.rpartition("/")[2]) or "\0" in part:
            raise fail("JOURNAL", f"waits for {part!r:.80}")
    return Journal(
        commit=found["commit"],
        by=found["by"],
        head=found["head"],
        **maps,
        old_times=FrozenMap(times["old"]),
        new_times=FrozenMap(times["new"]),
    )


def _inside(name: str) -> bool:
    return not any(c in name for c in "\\:\0") and not any(p == "" or p.startswith(".") for p in name.split("/"))
