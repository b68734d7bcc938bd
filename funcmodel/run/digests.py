"""Digests of stored bytes: computed in bounded memory, and compared with what is recorded of them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Final, TypeAlias

from attrs import evolve, frozen

from funcmodel.core.digests import Recorded, digests_in, header_digest, parse_sidecar
from funcmodel.core.folder import SIDECAR
from funcmodel.core.limits import LIMITS, Limits, accepted
from funcmodel.core.lowering import nodes
from funcmodel.errors import CheckpointError, DigestError
from funcmodel.records.checkpoint import FileSpec, StoredTensor
from funcmodel.records.expressions import Expr, FileRef, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.reports import Damage
from funcmodel.run.files import Digest, Hashed, SourceFile, open_regular
from funcmodel.run.formats import Format, format_named

Reader: TypeAlias = Callable[[Sequence[memoryview], int], None]
"""Fills buffers, one after the other, with a file's bytes from an offset on, as tensors hold them."""

_BLOCK: Final = 4 << 20  # bytes that a thread holds
_THREADS: Final = 8
_THREADED: Final = 1 << 20  # less than this is not worth a thread
_BLOBS: Final = "blobs"
_HEX: Final = frozenset("0123456789abcdef")


@frozen
class Span:
    """Stored bytes that should have a digest.

    Attributes:
        expected: the digest, and where it belongs.
        read: reads the file.
        start: first byte.
        stop: behind the last byte.
    """

    expected: Damage
    read: Reader
    start: int
    stop: int


@frozen
class Known:
    """What is known of one file's bytes without reading them.

    Attributes:
        tensors: name to place and digest.
        whole: the digest of the file, where its name is its digest.
        damage: what is wrong with the records themselves, and with the header if they stand there.
        inside: whether they stand in the file.
    """

    tensors: Mapping[str, Recorded] = FrozenMap()
    whole: str | None = None
    damage: tuple[Damage, ...] = ()
    inside: bool = False


def known(file: SourceFile, ref: FileRef, spec: FileSpec | None, limits: Limits = LIMITS) -> Known:
    """What is recorded of an open file: in its header, else beside it; and by its name in a cache.

    Args:
        file: the file.
        ref: what it was planned as.
        spec: what its header says; None for a format that has no place for digests.
        limits: what is accepted of a file beside it.
    """
    whole = _blob(file)
    inside = {} if spec is None else digests_in(spec.metadata)
    # Somebody else's metadata may hold one such entry, but hardly one that names a tensor.
    if spec is not None and not inside.keys().isdisjoint(("", *spec.tensors)):
        tensors = {
            name: Recorded(at.start, at.stop, inside[name]) for name, at in spec.tensors.items() if name in inside
        }
        return Known(tensors, whole, _header_damage(file, spec, inside.get("")), inside=True)
    side = file.path + SIDECAR
    if not os.path.lexists(side):
        return Known(whole=whole)
    try:
        with open_regular(side, root=os.path.dirname(file.path) or os.curdir) as beside:
            if beside.nbytes > limits.index_bytes:
                raise DigestError(
                    f"{side}: {beside.nbytes} bytes, at most {limits.index_bytes} are read; if you trust it, pass "
                    "limits=fm.Limits(index_bytes=...) to verify",
                    code="INDEX_TOO_LARGE",
                    path=side,
                    expected=f"at most {limits.index_bytes} bytes",
                    found=f"{beside.nbytes} bytes",
                )
            text = beside.read(0, beside.nbytes)
        found = parse_sidecar(text, path=side, nbytes=ref.nbytes, fingerprint=ref.fingerprint, limits=limits)
    except DigestError as error:
        expected, other = error.fields.get("expected"), error.fields.get("found")
        damaged = file.path if error.code == "DIGEST_STALE" else side
        return Known(whole=whole, damage=(Damage(damaged, None, error.code, expected, other),))
    return Known(found, whole)


def _blob(file: SourceFile) -> str | None:
    """The digest by which huggingface_hub names a large file; smaller ones have git's name, which is another hash."""
    target = os.path.realpath(file.path)
    name = os.path.basename(target)
    if os.path.basename(os.path.dirname(target)) != _BLOBS or len(name) != 64 or not _HEX.issuperset(name):
        return None
    found = os.stat(target)
    return name if (found.st_dev, found.st_ino) == file.identity[:2] else None


def _header_damage(file: SourceFile, spec: FileSpec, expected: str | None) -> tuple[Damage, ...]:
    header = file.read(0, min((stored.start for stored in spec.tensors.values()), default=file.nbytes))
    if expected is None:  # a file with digests was written with this one too
        return (Damage(file.path, None, "DIGEST", None, sha256(header).hexdigest()),)
    found = header_digest(header, expected)
    return () if found == expected else (Damage(file.path, None, "DIGEST", expected, found),)


