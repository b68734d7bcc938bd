"""Records to JSON and back. A closed table of tags; no pickle, and no name in the text ever selects code to run.

    {"funcmodel": 1, "shared": [...], "value": ...}

A record is `{"Tag": [its fields, in order]}` with trailing defaults left out, a tuple is an array, a `FrozenMap` is
`{"map": [[key, value], ...]}`. What a plan holds many times (files, tensor specs, devices) stands once in `shared`, and
`{"@": 3}` points there. JSON has no infinity, NaN or complex number: `{"float": "inf"}`, `{"complex": [re, im]}`.
"""

import json
from collections.abc import Callable, Iterable
from math import isfinite
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Final, ForwardRef, Literal, NamedTuple, NoReturn, TypeAlias, Union, get_args, get_origin

import attrs

from funcmodel.core.build import rebuilt
from funcmodel.core.strict_json import depth_exceeds, parsed
from funcmodel.errors import CheckpointError, PlanError, ShapeError
from funcmodel.records import (
    actions,
    checkpoint,
    config,
    devices,
    expressions,
    mesh,
    module,
    plans,
    reports,
    routes,
    rules,
)
from funcmodel.records.dtypes import DType, dtype
from funcmodel.records.expressions import Expr
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec

_VERSION: Final = 1
_DEPTH: Final = 256  # brackets: an expression of some 120 nested nodes
_DIGITS: Final = 400  # config files hold integers of 31 digits
_EXPRESSIONS: Final = frozenset(get_args(Expr))
_LEAVES: Final = frozenset(get_args(expressions.Leaf))
_PLAIN: Final = frozenset({str, int, bool, NoneType})

Check: TypeAlias = Callable[[Any], bool]


class _Record(NamedTuple):
    """How one class is written and read."""

    cls: type
    names: tuple[str, ...]
    defaults: tuple[Any, ...]
    types: tuple[frozenset[type], ...]  # per field the types that need no further look
    checks: tuple[Check, ...]
    positional: bool
    sound: bool  # whether its expressions are to be checked as a whole


# -- the table ---------------------------------------------------------------------------------------------------------

_ROOMS: Final = (actions, checkpoint, config, devices, expressions, mesh, module, plans, reports, routes, rules)
CLASSES: Final[tuple[type, ...]] = (
    TensorSpec,
    *(
        found
        for room in _ROOMS
        for found in vars(room).values()
        if isinstance(found, type) and attrs.has(found) and found.__module__ == room.__name__
    ),
)
_SHARED: Final = frozenset({expressions.FileRef, TensorSpec, devices.Device})
_ROOTS: Final = frozenset({actions.Assign, actions.Tie, actions.Offload, actions.WriteShard, plans.StateDictPlan})


def _check(kind: Any) -> Check:
    """The test that a decoded value has the type that a field's annotation says."""
    if isinstance(kind, ForwardRef):
        kind = kind.__forward_arg__
    if isinstance(kind, str):
        return _NAMED[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        checks = tuple(map(_check, args))
        return lambda value: any(check(value) for check in checks)
    if origin is Literal:
        return lambda value: type(value) is str and value in args
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            item = _check(args[0])
            return lambda value: type(value) is tuple and all(map(item, value))
        items = tuple(map(_check, args))
        return lambda value: (
            type(value) is tuple and len(value) == len(items) and all(ok(v) for ok, v in zip(items, value, strict=True))
        )
    if origin is FrozenMap:
        key, item = map(_check, args)
        return lambda value: type(value) is FrozenMap and all(map(key, value)) and all(map(item, value.values()))
    types = _types(kind)
    return lambda value: type(value) in types


def _types(kind: Any) -> frozenset[type]:
    """The types whose every value fits an annotation."""
    if kind == "Expr":
        return _EXPRESSIONS
    if get_origin(kind) in (Union, UnionType):
        return frozenset().union(*map(_types, get_args(kind)))
    if kind is float:
        return frozenset({float, int})
    return frozenset({kind}) if isinstance(kind, type) and get_origin(kind) is None else frozenset()


def _is_expr(value: Any) -> bool:
    return type(value) in _EXPRESSIONS


def _is_json(value: Any) -> bool:
    if type(value) is FrozenMap:
        return all(type(key) is str for key in value) and all(map(_is_json, value.values()))
    if type(value) is tuple:
        return all(map(_is_json, value))
    return type(value) in _PLAIN or type(value) is float


# Annotations that stand as text because they are recursive.
_NAMED: Final[MappingProxyType[str, Check]] = MappingProxyType(
    {
        "Expr": _is_expr,
        "tuple[Expr, ...]": lambda value: type(value) is tuple and all(map(_is_expr, value)),
        str(config.Json): _is_json,
    }
)


def _record(cls: type) -> _Record:
    fields = [field for field in attrs.fields(cls) if field.init]
    kinds = tuple(field.type for field in fields)
    return _Record(
        cls,
        tuple(field.name for field in fields),
        tuple(_default(field.default) for field in fields),
        tuple(map(_types, kinds)),
        tuple(map(_check, kinds)),
        not any(field.kw_only for field in fields),
        cls in _ROOTS,
    )


def _default(default: Any) -> Any:
    # A NamedTuple's default would be shared, but the only factory in the records makes an empty FrozenMap.
    return default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]


