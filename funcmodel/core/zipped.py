"""Zip archives as torch writes them, read strictly: where each record's bytes stand, and that nothing is said twice.

A zip says everything twice, in a directory at its end and in a header before each record, and readers differ in which
one they believe. Here both must say the same, records must be stored as they are, and no two may share a byte.
"""

from collections.abc import Sequence
from struct import Struct
from typing import Final

from attrs import frozen

from funcmodel.core.strict_json import Fail

_END: Final = Struct("<4s4H2LH")
_END_64: Final = Struct("<4sQ2H2L4Q")
_LOCATOR: Final = Struct("<4sLQL")
_ENTRY: Final = Struct("<4s6H3L5H2L")
_LOCAL: Final = Struct("<4s5H3L2H")
_U16, _U32 = 0xFFFF, 0xFFFFFFFF
_STREAMED: Final = 1 << 3  # sizes and checksum stand behind the data, and in the directory
_FOLDER: Final = 1 << 4
_ENCRYPTED: Final = 1 << 0 | 1 << 6 | 1 << 13
LONGEST_END: Final = _END.size + _U16 + _LOCATOR.size + _END_64.size
"""Bytes at the end of a file among which the records that end a zip are found."""
LONGEST_ENTRY: Final = _ENTRY.size + 3 * _U16
"""Most bytes that the directory of a zip says of one record."""


@frozen(kw_only=True)
class Directory:
    """Where the directory of a zip stands, in bytes from the start of the file."""

    start: int
    stop: int
    count: int
    end: bytes


@frozen(kw_only=True)
class Member:
    """A record as the directory describes it; `offset` is of its header, in bytes from the start of the file.

    `method` is how its bytes are compressed, 0 where they are not.
    """

    name: str
    raw: bytes
    offset: int
    nbytes: int
    crc: int
    flags: int
    method: int = 0


def find_directory(tail: bytes, *, nbytes: int, fail: Fail) -> Directory:
    """The directory of a zip, from the last bytes of the file. Bytes behind the zip are tolerated, as torch does.

    Args:
        tail: the last `LONGEST_END` bytes of the file, or all of it.
        nbytes: size of the file in bytes.
        fail: makes the error that is raised, of a code and words.

    Raises:
        CheckpointError: as `fail` makes it; codes "BIN_NOT_ZIP", "BIN_ZIP".

    Example:
        >>> import io, zipfile
        >>> data = io.BytesIO()
        >>> with zipfile.ZipFile(data, "w") as archive:
        ...     archive.writestr("a/b", b"1234")
        >>> found = find_directory(data.getvalue(), nbytes=len(data.getvalue()), fail=None)
        >>> found.start, found.stop, found.count
        (37, 86, 1)
    """
    base = nbytes - len(tail)
    at = tail.rfind(b"PK\5\6", 0, max(len(tail) - _END.size + 4, 0))
    if at < 0:
        raise fail("BIN_NOT_ZIP", f"{nbytes} bytes without the end of a zip")
    _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(tail, at)
    if disk or first_disk or here != count or at + _END.size + comment > len(tail):
        raise fail("BIN_ZIP", "the end of its zip speaks of several disks, or of more bytes than there are")
    stop = base + at
    locator = at - _LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        stop, small = base + locator - _END_64.size, (count, size, start)
        count, size, start = _end_64(tail, locator, base, fail)
        most = (_U16, _U32, _U32)
        if any(a not in (b, m) for a, b, m in zip(small, (count, size, start), most, strict=True)):
            raise fail("BIN_ZIP", "the two records at the end of its zip contradict each other")
    if start + size != stop:
        raise fail("BIN_ZIP", f"its directory is said to end at byte {start + size} and ends at byte {stop}")
    if count * _ENTRY.size > size:
        raise fail("BIN_ZIP", f"its directory of {size} bytes cannot hold {count} records")
    return Directory(start=start, stop=stop, count=count, end=tail[stop - base : at + _END.size])


def _end_64(tail: bytes, locator: int, base: int, fail: Fail) -> tuple[int, int, int]:
    _, disk, where, disks = _LOCATOR.unpack_from(tail, locator)
    at = locator - _END_64.size
    if at < 0 or where != base + at or disk or disks != 1:
        raise fail("BIN_ZIP", f"the 64-bit record at the end of its zip is said to stand at byte {where} and does not")
    magic, length, _, _, disk, first_disk, here, count, size, start = _END_64.unpack_from(tail, at)
    if magic != b"PK\6\6" or length != _END_64.size - 12 or disk or first_disk or here != count:
        raise fail("BIN_ZIP", "the 64-bit record at the end of its zip is none, or speaks of several disks")
    return count, size, start