# -- comparing ---------------------------------------------------------------------------------------------------------


def check_reads(
    exprs: Iterable[Expr],
    files: Mapping[FileRef, tuple[SourceFile, Reader]],
    formats: tuple[Format, ...],
    digest: Digest,
) -> None:
    """Compare every stored tensor of which `exprs` read anything with its digest.

    Args:
        exprs: what will be read.
        files: every file that they read, open.
        formats: the formats that files may have.
        digest: "check", or a `Hashed`, which then knows what was compared.

    Raises:
        DigestError: bytes differ, or nothing is recorded of them; `findings` has them all.
        ValueError: `digest` is no choice.
    """
    if digest != "check" and not isinstance(digest, Hashed):
        raise ValueError(f"digest must be 'ignore' or 'check', found {digest!r}")
    sound = digest.sound if isinstance(digest, Hashed) else set()
    wanted: dict[FileRef, dict[tuple[str, int, int], None]] = {}
    for expr in exprs:
        for node in nodes(expr):
            if type(node) is Read:
                wanted.setdefault(node.file, {})[node.name, node.offset, node.offset + node.spec.nbytes] = None
    damage: list[Damage] = []
    spans: list[Span] = []
    for ref, reads in wanted.items():
        file, read = files[ref]
        new = [one for one in reads if (file.identity, *one) not in sound]
        if new:
            found, compared = _to_compare(file, read, ref, format_named(ref.format, formats), new)
            damage += found
            spans += compared
    damage += differing(spans)
    if damage:
        raise failure(damage)
    sound.update((files[ref][0].identity, *one) for ref, reads in wanted.items() for one in reads)


def _to_compare(
    file: SourceFile, read: Reader, ref: FileRef, format_: Format, reads: Iterable[tuple[str, int, int]]
) -> tuple[list[Damage], list[Span]]:
    """What already is wrong with a file, and what of it must be hashed, for these names and places."""
    # Its fingerprint is that of the plan: whoever scanned it accepted this header, under whatever limits.
    found = known(file, ref, format_.scan(file, accepted(file.nbytes)) if format_.write is not None else None)
    broken = any(one.code != "DIGEST" for one in found.damage)  # then what is missing was told
    missing: list[Damage] = []
    spans: dict[str | None, Span] = {}
    for name, start, stop in reads:
        at = found.tensors.get(name)
        if at is not None and at.start <= start <= stop <= at.stop:
            spans[name] = span(file, read, name, at)
        elif found.whole is not None:
            spans[None] = whole_span(file, found.whole)
        elif not broken:
            missing.append(Damage(file.path, name, "DIGEST_MISSING"))
    if missing and format_.verify is not None:
        missing = own_check(file, format_)
    return [*found.damage, *missing], list(spans.values())


def own_check(file: SourceFile, format_: Format) -> list[Damage]:
    """What a format finds that holds checksums of its own."""
    try:
        return [] if format_.verify is None else list(format_.verify(file))
    except CheckpointError as error:
        keys = error.fields.get("keys") or (error.fields.get("key"),)
        return [Damage(file.path, key, error.code) for key in keys]


def span(file: SourceFile, read: Reader, name: str, at: Recorded) -> Span:
    """The bytes of one stored tensor, and the digest that they should have."""
    return Span(Damage(file.path, name, "DIGEST", at.sha256), read, at.start, at.stop)


def whole_span(file: SourceFile, digest: str) -> Span:
    """All bytes of a file, and the digest that they should have."""
    return Span(Damage(file.path, None, "DIGEST", digest), file.readv_into, 0, file.nbytes)


def differing(spans: Sequence[Span]) -> list[Damage]:
    """Those whose bytes have another digest."""
    return [
        evolve(one.expected, found=found)
        for one, found in zip(spans, hashes(spans), strict=True)
        if found != one.expected.expected
    ]


_ORDER: Final = ("DIGEST_STALE", "DIGEST_MISSING")


def failure(damage: Iterable[Damage]) -> DigestError:
    """The error that tells everything that was found, what differs first."""
    found = sorted(damage, key=lambda one: _ORDER.index(one.code) if one.code in _ORDER else -1)
    lines = [_told(one) for one in found[:8]]
    if len(found) > 8:
        lines.append(f"and {len(found) - 8} more")
    first = found[0]
    return DigestError(
        "\n".join(lines),
        code=first.code,
        path=first.file,
        file=first.file,
        tensor=first.tensor,
        expected=first.expected,
        found=first.found,
        findings=tuple(found),
    )


