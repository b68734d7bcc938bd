"""The safetensors header and the index: bytes to records and back."""

import json
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from funcmodel.core.strict_json import depth_exceeds, parsed
from funcmodel.core.wire import (
    fingerprint,
    header_length,
    parse_header,
    parse_index,
    render_header,
    render_index,
)
from funcmodel.errors import CheckpointError, HeaderError, PlanError
from funcmodel.records.dtypes import DTYPES, FLOAT4
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec

F32 = TensorSpec([2, 3], "float32")


def test_a_header_says_where_each_tensor_lies_in_the_file() -> None:
    data = safetensors.torch.save(
        {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int8)}, {"a": "b"}
    )
    found = parse_header(data, path="m.safetensors")
    assert found.metadata == {"a": "b"}
    assert found.nbytes == len(data)
    assert {k: v.spec for k, v in found.tensors.items()} == {"w": F32, "b": TensorSpec([2], "int8")}
    w = found.tensors["w"]
    assert struct.unpack("<6f", data[w.start : w.stop]) == (0, 1, 2, 3, 4, 5)


def test_only_the_first_bytes_are_needed() -> None:
    data = safetensors.torch.save({"w": torch.ones(1000)})
    n = header_length(data[:8], path="m", nbytes=len(data))
    assert parse_header(data[: 8 + n], path="m", nbytes=len(data)) == parse_header(data, path="m")


def test_the_fingerprint_follows_header_and_size_and_not_the_weights() -> None:
    ones, zeros = safetensors.torch.save({"w": torch.ones(3)}), safetensors.torch.save({"w": torch.zeros(3)})
    renamed, longer = safetensors.torch.save({"v": torch.ones(3)}), safetensors.torch.save({"w": torch.ones(4)})
    prints = [parse_header(data).fingerprint for data in (ones, zeros, renamed, longer)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert fingerprint(b"ab", 5) != fingerprint(b"ab", 6)


def test_render_is_deterministic_aligned_and_sorted_by_metadata_name() -> None:
    entries = {"b": F32, "a": TensorSpec([], "bool")}
    header, at = render_header(entries, {"z": "1", "format": "pt"})
    assert (header, at) == render_header(entries, {"format": "pt", "z": "1"})
    assert len(header) == 4096
    assert dict(at) == {"b": 4096, "a": 4096 + 24}
    assert list(json.loads(header[8:])) == ["__metadata__", "b", "a"]
    assert list(json.loads(header[8:])["__metadata__"]) == ["format", "z"]
    assert len(render_header(entries, {}, align=8)[0]) % 8 == 0


@pytest.mark.parametrize(
    "names", [["plain", "x.0"], ['a"b', "plain"], ["plain", "a\\b"], ["\u00e4", "\u6f22\u5b57", "\u2028"]]
)
def test_a_header_is_the_text_that_json_writes(names: list[str]) -> None:
    kinds = [F32, TensorSpec([], "bool"), TensorSpec([0, 3], "bfloat16"), F32]
    entries = dict(zip(names, kinds, strict=False))
    header, at = render_header(entries, {'"k"': "\u00e4\n"})
    base, value = len(header), {"__metadata__": {'"k"': "\u00e4\n"}}
    for name, spec in entries.items():
        offsets = [at[name] - base, at[name] - base + spec.nbytes]
        value[name] = {"dtype": spec.dtype.safetensors, "shape": list(spec.shape), "data_offsets": offsets}
    assert header[8:].rstrip(b" ") == json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class Name(str):
    def __format__(self, _: str) -> str:
        return "other words"


def test_a_name_that_is_more_than_text_is_written_as_the_text_it_is() -> None:
    header, _ = render_header({Name("w.a"): F32}, {})
    assert [*json.loads(header[8:])] == ["w.a"]


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.safetensors], ids=lambda d: d.name)
def test_safetensors_reads_every_dtype_that_we_write(dtype: object) -> None:
    spec = TensorSpec([2, 4], dtype)
    header, at = render_header({"w": spec}, {})
    data = bytes(range(spec.nbytes))
    ((name, info),) = safetensors.deserialize(header + data)
    assert (name, info["dtype"], tuple(info["shape"]), bytes(info["data"])) == (
        "w",
        spec.dtype.safetensors,
        (2, 4),
        data,
    )
    assert at["w"] == len(header)