def members(data: bytes, directory: Directory, fail: Fail) -> tuple[Member, ...]:
    """The records of a zip, in the order of its directory.

    Args:
        data: the bytes from `directory.start` to `directory.stop`.
        directory: what `find_directory` found.
        fail: makes the error that is raised, of a code and words.

    Raises:
        CheckpointError: as `fail` makes it; codes "BIN_ZIP", "BIN_ENCRYPTED", "BIN_RECORD_NAME",
            "BIN_DUPLICATE_RECORD".

    Example:
        >>> import io, zipfile
        >>> data = io.BytesIO()
        >>> with zipfile.ZipFile(data, "w") as archive:
        ...     archive.writestr("a/b", b"1234")
        >>> directory = find_directory(data.getvalue(), nbytes=len(data.getvalue()), fail=None)
        >>> [(m.name, m.nbytes) for m in members(data.getvalue()[directory.start : directory.stop], directory, None)]
        [('a/b', 4)]
    """
    found: list[Member] = []
    names: set[str] = set()
    at = 0
    for _ in range(directory.count):
        member, at = member_at(data, at, directory, fail)
        key = member.name.lower()  # torch looks records up without regard to case
        if key in names:
            raise fail("BIN_DUPLICATE_RECORD", f"its zip holds {member.name[:200]!r} twice")
        names.add(key)
        found.append(member)
    if at != len(data):
        raise fail("BIN_ZIP", f"its directory has {len(data) - at} bytes more than its records need")
    return tuple(found)


def member_at(
    data: bytes, at: int, directory: Directory, fail: Fail, *, first: int | None = None
) -> tuple[Member, int]:
    """One record of a zip, and where in `data` the next one begins.

    Args:
        data: bytes of the directory, with the whole entry among them; no entry is longer than `LONGEST_ENTRY`.
        at: where in `data` the entry begins.
        directory: what `find_directory` found.
        fail: makes the error that is raised, of a code and words.
        first: where in the file `data` begins; None for the start of the directory.

    Raises:
        CheckpointError: as `fail` makes it; codes "BIN_ZIP", "BIN_ENCRYPTED", "BIN_RECORD_NAME".

    Example:
        >>> import io, zipfile
        >>> data = io.BytesIO()
        >>> with zipfile.ZipFile(data, "w") as archive:
        ...     archive.writestr("a/b", b"1234")
        >>> directory = find_directory(data.getvalue(), nbytes=len(data.getvalue()), fail=None)
        >>> member, stop = member_at(data.getvalue()[directory.start : directory.stop], 0, directory, None)
        >>> member.name, stop
        ('a/b', 49)
    """
    if at + _ENTRY.size > len(data) or data[at : at + 4] != b"PK\1\2":
        start = directory.start if first is None else first
        raise fail("BIN_ZIP", f"its directory breaks off at byte {start + at}")
    fields = _ENTRY.unpack_from(data, at)
    (flags, method), (crc, packed, nbytes), (name_size, extra_size) = fields[3:5], fields[7:10], fields[10:12]
    comment_size, disk, attributes, offset = fields[12], fields[13], fields[15], fields[16]
    at += _ENTRY.size
    stop = at + name_size + extra_size + comment_size
    if stop > len(data):
        raise fail("BIN_ZIP", f"its directory breaks off at byte {directory.stop}")
    raw, extra = data[at : at + name_size], data[at + name_size : at + name_size + extra_size]
    name = _name(raw, fail)
    if flags & _ENCRYPTED:
        raise fail("BIN_ENCRYPTED", f"its record {name!r} is encrypted")
    nbytes, packed, offset, disk = _wide(extra, (nbytes, packed, offset, disk), name, fail)
    if attributes & _FOLDER:  # torch.load then fills the tensor with whatever its memory holds
        raise fail("BIN_ZIP", f"its record {name!r} is marked as a folder")
    if (packed != nbytes and not method) or disk:
        raise fail("BIN_ZIP", f"its record {name!r} has {nbytes} bytes stored in {packed}, or lies on another disk")
    if offset + _LOCAL.size + name_size + packed > directory.start:
        raise fail("BIN_ZIP", f"its record {name!r} ends behind byte {directory.start}, where the directory starts")
    return Member(name=name, raw=raw, offset=offset, nbytes=nbytes, crc=crc, flags=flags, method=method), stop


def _name(raw: bytes, fail: Fail) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise fail("BIN_RECORD_NAME", f"the record name {raw[:80]!r} is not UTF-8") from None
    wrong = not name.isprintable() or "\\" in name or ":" in name
    if wrong or "/" not in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise fail("BIN_RECORD_NAME", f"the record name {name[:80]!r} is no path inside one folder")
    return name


