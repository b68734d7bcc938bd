"""Recorded digests: those that stand in a file's own metadata, and those in a file of JSON beside it."""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final, NamedTuple

from funcmodel.core.limits import LIMITS, Limits
from funcmodel.core.strict_json import parsed
from funcmodel.core.wire import BLANK, DIGEST, is_digest
from funcmodel.errors import DigestError

_ROOM: Final = 48 << 20  # bytes of memory for the digests of any file
_FIELDS: Final = frozenset({"nbytes", "fingerprint", "sha256"})


class Recorded(NamedTuple):
    """The digest of some bytes of a file.

    Attributes:
        start: first byte.
        stop: behind the last byte.
        sha256: in hex.
    """

    start: int
    stop: int
    sha256: str


def digests_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """The digests that metadata records: name to SHA-256 in hex, under the name "" the header's own.

    Example:
        >>> digests_in({"format": "pt", "sha256:w": "ab" * 32, "sha256:v": "w"}) == {"w": "ab" * 32}
        True
    """
    return {name[len(DIGEST) :]: value for name, value in metadata.items() if is_digest(name, value)}


def header_digest(header: bytes, recorded: str = BLANK) -> str:
    """SHA-256, in hex, of a header in which its own digest is blank.

    Args:
        header: the bytes of the file before its data.
        recorded: the digest that the header holds.

    Example:
        >>> header_digest(b"..." + b"f" * 64, "f" * 64) == header_digest(b"..." + b"0" * 64)
        True
    """
    return sha256(header.replace(recorded.encode("ascii"), BLANK.encode("ascii"), 1)).hexdigest()


def render_sidecar(digests: Mapping[str, Recorded], *, nbytes: int, fingerprint: str) -> str:
    """The text of the file that lies beside another and records its digests.

    Args:
        digests: name to what is recorded.
        nbytes: size of the other file in bytes.
        fingerprint: of the other file, so that these are never held against its successor.

    Example:
        >>> print(render_sidecar({}, nbytes=8, fingerprint="00"), end="")
        {
          "nbytes": 8,
          "fingerprint": "00",
          "sha256": {}
        }
    """
    fields = {"nbytes": nbytes, "fingerprint": fingerprint, "sha256": dict(sorted(digests.items()))}
    return json.dumps(fields, indent=2) + "\n"


def parse_sidecar(
    text: bytes, *, path: str, nbytes: int, fingerprint: str, limits: Limits = LIMITS
) -> dict[str, Recorded]:
    """The digests that the file beside another records.

    Args:
        text: what stands in it.
        path: for messages.
        nbytes: size of the other file in bytes.
        fingerprint: of the other file.
        limits: what is accepted.

    Raises:
        DigestError: it is malformed; or it was made for a file of another size or header, code "DIGEST_STALE".

    Example:
        >>> digests = {"w": Recorded(0, 8, "ab" * 32)}
        >>> text = render_sidecar(digests, nbytes=8, fingerprint="00").encode()
        >>> parse_sidecar(text, path="m", nbytes=8, fingerprint="00") == digests
        True
    """

    def fail(code: str, found: str) -> DigestError:
        return DigestError(f"{path}: {found}; record the digests again", code=code, path=path, found=found)

    # Of a tensor, a file says some 100 bytes and this one 150; that they are read takes 1000.
    room = _ROOM + len(text) + nbytes
    value: Any = parsed(text, fail, depth=4, digits=limits.int_digits, room=room)
    if type(value) is not dict or value.keys() != _FIELDS or type(value["sha256"]) is not dict:
        raise fail("DIGEST_FIELDS", f"expected an object with the fields {sorted(_FIELDS)}")
    for name, entry in value["sha256"].items():
        if not _is_entry(entry, nbytes=value["nbytes"]):
            raise fail("DIGEST_FIELDS", f"for {name[:80]!r} expected first byte, last byte and a SHA-256 in hex")
    expected, found = (value["nbytes"], value["fingerprint"]), (nbytes, fingerprint)
    if expected != found:
        what = f"was made for another file (bytes and fingerprint {expected}, found {found})"
        raise DigestError(
            f"{path}: {what}; remove it, or record the digests again",
            code="DIGEST_STALE",
            path=path,
            expected=" ".join(map(str, expected)),
            found=" ".join(map(str, found)),
        )
    return {name: Recorded(*entry) for name, entry in value["sha256"].items()}


def _is_entry(entry: Any, *, nbytes: Any) -> bool:
    if type(entry) is not list or len(entry) != 3 or type(nbytes) is not int:
        return False
    start, stop, digest = entry
    return type(start) is type(stop) is int and 0 <= start <= stop <= nbytes and is_digest(DIGEST, digest)