def _told(one: Damage) -> str:
    what = "the file or its header" if one.tensor is None else f"tensor {one.tensor[:120]!r}"
    match one.code:
        case "DIGEST":
            text = (
                f"{what} has the SHA-256 {one.found}, recorded is {one.expected}: its bytes changed since; download or "
                "save it again"
            )
        case "DIGEST_MISSING":
            text = (
                f"no digest is recorded of {what}; save with digests='sha256', or, if you trust the file, "
                "record_digests(path)"
            )
        case "DIGEST_STALE":
            text = (
                f"the digests beside it, in {one.file}{SIDECAR}, are of another file (bytes and fingerprint "
                f"{one.expected}, found {one.found}); remove them, or record_digests(path)"
            )
        case "BIN_CRC":
            text = (
                f"{what} lies in a record whose checksum is not the one in the zip's directory (expected "
                f"{one.expected}, found {one.found}); download or save it again"
            )
        case _ if one.file.endswith(SIDECAR):
            expected = "" if one.expected is None else f", expected {one.expected}"
            text = f"holds no digests ({one.code}: {one.found}{expected}); remove it, or record_digests(path)"
        case _:
            text = f"{what}: {one.code}; download or save it again"
    return f"{one.file}: {text}"


# -- hashing -----------------------------------------------------------------------------------------------------------


def hashes(spans: Sequence[Span]) -> list[str]:
    """SHA-256, in hex, of each; read once, in a few threads, each of which holds 4 MiB."""
    runs = list(_runs(spans))
    buffers: deque[memoryview] = deque()

    def hashed(run: Sequence[Span]) -> list[str]:
        size = min(_BLOCK, run[-1].stop - run[0].start)
        try:
            buffer = buffers.pop()
        except IndexError:
            buffer = memoryview(bytearray(_BLOCK if len(runs) > 1 else size))
        found = _hash_run(run, buffer)
        buffers.append(buffer)
        return found

    if len(runs) < 2 or sum(one.stop - one.start for one in spans) < _THREADED:
        return [digest for run in runs for digest in hashed(run)]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1, len(runs))) as pool:
        return [digest for digests in pool.map(hashed, runs) for digest in digests]


def _runs(spans: Sequence[Span]) -> Iterator[Sequence[Span]]:
    """Neighbors in a file together, up to what a thread holds; what is larger alone."""
    first = 0
    for at in range(1, len(spans) + 1):
        if at < len(spans):
            last, one = spans[at - 1], spans[at]
            near = one.start == last.stop and one.expected.file == last.expected.file
            if near and one.stop - spans[first].start <= _BLOCK:
                continue
        yield spans[first:at]
        first = at


def _hash_run(run: Sequence[Span], buffer: memoryview) -> list[str]:
    read, start, stop = run[0].read, run[0].start, run[-1].stop
    if stop - start <= len(buffer):
        read([buffer[: stop - start]], start)
        return [sha256(buffer[one.start - start : one.stop - start]).hexdigest() for one in run]
    digest = sha256()
    for at in range(start, stop, len(buffer)):
        part = buffer[: min(len(buffer), stop - at)]
        read([part], at)
        digest.update(part)
    return [digest.hexdigest()]


# -- hashing what is written -------------------------------------------------------------------------------------------


def hashing(
    batches: Iterator[list[memoryview]], tensors: Mapping[str, StoredTensor], found: dict[str, str]
) -> Iterator[list[memoryview]]:
    """The same batches, each hashed by a thread while the caller writes it.

    Args:
        batches: the bytes of the tensors, in order, cut anywhere.
        tensors: name to where each belongs.
        found: receives name to SHA-256 in hex, when the batches have ended.
    """
    running = _Running(tensors, found)
    with ThreadPoolExecutor(1) as pool:
        for batch in batches:
            waiting = pool.submit(running.update, batch)
            yield batch
            waiting.result()
            del batch, waiting  # they hold a tensor, and the next one is made when the loop goes on
    running.finish()


class _Running:
    """Cuts a stream of bytes where its tensors end."""

    def __init__(self, tensors: Mapping[str, StoredTensor], found: dict[str, str]) -> None:
        self._waiting = iter(tensors.items())
        self._found = found
        self._name = ""
        self._left = 0
        self._digest = sha256()

    def update(self, batch: list[memoryview]) -> None:
        for view in batch:
            at = 0
            while at < len(view):
                while not self._left:
                    self._next(*next(self._waiting))
                part = view[at : at + self._left]
                self._digest.update(part)
                at += len(part)
                self._left -= len(part)
                if not self._left:
                    self._found[self._name] = self._digest.hexdigest()

    def finish(self) -> None:
        for name, stored in self._waiting:
            self._next(name, stored)

    def _next(self, name: str, stored: StoredTensor) -> None:
        self._name, self._left, self._digest = name, stored.stop - stored.start, sha256()
        if not self._left:
            self._found[name] = self._digest.hexdigest()