def _wide(extra: bytes, small: tuple[int, int, int, int], name: str, fail: Fail) -> list[int]:
    """The sizes, the offset and the disk, of which those too large for their fields stand in the extra field."""
    wanted = [value == most for value, most in zip(small, (_U32, _U32, _U32, _U16), strict=True)]
    found, at, seen = list(small), 0, False
    while at < len(extra):
        kind, size = int.from_bytes(extra[at : at + 2], "little"), int.from_bytes(extra[at + 2 : at + 4], "little")
        at += 4
        if at + size > len(extra):
            raise fail("BIN_ZIP", f"the extra field of its record {name!r} breaks off")
        if kind == 1:
            widths = [4 if i == 3 else 8 for i in range(4) if wanted[i]]
            if seen or size != sum(widths):
                raise fail("BIN_ZIP", f"its record {name!r} has 64-bit sizes that it does not need, or lacks them")
            seen, here = True, at
            for i in (i for i in range(4) if wanted[i]):
                width = 4 if i == 3 else 8
                found[i] = int.from_bytes(extra[here : here + width], "little")
                here += width
        at += size
    if any(wanted) and not seen:
        raise fail("BIN_ZIP", f"its record {name!r} lacks the 64-bit sizes that it needs")
    return found


def local_bytes(member: Member) -> int:
    """How many bytes from its `offset` on `data_start` needs.

    Example:
        >>> local_bytes(Member(name="a/b", raw=b"a/b", offset=0, nbytes=4, crc=0, flags=0))
        33
    """
    return _LOCAL.size + len(member.raw)


def data_start(header: bytes, member: Member, fail: Fail) -> int:
    """Where the bytes of a record start, from the header before them, which must say what the directory says.

    Args:
        header: `local_bytes(member)` bytes from `member.offset` on.
        member: the record.
        fail: makes the error that is raised, of a code and words.

    Raises:
        CheckpointError: as `fail` makes it; codes "BIN_LOCAL_HEADER", "BIN_COMPRESSED".

    Example:
        >>> import io, zipfile
        >>> data = io.BytesIO()
        >>> with zipfile.ZipFile(data, "w") as archive:
        ...     archive.writestr("a/b", b"1234")
        >>> directory = find_directory(data.getvalue(), nbytes=len(data.getvalue()), fail=None)
        >>> (member,) = members(data.getvalue()[directory.start : directory.stop], directory, None)
        >>> data_start(data.getvalue()[: local_bytes(member)], member, None)
        33
    """
    magic, _, flags, method, _, _, crc, packed, nbytes, name_size, extra_size = _LOCAL.unpack_from(header)
    expected = (member.crc, member.nbytes, member.nbytes)
    sizes = (expected, (member.crc, _U32, _U32)) if member.nbytes >= _U32 else (expected,)
    same = (crc, packed, nbytes) in sizes or (flags & _STREAMED and (crc, packed, nbytes) == (0, 0, 0))
    named = name_size == len(member.raw) and header[_LOCAL.size :] == member.raw
    if member.method:
        raise fail("BIN_COMPRESSED", f"its record {member.name!r} is compressed, torch.save stores records as they are")
    if magic != b"PK\3\4" or flags != member.flags or method or not same or not named:
        raise fail("BIN_LOCAL_HEADER", f"the header of its record {member.name!r} contradicts the directory")
    return member.offset + local_bytes(member) + int(extra_size)


def check_apart(starts: Sequence[tuple[Member, int]], directory: Directory, fail: Fail) -> None:
    """Refuse records that share bytes with one another or with the directory.

    Args:
        starts: records and where their bytes start.
        directory: of the zip.
        fail: makes the error that is raised, of a code and words.

    Raises:
        CheckpointError: as `fail` makes it; code "BIN_OVERLAP".

    Example:
        >>> member = Member(name="a/b", raw=b"a/b", offset=0, nbytes=4, crc=0, flags=0)
        >>> check_apart([(member, 33)], Directory(start=37, stop=86, count=1, end=b""), None)
    """
    end = 0
    for member, start in sorted(starts, key=lambda pair: pair[0].offset):
        if member.offset < end:
            raise fail("BIN_OVERLAP", f"its record {member.name!r} starts at byte {member.offset}, inside another one")
        end = start + member.nbytes
    if end > directory.start:
        raise fail("BIN_OVERLAP", f"its records end at byte {end}, inside the directory at byte {directory.start}")