@pytest.mark.parametrize(
    ("name", "spec", "code"),
    [
        ("w", TensorSpec([1], "complex128"), "DTYPE"),
        ("w", TensorSpec([3], FLOAT4), "SUBBYTE_ALIGN"),
        ("w", TensorSpec([1] * 65, "bool"), "NDIM"),
        ("", F32, "NAME_EMPTY"),
        ("a\n", F32, "NAME_CONTROL"),
        ("a" * 5000, F32, "NAME_TOO_LONG"),
        ("\ud800", F32, "BAD_UTF8"),
        ("__metadata__", F32, "NAME_RESERVED"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isupper() else "",
)
def test_what_no_reader_would_take_is_not_rendered(name: str, spec: TensorSpec, code: str) -> None:
    with pytest.raises(PlanError) as caught:
        render_header({"before": TensorSpec([], "bool"), name: spec, "behind": F32}, {})
    assert (caught.value.code, caught.value.keys) == (code, (name,))  # type: ignore[attr-defined]


def test_metadata_with_half_a_character_is_not_rendered() -> None:
    with pytest.raises(PlanError):
        render_header({}, {"a": "\udc80"})


def test_a_header_larger_than_readers_take_is_not_rendered() -> None:
    with pytest.raises(PlanError):
        render_header({"w": F32}, {"note": "x" * 100_000_000})


def test_more_than_the_header_is_missing() -> None:
    data = safetensors.torch.save({"w": torch.ones(3)})
    with pytest.raises(CheckpointError) as caught:
        parse_header(data[:20], path="m", nbytes=len(data))
    assert caught.value.code == "TRUNCATED"


def test_an_error_names_the_tensor() -> None:
    body = b'{"layers.3.w":{"dtype":"F33","shape":[0],"data_offsets":[0,0]}}'
    with pytest.raises(HeaderError) as caught:
        parse_header(struct.pack("<Q", len(body)) + body, path="m")
    assert (caught.value.code, caught.value.key, caught.value.path) == ("DTYPE", "layers.3.w", "m")


# -- the index -------------------------------------------------------------------------------------------------------

SHARDS = {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}


def test_an_index_comes_back() -> None:
    text = render_index(SHARDS, FrozenMap({"total_size": 12, "note": (1, None)}))
    found = parse_index(text.encode(), path="i.json")
    assert list(json.loads(text)["weight_map"]) == ["a", "b"]
    assert found.weight_map == SHARDS
    assert found.metadata == {"total_size": 12, "note": (1, None)}
    assert (found.path, found.nbytes) == ("i.json", len(text))


def test_an_index_is_laid_out_as_transformers_lays_it_out(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        )
    )
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    theirs = (tmp_path / "model.safetensors.index.json").read_text("utf-8")
    found = parse_index(theirs.encode())
    assert render_index(found.weight_map, found.metadata) == theirs


@pytest.mark.parametrize("metadata", ["", '"metadata": null,', '"metadata": {},', '"more": [1],'])
def test_metadata_of_an_index_may_be_absent(metadata: str) -> None:
    found = parse_index(f'{{{metadata} "weight_map": {json.dumps(SHARDS)}}}'.encode())
    assert found.metadata == {}
    assert list(found.weight_map) == ["b", "a"]


def test_keys_of_one_shard_share_one_text() -> None:
    names = {f"k{i}": f"model-{i % 2}.safetensors" for i in range(10)}
    found = parse_index(render_index(names).encode())
    assert len({id(shard) for shard in found.weight_map.values()}) == 2


# -- strict JSON -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("0", 0),
        ("[]", 1),
        ("{}", 1),
        ("[[],[]]", 2),
        ('{"a":[[]]}', 3),
        ("[{},[{}]]", 3),
        ('"[[["', 0),
        ('["]]]", "[{"]', 1),
        (r'["\"[[["]', 1),
        (r'["\\",["\\\"["]]', 2),
        ('{"[":{"]":["{"]}}', 3),
        (r'["\\", "["]', 1),
        ("[[[", 3),
        ("]]]", 0),
    ],
)
def test_depth_is_known_before_parsing(text: str, depth: int) -> None:
    assert not depth_exceeds(text.encode(), depth)
    assert depth == 0 or depth_exceeds(text.encode(), depth - 1)


def test_strict_json_reads_what_json_reads() -> None:
    value = {"a": [1, -2, 3.5, -0.5, 1e300, True, None, "é\n\U0001f600"], "-0": {"": "00000000000000000000000000"}}
    for ascii_ in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_).encode()
        assert parsed(text, lambda code, found: CheckpointError(found, code=code)) == value
