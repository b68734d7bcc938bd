"""Law 46: records are frozen, hashable, picklable and equal by value, with nothing mutable inside."""

import copy
import pickle
import pkgutil
from collections.abc import MutableMapping, MutableSequence, MutableSet
from importlib import import_module
from typing import Any, get_args

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import funcmodel.records
from funcmodel.plan.codec import CLASSES
from funcmodel.records.dtypes import DTYPES, DType
from funcmodel.records.mapping import FrozenMap
from property_tests.strategies.records import records, records_of

FEW = max(10, settings().max_examples // 5)  # per class, of which there are some sixty
ROOMS = [import_module(f"funcmodel.records.{found.name}") for found in pkgutil.iter_modules(funcmodel.records.__path__)]
FOUND = {value for room in ROOMS for value in vars(room).values() if isinstance(value, type) and attrs.has(value)}


def test_the_table_of_records_is_complete() -> None:
    """Every attrs class in any module of `funcmodel.records` is in the codec's table, `DType` (a name) aside."""
    assert set(CLASSES) == FOUND - {DType}
    assert len({cls.__name__ for cls in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("cls", sorted(FOUND, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_law_46_no_field_is_declared_mutable(cls: type) -> None:
    """No annotation of a field mentions `list`, `dict` or `set`; every class is frozen and has slots."""

    def mentioned(kind: Any) -> set[Any]:
        return {kind}.union(*map(mentioned, get_args(kind)))

    for field in attrs.fields(cls):
        assert not mentioned(field.type) & {list, dict, set, bytearray}
        assert not isinstance(field.type, str) or not {"list", "dict", "set"} & set(
            field.type.replace("[", " ").split()
        )
    assert "__slots__" in vars(cls)


def parts(value: Any) -> list[Any]:
    """The value and everything inside it."""
    if attrs.has(type(value)):
        inner = [getattr(value, field.name) for field in attrs.fields(type(value))]
    elif isinstance(value, FrozenMap):
        inner = [*value, *value.values()]
    else:
        inner = list(value) if isinstance(value, tuple) else []
    return [value, *(part for item in inner for part in parts(item))]


@pytest.mark.parametrize("cls", sorted(FOUND - {DType}, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
@settings(max_examples=FEW)
@given(st.data())
def test_law_46_records_are_hashable_and_picklable(cls: type, data: st.DataObject) -> None:
    """`loads(dumps(r)) = r`, `hash` agrees, no field can be set, and no list, dict or set is anywhere inside."""
    record = data.draw(records_of(cls))
    again = pickle.loads(pickle.dumps(record))
    assert again == record
    assert hash(again) == hash(record)
    assert copy.deepcopy(record) == record
    for part in parts(record):
        assert not isinstance(part, MutableMapping | MutableSequence | MutableSet)
    for field in attrs.fields(type(record)):
        with pytest.raises(AttributeError):
            setattr(record, field.name, None)
    with pytest.raises(AttributeError):
        record.no_such_field = 1


@given(records, records)
def test_law_46_equality_is_by_value(a: Any, b: Any) -> None:
    """`a = b` iff classes and fields are equal; what is equal hashes equally."""
    fields = [field.name for field in attrs.fields(type(a)) if field.eq]
    same = type(a) is type(b) and all(getattr(a, name) == getattr(b, name) for name in fields)
    assert (a == b) == same
    assert not same or hash(a) == hash(b)


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
def test_law_46_a_dtype_stays_one_object(dtype: DType) -> None:
    """`loads(dumps(d)) is d`."""
    assert pickle.loads(pickle.dumps(dtype)) is dtype
    assert copy.deepcopy(dtype) is dtype
