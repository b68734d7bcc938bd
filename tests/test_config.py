"""`config.json` to a record and back, byte for byte."""

import json
from pathlib import Path

import attrs
import pytest

from funcmodel.core.wire import parse_config, render_config
from funcmodel.errors import CheckpointError
from funcmodel.records.config import Config
from funcmodel.records.dtypes import BFLOAT16
from funcmodel.records.mapping import FrozenMap

FIELDS = {
    "zeta": 1,
    "architectures": ["MyModel"],
    "model_type": "mine",
    "torch_dtype": "bfloat16",
    "name": "Élan \u4e2d\U0001f600",
    "nothing": None,
    "mine": {"deep": [1, [2.5, {"x": -0.0}], 1e-05, 1e22], "empty": {}, "none": []},
    "alpha": float("inf"),
    "large": 1000000000000000019884624838656,
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
@pytest.mark.parametrize("ascii_", [False, True])
@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("sort", [False, True])
def test_what_python_wrote_comes_back(indent: int | str | None, ascii_: bool, ending: str, sort: bool) -> None:
    text = json.dumps(FIELDS, indent=indent, ensure_ascii=ascii_, sort_keys=sort) + ending
    config = parse_config(text)
    assert render_config(config) == text
    assert parse_config(text.encode()) == config
    assert list(config) == (sorted(FIELDS) if sort else list(FIELDS))
    assert config == Config(FIELDS)


def test_windows_line_ends_and_compact_text_come_back() -> None:
    for text in (
        json.dumps(FIELDS, indent=2).replace("\n", "\r\n") + "\r\n",
        json.dumps(FIELDS, separators=(",", ":")),
    ):
        assert render_config(parse_config(text)) == text


def test_a_field_with_a_line_break_keeps_it_under_windows_line_ends() -> None:
    text = '{\r\n  "a": "x\\ny"\r\n}\r\n'
    config = parse_config(text)
    assert config["a"] == "x\ny"
    assert render_config(config) == text


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "mamba2", "t5"])
def test_what_transformers_wrote_comes_back(model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type)
    config.mine = {"unknown": [None, "é"]}
    config.save_pretrained(tmp_path)
    raw = (tmp_path / "config.json").read_bytes()
    found = parse_config(raw)
    assert render_config(found).encode() == raw
    assert found.model_type == model_type
    assert found["mine"] == FrozenMap(unknown=(None, "é"))


def test_known_fields() -> None:
    config = parse_config(json.dumps(FIELDS))
    assert config.model_type == "mine"
    assert config.architectures == ("MyModel",)
    assert config.dtype is BFLOAT16
    assert config.tie_word_embeddings is False
    assert config.quantization_config == {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ('{"dtype": "bfloat16", "torch_dtype": "float32"}', "bfloat16"),
        ('{"torch_dtype": "float16"}', "float16"),
        ('{"torch_dtype": "auto"}', None),
        ('{"torch_dtype": null}', None),
        ("{}", None),
    ],
)
def test_the_two_spellings_of_dtype(text: str, dtype: str | None) -> None:
    found = parse_config(text).dtype
    assert (found and found.name) == dtype


def test_a_change_keeps_order_style_and_everything_else() -> None:
    text = json.dumps({"b": 1, "a": None, "c": "é"}, indent=4, ensure_ascii=True)
    config = parse_config(text)
    changed = attrs.evolve(config, fields={**config.fields, "b": 2, "d": [3]})
    assert render_config(changed) == json.dumps({"b": 2, "a": None, "c": "é", "d": [3]}, indent=4, ensure_ascii=True)


def test_a_config_of_ones_own_is_written_as_transformers_writes() -> None:
    assert (
        render_config(Config({"b": [1], "a": "é"}))
        == json.dumps({"b": [1], "a": "é"}, indent=2, ensure_ascii=False) + "\n"
    )


def test_a_config_is_a_value() -> None:
    one, two = parse_config(json.dumps(FIELDS)), parse_config(json.dumps(FIELDS, indent=2, sort_keys=True))
    assert one == two
    assert hash(one) == hash(two)


def test_text_by_another_writer_keeps_its_fields_and_most_of_its_layout() -> None:
    text = '{\n    "a": 1E-5,\n    "b": [1,2]\n}\n'
    config = parse_config(text)
    assert config.fields == {"a": 1e-05, "b": (1, 2)}
    again = render_config(config)
    assert parse_config(again) == config
    assert again.startswith('{\n    "a"')
    assert again.endswith("}\n")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "BAD_JSON"),
        (b"[]", "BAD_JSON"),
        (b"{", "BAD_JSON"),
        (b"\xff{}", "BAD_UTF8"),
        ("\ufeff{}", "BAD_JSON"),
        ("\ud800", "BAD_UTF8"),
        ('{"a": 1, "a": 2}', "DUPLICATE_KEY"),
        ('{"a": {"b": 1, "\\u0062": 2}}', "DUPLICATE_KEY"),
        ('{"a":' + "[" * 10_000 + "]" * 10_000 + "}", "JSON_DEPTH"),
        ('{"a":' + "1" * 10_000 + "}", "INT_TOO_LONG"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isupper() else "",
)
def test_what_is_no_config(text: str | bytes, code: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(text, path="there/config.json")
    assert (caught.value.code, caught.value.path) == (code, "there/config.json")
