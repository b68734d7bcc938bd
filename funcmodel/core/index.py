"""The JSON files beside the weights, `*.safetensors.index.json` and `config.json`: bytes to records and back."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from funcmodel.core.limits import LIMITS, Limits, name_error
from funcmodel.core.strict_json import Fail, deeper, parsed
from funcmodel.errors import CheckpointError, IndexMismatchError, UnsafePathError
from funcmodel.records.checkpoint import FileSpec, IndexSpec
from funcmodel.records.config import STYLES, Config, Json, JsonStyle, freeze, thaw
from funcmodel.records.mapping import FrozenMap

_LARGE: Final = 2 << 20  # bytes of JSON that are parsed as they are, and that a larger index may have beside its map
_ROOM: Final = 48 << 20  # bytes of memory for what is parsed as it is
_MOST_KNOWN: Final = 4096
# Each of the ten letters may stand there as an escape of six.
_WEIGHT_MAP: Final = re.compile(rb'"(?:weight_map|[\w\\]{11,60})"[ \t\n\r]*+:[ \t\n\r]*+\{')


def parse_index(
    data: bytes, *, path: str = "", limits: Limits = LIMITS, suffixes: tuple[str, ...] = (".safetensors",)
) -> IndexSpec:
    """An index file as a record.

    Args:
        data: the whole file.
        path: for messages, and for the record.
        limits: what is accepted.
        suffixes: how the names of shards may end.

    Raises:
        IndexMismatchError: it is malformed; `code` says how ("INDEX_SHAPE", "SHARD_NAME", "SHARD_EXTENSION", ...).
        UnsafePathError: a shard's name leaves the folder; code "SHARD_ESCAPES".

    Example:
        >>> parse_index(b'{"weight_map": {"w": "model-00001-of-00001.safetensors"}}').weight_map["w"]
        'model-00001-of-00001.safetensors'
    """

    def fail(code: str, found: str, **fields: Any) -> IndexMismatchError:
        return IndexMismatchError(f"{path}: {found}; the index is damaged", code=code, path=path, **fields)

    if len(data) > limits.index_bytes:
        raise fail("INDEX_TOO_LARGE", f"{len(data)} bytes, at most {limits.index_bytes} are read")
    known: set[str] = set()

    def check(key: str, shard: str) -> None:
        _check_key(key, limits, fail)
        if shard not in known:
            _check_shard(shard, key, path, limits, suffixes, fail)
            if len(known) < _MOST_KNOWN:
                known.add(shard)

    index = _value(data, limits, fail, check)
    if type(index) is not dict or type(index.get("weight_map")) is not dict or not index["weight_map"]:
        raise fail("INDEX_SHAPE", "expected an object with a weight_map from keys to files that is not empty")
    metadata = index.get("metadata")
    if metadata is not None and type(metadata) is not dict:
        raise fail("INDEX_SHAPE", f"its metadata is {type(metadata).__name__}, expected an object")
    shards: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for key, shard in index["weight_map"].items():
        _check_key(key, limits, fail)
        if type(shard) is not str:
            raise fail("SHARD_NAME", f"key {key!r} lies in {shard!r:.80}, expected a file name", key=key)
        one = shards.get(shard)
        if one is None:
            _check_shard(shard, key, path, limits, suffixes, fail)
            one = shards[shard] = shard
        weight_map[key] = one  # one text object per shard, not one per key
    return IndexSpec(
        path=path, weight_map=FrozenMap(weight_map), metadata=FrozenMap(_frozen(metadata or {})), nbytes=len(data)
    )


def _value(data: bytes, limits: Limits, fail: Fail, check: Callable[[str, str], object]) -> Any:
    """The JSON value, without building one whose size only a flawed text could have."""
    if len(data) <= _LARGE:
        return parsed(data, fail, depth=limits.json_depth, digits=limits.int_digits, room=_ROOM)
    from funcmodel.core.entries import pairs  # here, because most indexes are small

    mark = "weight_map"
    while mark.encode() in data:
        mark += "#"
    for found in _WEIGHT_MAP.finditer(data):
        start = found.end() - 1
        stop = pairs(data, start, None, fail, check)
        if stop is None or len(data) - (stop - start) > _LARGE:
            continue
        rest = b'%b"%b"%b' % (data[:start], mark.encode(), data[stop:])
        index = parsed(rest, fail, depth=limits.json_depth, digits=limits.int_digits, room=_ROOM)
        if type(index) is dict and index.get("weight_map") == mark:
            index["weight_map"] = {}
            pairs(data, start, index["weight_map"], fail)
            return index
    if deeper(data, limits.json_depth):
        raise fail("JSON_DEPTH", f"nested deeper than {limits.json_depth} levels")
    raise fail("INDEX_SHAPE", f"{len(data)} bytes, and no weight_map from keys to files that makes up most of them")


def _frozen(fields: Mapping[str, Any]) -> dict[str, Json]:
    return {name: freeze(value) for name, value in fields.items()}


def _check_key(key: str, limits: Limits, fail: Callable[..., IndexMismatchError]) -> None:
    if not (key.isascii() and key.isprintable() and 0 < len(key) <= limits.name_chars):
        wrong = name_error(key, limits)
        if wrong is not None:
            raise fail(wrong[0], f"key {key[:80]!r}: {wrong[1]}", key=key)


def _check_shard(
    shard: str,
    key: str,
    path: str,
    limits: Limits,
    suffixes: tuple[str, ...],
    fail: Callable[..., IndexMismatchError],
) -> None:
    if not shard or not shard.isprintable() or len(shard) > limits.name_chars:
        raise fail("SHARD_NAME", f"key {key!r} lies in {shard[:80]!r}, which is no file name", key=key, file=shard)
    parts = shard.split("/")
    if "\\" in shard or shard[1:2] == ":" or not {"", ".", ".."}.isdisjoint(parts):
        raise UnsafePathError(
            f"{path}: key {key!r} lies in {shard!r}, expected a name inside the folder; do not trust it",
            code="SHARD_ESCAPES",
            path=path,
            key=key,
            file=shard,
        )
    if not shard.endswith(suffixes):
        expected = " or ".join(suffixes)
        raise fail("SHARD_EXTENSION", f"key {key!r} lies in {shard!r}, expected a {expected} file", key=key, file=shard)


def render_index(weight_map: Mapping[str, str], metadata: Mapping[str, Json] = FrozenMap()) -> str:
    """The text of an index file, as transformers and huggingface_hub lay it out: sorted by name, indented by 2.

    Args:
        weight_map: key to file name.
        metadata: for example `total_size`; an empty object is written where it is empty, since some readers need it.

    Example:
        >>> print(render_index({"w": "model-00001-of-00001.safetensors"}, {"total_size": 8}), end="")
        {
          "metadata": {
            "total_size": 8
          },
          "weight_map": {
            "w": "model-00001-of-00001.safetensors"
          }
        }
    """
    index = {"metadata": {k: thaw(v) for k, v in metadata.items()}, "weight_map": dict(weight_map)}
    return json.dumps(index, indent=2, sort_keys=True, allow_nan=False) + "\n"


# -- config.json -------------------------------------------------------------------------------------------------------

# transformers writes time_step_limit: [0.0, Infinity] and model_max_length: 1000000000000000019884624838656.
_CONFIG_DIGITS = 400
_CONFIG_DEPTH = 64


def parse_config(text: str | bytes, *, path: str = "config.json", limits: Limits = LIMITS) -> Config:
    """A `config.json` as a record that writes back byte for byte, if Python's json module wrote it.

    Every field is kept, known or not, in the file's order; a null stays a null. `Config.style` holds the layout.

    Args:
        text: the whole file, line ends untranslated.
        path: for messages.
        limits: what is accepted; values may take 15 times `config_bytes` in memory.

    Raises:
        CheckpointError: it is no JSON object, or one with a name twice; `code` says which.

    Example:
        >>> config = parse_config('{"model_type": "bert", "mine": null}')
        >>> config.model_type, "mine" in config, render_config(config)
        ('bert', True, '{"model_type": "bert", "mine": null}')
    """

    def fail(code: str, found: str) -> CheckpointError:
        return CheckpointError(f"{path}: {found}; the file is damaged", code=code, path=path)

    try:
        data = text if isinstance(text, bytes) else text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise fail("BAD_UTF8", "half a character (a lone surrogate)") from error
    fields = parsed(
        data,
        fail,
        depth=_CONFIG_DEPTH,
        digits=_CONFIG_DIGITS,
        nonfinite="keep",
        surrogates="keep",
        room=15 * limits.config_bytes,
    )
    if type(fields) is not dict:
        raise fail("BAD_JSON", f"expected an object, found {type(fields).__name__}")
    return Config(fields, _style(fields, data.decode("utf-8")))


def render_config(config: Config) -> str:
    """The text of a `config.json`, in the layout in which it was read; a new one is indented by 2.

    Example:
        >>> print(render_config(Config({"b": 1, "a": [True, None]})), end="")
        {
          "b": 1,
          "a": [
            true,
            null
          ]
        }
    """
    return _rendered({name: thaw(value) for name, value in config.fields.items()}, config.style)


def _rendered(fields: dict[str, Any], style: JsonStyle) -> str:
    text = json.dumps(fields, indent=style.indent, ensure_ascii=style.ascii, separators=_separators(style))
    return text.replace("\n", style.ending) + style.ending if style.ending == "\r\n" else text + style.ending


def _renders(fields: dict[str, Any], style: JsonStyle, text: str) -> bool:
    """Whether a style reproduces a text, told part by part: deep values are far longer where each has a line."""
    encoder = json.JSONEncoder(indent=style.indent, ensure_ascii=style.ascii, separators=_separators(style))
    at = 0
    for part in encoder.iterencode(fields):
        found = part.replace("\n", style.ending) if style.ending == "\r\n" else part
        if not text.startswith(found, at):
            return False
        at += len(found)
    return text[at:] == style.ending


def _separators(style: JsonStyle) -> tuple[str, str] | None:
    return (",", ":") if style.compact else None


def _style(fields: dict[str, Any], text: str) -> JsonStyle:
    """The layout of a text: the one that reproduces it, else the one that comes near."""
    for style in STYLES:
        if _renders(fields, style, text):
            return style
    ending = "\r\n" if text.endswith("\r\n") else "\n" if text.endswith("\n") else ""
    lines = text.splitlines()
    indent = len(lines[1]) - len(lines[1].lstrip(" ")) if len(lines) > 1 else 0
    return JsonStyle(indent or None, "\\u" in text, ending)


def check_agreement(index: IndexSpec, files: Mapping[str, FileSpec]) -> None:
    """Refuse an index whose keys do not stand in the shards that it names, or that does not name all that stands there.

    Args:
        index: the index.
        files: its shards, by the names that it gives them.

    Raises:
        IndexMismatchError: code "KEY_IN_TWO_SHARDS", "KEY_NOT_AS_INDEXED" or "INDEXED_KEY_MISSING"; `keys` names them.

    Example:
        >>> check_agreement(IndexSpec(path="i", weight_map={"w": "a"}), {})
        Traceback (most recent call last):
        ...
        funcmodel.errors.IndexMismatchError: i: 'w' in the index and in no shard (1 keys indexed, 0 found); \
