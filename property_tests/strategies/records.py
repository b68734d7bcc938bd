"""Any record of `funcmodel.records`, from its annotations, so that a new record or field is covered without a word."""

import math
from collections.abc import Callable
from types import UnionType
from typing import Any, ForwardRef, Literal, Union, get_args, get_origin

import attrs
from hypothesis import strategies as st

from funcmodel.plan.codec import CLASSES
from funcmodel.records import config, expressions, mesh, reports, routes
from funcmodel.records.devices import CPU, Budget, Device
from funcmodel.records.dtypes import DTYPES, FLOAT32, DType
from funcmodel.records.expressions import Expr, FileRef
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec
from property_tests.strategies.expressions import expressions as nested

_KEYS = ["", "w", "layers.0.weight", "layers.10.weight", "é", "a b", 'q"\\', "\ud800", "{i}", "nan", "@", "map"]
texts = st.sampled_from(_KEYS)
ints = st.sampled_from([0, 1, -1, 7, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 10**30])
floats = st.sampled_from([0.0, -0.0, 1.0, 0.1, 1e-320, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, -2.5])
files = st.sampled_from(
    [FileRef(path, "safetensors", 1 << 40, print_) for path in ("a/b", "c") for print_ in ("", "f" * 32)]
)
_DTYPES = (*DTYPES[:12], *DTYPES[-5:])
_WHOLE = [TensorSpec(s, d) for s in ((), (0,), (4, 6), (2, 3, 4), (8,)) for d in _DTYPES]
specs = st.sampled_from([spec for spec in _WHOLE if spec.numel * spec.dtype.bits % 8 == 0])
leaves = st.one_of(
    st.builds(expressions.Read, files, texts, specs, st.integers(0, 1 << 30)),
    st.builds(expressions.Live, texts, specs),
    st.builds(expressions.Full, st.just(TensorSpec((4, 6), FLOAT32)), st.one_of(floats, st.integers(-9, 9))),
    st.builds(expressions.Full, st.just(TensorSpec((2,), "complex64")), st.builds(complex, floats, floats)),
    st.builds(expressions.Full, st.just(TensorSpec((2,), "bool")), st.booleans()),
    st.builds(expressions.Noise, st.just(TensorSpec((4, 6), FLOAT32)), st.just(0), floats, st.integers(0, 2**63 - 1)),
)


calls = st.builds(
    expressions.Call,
    texts,
    st.lists(leaves, max_size=2).map(tuple),
    specs,
    st.just({"a": 1, "b": 0.5, "c": (1, 2), "d": None, "e": True}),
)
any_expression = st.one_of(leaves, calls, nested(depth=3))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), ints, floats, texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2).map(tuple), st.dictionaries(texts, inner, max_size=2).map(FrozenMap)
    ),
    max_leaves=4,
)

_SPECIAL: dict[type, st.SearchStrategy[Any]] = {
    str: texts,
    int: ints,
    float: floats,
    bool: st.booleans(),
    complex: st.builds(complex, floats, floats),
    type(None): st.none(),
    DType: st.sampled_from(DTYPES),
    TensorSpec: specs,
    FileRef: files,
    Device: st.sampled_from([CPU, Device("cuda", 0), Device("meta"), Device("disk")]),
    reports.Waiver: st.builds(reports.Waiver, st.sampled_from(["missing", "unexpected", "mismatched"]), texts),
    Budget: st.sampled_from([Budget({0: "10GB", "cpu": 0}), Budget({})]),
    mesh.Mesh: st.sampled_from([mesh.Mesh({"pp": 2, "tp": 4}), mesh.Mesh({"tp": 2}, ranks=(1, 0))]),
    config.JsonStyle: st.sampled_from(config.STYLES),
}
_NAMED: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
    "Expr": lambda: any_expression,
    "tuple[Expr, ...]": lambda: st.lists(any_expression, max_size=2).map(tuple),
    str(config.Json): lambda: json_values,
}
_EXPRESSIONS = frozenset(get_args(Expr))


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values that a field with this annotation may hold."""
    kind = kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind
    if isinstance(kind, str):
        return _NAMED[kind]()
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if set(args) >= _EXPRESSIONS:
            rest = [values_of(arg) for arg in args if arg not in _EXPRESSIONS]
            return st.one_of(any_expression, *rest)
        return st.one_of(*map(values_of, args))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return st.lists(values_of(args[0]), max_size=2).map(tuple)
        return st.tuples(*map(values_of, args))
    if origin is FrozenMap:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=2).map(FrozenMap)
    return _SPECIAL[kind] if kind in _SPECIAL else records_of(kind)


def records_of(cls: type) -> st.SearchStrategy[Any]:
    """Instances of one record class."""
    if cls in _SPECIAL:
        return _SPECIAL[cls]
    if cls in _EXPRESSIONS:
        return any_expression
    fields = {
        field.name: st.deferred(lambda kind=field.type: values_of(kind)) for field in attrs.fields(cls) if field.init
    }
    if cls is routes.Routing:
        fields |= dict.fromkeys(("threads", "buffers", "buffer", "span"), ints.filter(lambda n: n > 0))
    return st.builds(cls, **fields)


records = st.sampled_from(CLASSES).flatmap(records_of)
