"""Texts of a format, damaged as a format is damaged: token by token, byte by byte, and spliced with one another."""

import json
import random
import re
import struct
from collections.abc import Sequence

TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9]+|[a-z]+|[\[\]{}:,]|[ \n]+|.', re.DOTALL)
ODD = (
    *(b"0", b"1", b"2", b"4", b"-1", b"-0", b"00", b"1.0", b"4e0", b"9223372036854775807", b"18446744073709551616"),
    *(b"1" * 20, b"1" * 21, b"1" * 5000, b"true", b"null", b"NaN", b"-Infinity", b"{}", b"[]", b"[[]]", b'""', b'"a"'),
    *(b'"\\u0061"', b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\x"', b'"\xff"', b'"\xc3\xa9"', b'"a\\nb"', b'"a\nb"'),
    *(b'"F32"', b'"U8"', b'"F4"', b'"f32"', b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"'),
    *(b'"weight_map"', b'"metadata"', b'"../x.safetensors"', b'"one.safetensors"', b'"two.safetensors"', b'"x"'),
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\t", b"\r\n", b"\0", b"\xef\xbb\xbf", b"[" * 20),
    b"{" * 20,
)


def mutated(text: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """The text after one to three changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        text = _changed(text, others, rng)
    return text


def _changed(text: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    tokens = TOKEN.findall(text) or [b""]
    i, j = sorted((rng.randrange(len(tokens)), rng.randrange(len(tokens))))
    match rng.choice((0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12, 13, 13)):
        case 0:
            tokens[i] = rng.choice(ODD)
        case 1:
            tokens.insert(i, rng.choice(ODD))
        case 2:
            del tokens[i]
        case 3:
            tokens[i], tokens[j] = tokens[j], tokens[i]
        case 4:  # twice, which duplicates keys
            members = _members(tokens)
            a, b = rng.choice(members) if members else (i, j)
            tokens[b:b] = [b",", *tokens[a:b]]
        case 5:  # numbers change places
            at = [k for k, token in enumerate(tokens) if token.lstrip(b"-").isdigit()]
            if len(at) > 1:
                a, b = rng.sample(at, 2)
                tokens[a], tokens[b] = tokens[b], tokens[a]
        case 6:
            at = [k for k, token in enumerate(tokens) if token.isdigit() and len(token) < 30]
            if at:
                k = rng.choice(at)
                tokens[k] = str(int(tokens[k]) + rng.choice((-4, -1, 1, 4, 2**32, 2**63))).encode()
        case 7:  # a letter as its escape
            at = [k for k, token in enumerate(tokens) if len(token) > 2 and token[:1] == b'"' and token.isascii()]
            if at:
                k = rng.choice(at)
                spot = rng.randrange(1, len(tokens[k]) - 1)
                tokens[k] = tokens[k][:spot] + b"\\u%04x" % tokens[k][spot] + tokens[k][spot + 1 :]
        case 8:
            other = TOKEN.findall(rng.choice(others))
            at_other = rng.randrange(len(other))
            return b"".join(tokens[:i] + other[at_other : at_other + rng.randrange(1, 20)] + tokens[j:])
        case 9:
            at_byte = rng.randrange(len(text) + 1)
            return text[:at_byte] if rng.random() < 0.5 else text[:at_byte] + rng.randbytes(2) + text[at_byte:]
        case 10:
            if text:
                flipped = bytearray(text)
                flipped[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
                return bytes(flipped)
        case 12:  # one text for another
            at = [k for k, token in enumerate(tokens) if token[:1] == b'"']
            if at:
                tokens[rng.choice(at)] = rng.choice([token for token in ODD if token[:1] == b'"' != token])
        case 13:  # one number for another
            at = [k for k, token in enumerate(tokens) if token.isdigit()]
            if at:
                tokens[rng.choice(at)] = str(rng.choice((0, 0, 1, 2, 3, 4, 8, 16, 2**31, 2**63, 2**64 - 1))).encode()
        case _:  # whitespace, of which only some is JSON's
            tokens.insert(i, rng.choice((b" ", b"\n", b"\t ", b"\r", b"\x0b", b"\xa0")))
    return b"".join(tokens)


def _members(tokens: Sequence[bytes]) -> list[tuple[int, int]]:
    """From where to where the members of objects stand, among the tokens."""
    found = []
    for start in range(len(tokens) - 1):
        if tokens[start][:1] == b'"' and b":" in tokens[start + 1 : start + 3]:
            depth = 0
            for stop in range(start, len(tokens)):
                depth += (tokens[stop] in (b"{", b"[")) - (tokens[stop] in (b"}", b"]"))
                if depth < 0 or (depth == 0 and tokens[stop] == b","):
                    found.append((start, stop))
                    break
    return found


def framed(header: bytes, data: bytes, rng: random.Random) -> bytes:
    """A file of a header and data, mostly with the right length before them and the right amount of data."""
    drift = rng.choice((0,) * 12 + (1, -1, 8, 2**62))
    grown = data + bytes(rng.choice((0,) * 12 + (1, 4)))
    cut = grown[: len(grown) - rng.choice((0,) * 12 + (1,))]
    return struct.pack("<Q", max(0, len(header) + drift)) + header + cut


def seeds() -> list[tuple[bytes, bytes]]:
    """Headers that are right, laid out in many ways, with their data."""
    kinds = (("F32", 32), ("U8", 8), ("BF16", 16), ("F4", 4), ("BOOL", 8), ("I64", 64), ("F6_E2M3", 6), ("C64", 64))
    shapes: tuple[list[int], ...] = ([2], [], [0, 3], [2, 2], [4, 1, 2])
    found = []
    for count in range(4):
        for layout in range(4):
            header: dict[str, object] = {}
            end = 0
            for i in range(count):
                kind, bits = kinds[(count + 3 * i + layout) % len(kinds)]
                shape = [4] if bits in (4, 6) else shapes[(count + i * layout) % len(shapes)]
                size = bits
                for n in shape:
                    size *= n
                fields = [("dtype", kind), ("shape", shape), ("data_offsets", [end, end + size // 8])]
                end += size // 8
                name = ("a", "layers.0.w", "é", "x" * 30)[(i + layout) % 4]
                header[name] = dict(fields[layout % 3 :] + fields[: layout % 3])
            if layout % 2:
                header["__metadata__"] = {"format": "pt", "b": ""}
            names = list(header)
            names = names[::-1] if layout == 3 else names
            text = json.dumps(
                {n: header[n] for n in names},
                separators=((",", ":"), None, (" , ", " : "), None)[layout],
                ensure_ascii=layout != 1,
                indent=1 if layout == 3 else None,
            ).encode()
            found.append((text + b" " * (layout * 3), bytes(k % 2 for k in range(end))))
    return found