index and shards belong to different saves, or the index is wrong
    """
    where = index.weight_map
    if sum(len(file.tensors) for file in files.values()) != len(where) or not all(
        where.get(name) == shard for shard, file in files.items() for name in file.tensors
    ):
        raise _disagreement(index, files)


def _disagreement(index: IndexSpec, files: Mapping[str, FileSpec]) -> IndexMismatchError:
    held: dict[str, list[str]] = {}
    for shard, file in files.items():
        for name in file.tensors:
            held.setdefault(name, []).append(shard)
    twice = tuple(key for key, shards in held.items() if len(shards) > 1)
    ghosts = tuple(key for key in index.weight_map if key not in held)
    astray = tuple(key for key, shards in held.items() if index.weight_map.get(key) not in shards)
    code, keys, what = (
        ("KEY_IN_TWO_SHARDS", twice, "in more than one shard")
        if twice
        else ("KEY_NOT_AS_INDEXED", astray, "in another shard than the index says, or not in the index")
        if astray
        else ("INDEXED_KEY_MISSING", ghosts, "in the index and in no shard")
    )
    return IndexMismatchError(
        f"{index.path}: {_shown(keys)} {what} ({len(index.weight_map)} keys indexed, {len(held)} found); "
        "index and shards belong to different saves, or the index is wrong",
        code=code,
        path=index.path,
        key=keys[0],
        keys=keys,
        files=tuple(held.get(keys[0], ())),
    )


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:120]) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
