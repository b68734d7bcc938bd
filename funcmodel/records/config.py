"""`Config`: a frozen JSON object that keeps what it does not know, in the order and style in which it was written."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

from attrs import field, frozen

from funcmodel.records.dtypes import DType, dtype
from funcmodel.records.mapping import FrozenMap

Json: TypeAlias = "bool | int | float | str | tuple[Json, ...] | FrozenMap[str, Json] | None"


def freeze(value: object) -> Json:
    """A JSON value with its lists as tuples and its objects as `FrozenMap`s.

    Raises:
        TypeError: the value is not made of JSON's types.

    Example:
        >>> freeze({"a": [1, None]})
        FrozenMap({'a': (1, None)})
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return FrozenMap({_name(k): freeze(v) for k, v in value.items()})
        case list() | tuple():
            return tuple(map(freeze, value))
    raise TypeError(f"not a JSON value: {value!r} ({type(value).__name__})")


def _name(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a JSON object's names are text, found {key!r} ({type(key).__name__})")
    return key


def thaw(value: Json) -> Any:
    """The inverse of `freeze`: plain dicts and lists, as the json module takes them."""
    match value:
        case tuple():
            return [thaw(v) for v in value]
        case FrozenMap():
            return {k: thaw(v) for k, v in value.items()}
    return value


@frozen
class JsonStyle:
    """How a JSON text was laid out, so that writing reproduces it byte for byte."""

    indent: int | str | None = 2
    ascii: bool = False
    ending: str = "\n"
    compact: bool = False


@frozen(repr=False)
class Config(Mapping[str, Json]):
    """A model's configuration: all fields of its `config.json`, known or not, in the file's order.

    `core.wire.parse_config` reads one, `core.wire.render_config` writes it back, byte for byte. `attrs.evolve` with new
    `fields` changes one. A null that was in the file stays a null.

    Attributes:
        fields: every field, deep-frozen.
        style: layout of the text it came from; no part of equality.

    Example:
        >>> c = Config({"model_type": "bert", "torch_dtype": "bfloat16", "mine": [1]})
        >>> c.model_type, c.dtype, c["mine"]
        ('bert', bfloat16, (1,))
    """

    fields: FrozenMap[str, Json] = field(default=FrozenMap(), converter=freeze)
    style: JsonStyle = field(default=JsonStyle(), eq=False)

    def __getitem__(self, key: str) -> Json:
        return self.fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    @property
    def model_type(self) -> str | None:
        """The architecture's name, or None."""
        value = self.fields.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def architectures(self) -> tuple[str, ...]:
        """Class names, empty where the file has none."""
        value = self.fields.get("architectures")
        return tuple(str(v) for v in value) if isinstance(value, tuple) else ()

    @property
    def dtype(self) -> DType | None:
        """The field `dtype`, or `torch_dtype` as transformers 4 wrote it.

        Raises:
            ValueError: the field names no element type.
        """
        value = self.fields.get("dtype", self.fields.get("torch_dtype"))
        return dtype(value) if isinstance(value, str) and value != "auto" else None

    @property
    def tie_word_embeddings(self) -> bool | None:
        """Whether the class ties its embeddings, or None where the file does not say."""
        value = self.fields.get("tie_word_embeddings")
        return value if isinstance(value, bool) else None

    @property
    def quantization_config(self) -> FrozenMap[str, Json] | None:
        """The quantizer's own settings, or None."""
        value = self.fields.get("quantization_config")
        return value if isinstance(value, FrozenMap) else None

    def __repr__(self) -> str:
        return f"<Config {self.model_type or '?'}: {len(self.fields)} fields>"


STYLES: Final = tuple(
    JsonStyle(indent, ascii_, ending, compact)
    for indent in (2, None, 4, "\t", 1)
    for ascii_ in (False, True)
    for ending in ("\n", "", "\r\n")
    for compact in ((False, True) if indent is None else (False,))
)