_BY_TAG: Final = MappingProxyType({cls.__name__: _record(cls) for cls in CLASSES})
_BY_CLASS: Final = MappingProxyType({record.cls: record for record in _BY_TAG.values()})


# -- writing -----------------------------------------------------------------------------------------------------------


def to_json(value: object) -> str:
    """A record as JSON text, on one line; equal records in equal order give equal text.

    Args:
        value: any record of `funcmodel.records` (a plan, an expression, a spec, a policy, ...), or a tuple or
            `FrozenMap` of such.

    Raises:
        PlanError: something in it is no record, or expressions nest deeper than some 120 levels.

    Example:
        >>> print(to_json(devices.DeviceMap({"": "cpu"})))
        {"funcmodel": 1, "shared": [{"Device": ["cpu"]}], "value": {"DeviceMap": [{"map": [["", {"@": 0}]]}]}}
    """
    shared: list[Any] = []
    places: dict[object, dict[str, int]] = {}
    seen: dict[int, dict[str, int]] = {}

    def share(item: Any) -> dict[str, int]:
        # Identity first: hashing a spec costs more than all the rest, and plans mostly hold the same objects.
        place = seen.get(id(item))
        if place is None:
            place = places.get(item)
            if place is None:
                body = fields(item)
                place = places[item] = {"@": len(shared)}
                shared.append(body)
            seen[id(item)] = place
        return place

    def fields(item: Any) -> dict[str, list[Any]]:
        record = _BY_CLASS[type(item)]
        values = [getattr(item, name) for name in record.names]
        for default in reversed(record.defaults):
            if default is attrs.NOTHING or values[-1] != default:
                break
            values.pop()
        return {record.cls.__name__: [encoded(v) for v in values]}

    def encoded(item: Any) -> Any:
        kind = type(item)
        if kind in _PLAIN:
            return item
        if kind in _SHARED:
            return share(item)
        if kind in _BY_CLASS:
            return fields(item)
        if kind is tuple:
            return [encoded(v) for v in item]
        if kind is FrozenMap:
            return {"map": [[encoded(k), encoded(v)] for k, v in item.items()]}
        if kind is float:
            return item if isfinite(item) else {"float": str(item)}
        if kind is complex:
            return {"complex": [encoded(item.real), encoded(item.imag)]}
        if kind is DType:
            return {"DType": [item.name]}
        raise PlanError(
            f"to_json: {item!r} ({kind.__name__}) is no record; records hold records, tuples and FrozenMaps"
        )

    try:
        body = encoded(value)
        text = json.dumps({"funcmodel": _VERSION, "shared": shared, "value": body}, allow_nan=False)
    except RecursionError as error:
        raise PlanError("to_json: nested too deeply") from error
    if depth_exceeds(text.encode("ascii"), _DEPTH):
        raise PlanError(f"to_json: brackets nest deeper than {_DEPTH} levels, which from_json does not read")
    return text


# -- reading -----------------------------------------------------------------------------------------------------------


def from_json(text: str) -> Any:
    """The record that `to_json` wrote; equal to it, in the same order.

    Every field's type is checked, and every expression's shapes. Reading runs nothing; but a plan may name functions
    (`Call`, `Initialize`) and files, so look at a plan from elsewhere with `describe` before applying it.

    Raises:
        PlanError: the text is not what `to_json` writes, or an expression's parts do not fit.

    Example:
        >>> from_json(to_json(devices.DeviceMap({"": "cpu"})))
        DeviceMap(entries=FrozenMap({'': cpu}))
    """
    try:
        data = text.encode("utf-8")
        whole = parsed(data, _failure, depth=_DEPTH, digits=_DIGITS, surrogates="keep")
    except (CheckpointError, UnicodeEncodeError) as error:
        raise PlanError(f"from_json: {error}") from error
    if type(whole) is not dict or list(whole) != ["funcmodel", "shared", "value"]:
        _fail('expected an object of "funcmodel", "shared" and "value"')
    if whole["funcmodel"] != _VERSION or type(whole["shared"]) is not list:
        _fail(f"expected version {_VERSION}, found {whole['funcmodel']!r}")
    shared: list[Any] = []
    try:
        for item in whole["shared"]:
            value = _decoded(item, shared)
            if type(value) not in _SHARED:
                _fail("only files, specs and devices are shared")
            shared.append(value)
        value = _decoded(whole["value"], shared)
        _require_sound([value])
        return value
    except RecursionError as error:
        raise PlanError("from_json: nested too deeply") from error


