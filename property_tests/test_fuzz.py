"""Damaged headers, indexes and folders by the thousand: a record on which safetensors agrees, or a typed error."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import safetensors

from funcmodel.core import headers, index
from funcmodel.core.wire import Limits, parse_header, parse_index
from funcmodel.errors import CheckpointError, HeaderError, TruncatedError
from funcmodel.records.checkpoint import FileSpec, IndexSpec
from funcmodel.records.expressions import Read
from funcmodel.run.scan import scan
from property_tests.strategies.mutations import framed, mutated, seeds

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
# The same inputs on every run, but for the nightly one, which says with which seed it ran.
SEED = random.SystemRandom().randrange(2**32) if NIGHTLY else 0
HEADERS, INDEXES, FOLDERS = (200_000, 50_000, 20_000) if NIGHTLY else (4_000, 1_500, 300)

VALID = seeds()
ONE, TWO = "one.safetensors", "two.safetensors"
INDEX = [
    json.dumps({"metadata": {"total_size": 12}, "weight_map": {"a": ONE, "b": ONE, "c": TWO}}, indent=2).encode(),
    b'{"weight_map":{"a":"one.safetensors","\\u0062":"one.safetensors","c":"two.safetensors"},"more":[1,{"x":null}]}',
    json.dumps({"weight_map": {"a": ONE, "b": ONE, "c": TWO}, "metadata": None}).encode(),
]


def outcome(parse: Callable[..., object], data: bytes) -> object:
    """What is read, or the error; any other exception passes."""
    try:
        return parse(data, path="x")
    except CheckpointError as error:
        found = error
    assert found.code
    assert found.path == "x"
    return found


def damaged(count: int, salt: str) -> Iterator[bytes]:
    rng = random.Random(f"{SEED} {salt}")
    texts = [text for text, _ in VALID]
    for _ in range(count):
        text, data = rng.choice(VALID)
        yield framed(mutated(text, texts, rng), data, rng)


def told(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n: (i["dtype"], tuple(i["shape"]), bytes(i["data"])) for n, i in safetensors.deserialize(data)}


def codes(found: object) -> str:
    return found.code if isinstance(found, CheckpointError) else "accepted"


def test_damaged_headers_are_refused_or_read_as_safetensors_reads_them() -> None:
    """accepted by us => accepted by safetensors, with the same names, dtypes, shapes and bytes."""
    met: Counter[str] = Counter()
    for data in damaged(HEADERS, "headers"):
        found = outcome(parse_header, data)
        met[codes(found)] += 1
        if isinstance(found, FileSpec):
            ours = {
                name: (t.spec.dtype.safetensors, t.spec.shape, data[t.start : t.stop])
                for name, t in found.tensors.items()
            }
            assert ours == told(data), (SEED, data)
        else:
            assert isinstance(found, HeaderError | TruncatedError), (SEED, data)
    print(f"seed {SEED}", dict(met))
    assert met["accepted"] > HEADERS // 50
    assert len(met) > 15  # the damage reaches most rules, not the first one only


def test_the_ways_to_read_a_header_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walked once, walked twice as a large one is, and parsed as JSON: the same records, or an error in each."""
    inputs = list(damaged(HEADERS // 2, "ways"))
    once = [outcome(parse_header, data) for data in inputs]
    # No tensor has a number of 20 digits, but the walk would read one.
    json_value = [outcome(partial(parse_header, limits=Limits(int_digits=19)), data) for data in inputs]
    monkeypatch.setattr(headers, "LARGE", -1)
    monkeypatch.setattr(headers, "SMALL", -1)
    for data, expected, other in zip(inputs, once, json_value, strict=True):
        for found in (other, outcome(parse_header, data)):
            assert isinstance(found, FileSpec) == isinstance(expected, FileSpec), (SEED, data)
            if isinstance(found, FileSpec) and isinstance(expected, FileSpec):
                assert found == expected, (SEED, data)
                assert list(found.tensors) == list(expected.tensors)


def test_damaged_indexes_are_refused_or_read_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accepted weight_map is the one that Python's reader finds; the two ways to read one agree."""
    rng = random.Random(f"{SEED} index")
    met: Counter[str] = Counter()
    for _ in range(INDEXES):
        data = mutated(rng.choice(INDEX), INDEX, rng)
        found = outcome(parse_index, data)
        met[codes(found)] += 1
        if isinstance(found, IndexSpec):
            assert json.loads(data)["weight_map"] == dict(found.weight_map), (SEED, data)
        with monkeypatch.context() as patch:
            patch.setattr(index, "_LARGE", len(data) - 1)
            other = outcome(parse_index, data)
        assert isinstance(other, IndexSpec) == isinstance(found, IndexSpec), (SEED, data)
        assert isinstance(other, CheckpointError) or other == found, (SEED, data)
    print(f"seed {SEED}", dict(met))
    assert met["accepted"] > INDEXES // 50
    assert len(met) > 8


def test_damaged_folders_are_refused_or_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    """Two shards and an index, one of the three damaged."""
    rng = random.Random(f"{SEED} folders")
    entry = '{"dtype":"U8","shape":[2],"data_offsets":[%d,%d]}'
    texts = {
        ONE: f'{{"a":{entry % (0, 2)},"b":{entry % (2, 4)}}}'.encode(),
        TWO: f'{{"c":{entry % (0, 2)}}}'.encode(),
    }
    sound = random.Random()
    sound.choice = lambda options: options[0]  # type: ignore[method-assign]
    met: Counter[str] = Counter()
    for _ in range(FOLDERS):
        victim = rng.choice(("index", "index", ONE, TWO))
        for name, text in texts.items():
            size = b"12341" if name == ONE else b"567"
            data = size[: len(size) - 1]
            whole = framed(mutated(text, list(texts.values()), rng), data, rng) if name == victim else None
            (tmp_path / name).write_bytes(whole or framed(text, data, sound))
        listed = INDEX[rng.randrange(3)]
        (tmp_path / "model.safetensors.index.json").write_bytes(
            mutated(listed, INDEX, rng) if victim == "index" else listed
        )
        try:
            plan = scan(tmp_path)
        except CheckpointError as error:
            met[error.code] += 1
            continue
        met["accepted"] += 1
        for key, read in plan.items():
            assert isinstance(read, Read)
            with safetensors.safe_open(read.file.path, "np") as theirs:
                value = theirs.get_tensor(key)
            with open(read.file.path, "rb") as file:
                file.seek(read.offset)
                assert file.read(read.spec.nbytes) == value.tobytes()
            assert read.spec.shape == value.shape
    print(f"seed {SEED}", dict(met))
    assert met["accepted"] > FOLDERS // 50
    assert len(met) > 8
    assert "" not in met