def _decoded(item: Any, shared: list[Any]) -> Any:
    kind = type(item)
    if kind is dict:
        if len(item) != 1:
            _fail(f"expected one tag, found {list(item)[:4]}")
        ((tag, body),) = item.items()
        if tag == "@":
            if type(body) is not int or not 0 <= body < len(shared):
                _fail(f"nothing is shared at {body!r}")
            return shared[body]
        if type(body) is not list and tag != "float":
            _fail(f"expected an array under {tag!r}")
        record = _BY_TAG.get(tag)
        return _special(tag, body, shared) if record is None else _made(record, _items(body, shared))
    if kind is list:
        return tuple(_items(item, shared))
    return item


def _items(items: list[Any], shared: list[Any]) -> list[Any]:
    # Most items are numbers and text, which stand for themselves.
    return [_decoded(v, shared) if type(v) is dict or type(v) is list else v for v in items]


def _made(record: _Record, values: list[Any]) -> Any:
    tag, names = record.cls.__name__, record.names
    if len(values) > len(names):
        _fail(f"{tag} has {len(names)} fields, found {len(values)}")
    for at, (value, types) in enumerate(zip(values, record.types, strict=False)):
        if type(value) not in types and not record.checks[at](value):
            _fail(f"field {names[at]!r} of {tag} cannot be {str(value)[:80]}")
    if len(values) < len(names) and attrs.NOTHING in record.defaults[len(values) :]:
        _fail(f"{tag} lacks field {names[len(values)]!r}")
    try:
        made = record.cls(*values) if record.positional else record.cls(**dict(zip(names, values, strict=False)))
    except (ValueError, TypeError, OverflowError) as error:
        raise PlanError(f"from_json: {tag}: {error}") from error
    if record.sound:
        _require_sound(values)
    return made


def _special(tag: str, body: Any, shared: list[Any]) -> Any:
    match tag, body:
        case "DType", [str(name)]:
            try:
                return dtype(name)
            except ValueError as error:
                raise PlanError(f"from_json: {error}") from error
        case "float", "inf" | "-inf" | "nan":
            return float(body)
        case "complex", [real, imag]:
            parts = _decoded(real, shared), _decoded(imag, shared)
            if all(type(part) is float for part in parts):
                return complex(*parts)
        case "map", [*pairs] if all(type(pair) is list and len(pair) == 2 for pair in pairs):
            entries = {_key(_decoded(k, shared)): _decoded(v, shared) for k, v in pairs}
            if len(entries) == len(pairs):
                return FrozenMap(entries)
            _fail("a map has a key twice")
    return _fail(f"unknown tag or malformed value: {tag[:40]!r}")


def _key(value: Any) -> Any:
    return value if type(value) is str or type(value) is devices.Device else _fail("a map's keys are text or devices")


def _require_sound(values: Iterable[Any]) -> None:
    """Refuses expressions whose parts do not fit: a text can hold what no constructor makes."""
    for value in values:
        if type(value) is FrozenMap:
            _require_sound(value.values())
        elif type(value) is tuple:
            _require_sound(value)
        elif type(value) in _EXPRESSIONS and type(value) not in _LEAVES:
            if _has_negative(value):
                raise ShapeError("from_json: an axis or a length below zero, as no plan holds")
            try:
                rebuilt(value)
            except (IndexError, ValueError) as error:
                raise ShapeError(f"from_json: an expression's parts do not fit: {error}") from error


def _has_negative(expr: Expr) -> bool:
    """Whether a node names an axis or a length by a negative number, which constructors take and never keep."""
    match expr:
        case expressions.Concat(parts, dim) | expressions.Stack(parts, dim):
            return dim < 0 or any(map(_has_negative, parts))
        case expressions.Take(of, dim):
            return dim < 0 or _has_negative(of)
        case expressions.Permute(of, numbers) | expressions.Reshape(of, numbers):
            return min(numbers, default=0) < 0 or _has_negative(of)
        case expressions.Index(of) | expressions.Cast(of):
            return _has_negative(of)
        case expressions.Call(_, args):
            return any(map(_has_negative, args))
    return False


def _failure(code: str, found: str) -> CheckpointError:
    return CheckpointError(found, code=code)


def _fail(found: str) -> NoReturn:
    raise PlanError(f"from_json: {found}; expected what to_json writes")
