"""Laws of the codec."""

import json
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funcmodel.errors import KeyMismatchError, PlanError
from funcmodel.plan.codec import CLASSES, from_json, to_json
from funcmodel.plan.loading import checked, plan_load
from funcmodel.plan.saving import plan_save
from funcmodel.records.expressions import Full, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec
from property_tests.strategies.records import records, records_of
from property_tests.strategies.specs import FILE, Case, cases, fitting_cases

FEW = max(10, settings().max_examples // 5)  # per class, of which there are some sixty


def alike(a: Any, b: Any) -> bool:
    """Equality that tells 1 from 1.0 and True, 0.0 from -0.0, one order from another, and takes NaN for NaN."""
    if type(a) is not type(b):
        return False
    if attrs.has(type(a)):
        return all(alike(getattr(a, f.name), getattr(b, f.name)) for f in attrs.fields(type(a)))
    if isinstance(a, FrozenMap):
        return alike(tuple(a.items()), tuple(b.items()))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return repr(a) == repr(b)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@settings(max_examples=FEW)
@given(st.data())
def test_law_41_json_gives_back_every_record(cls: type, data: st.DataObject) -> None:
    """`from_json(to_json(r)) = r` to the last type, sign and order; the text is JSON without NaN, on one line."""
    record = data.draw(records_of(cls))
    text = to_json(record)
    again = from_json(text)
    assert again == record
    assert alike(again, record)
    assert to_json(again) == text
    assert "\n" not in text
    json.loads(text, parse_constant=lambda literal: pytest.fail(literal))


@given(cases(), fitting_cases())
def test_law_41_json_gives_back_every_plan(case: Case, fitting: Case) -> None:
    """`from_json(to_json(plan)) = plan` for the plans that planners make, and what is refused stays refused."""
    plan = plan_load(case.spec, case.source)
    again = from_json(to_json(plan))
    assert alike(again, plan)
    save = plan_save(fitting.source, max_shard_size=64)
    assert alike(from_json(to_json((save, fitting.spec))), (save, fitting.spec))
    for one in (plan, again):
        if plan.report.missing_keys:
            with pytest.raises(KeyMismatchError):
                checked(one)


@pytest.mark.parametrize("value", [float("nan"), complex(float("nan"), float("-inf")), -0.0, 1, True, 1.0, 5e-324])
def test_law_41_numbers_are_exact(value: complex) -> None:
    """`from_json(to_json(Full(spec, x)))` holds `x`, bit for bit and of its type."""
    assert alike(from_json(to_json(Full(TensorSpec([2], "float32"), value))).value, value)


mutilated = st.sampled_from(
    [
        *[
            None,
            True,
            -1,
            3.5,
            10**50,
            "",
            "Read",
            [],
            [1],
            {},
            {"@": 0},
            {"@": -1},
            {"@": 10**9},
            {"@": "0"},
            {"Read": []},
        ],
        *[
            {"Read": 1},
            {"nope": []},
            {"map": [[1, 2]]},
            {"map": [["a"]]},
            {"map": [["a", 1], ["a", 1]]},
            {"float": "1"},
        ],
        {"DType": ["f13"]},
        {"DType": [1]},
        {"complex": [1]},
        {"Device": [""]},
        {"TensorSpec": [[-1], {"DType": ["I8"]}]},
    ]
)


@given(records, st.data())
def test_any_text_gives_a_record_or_a_plan_error(record: Any, data: st.DataObject) -> None:
    """`from_json(x)` is a value or raises `PlanError`, for every `x` near to what `to_json` writes and for any text."""
    whole = json.loads(to_json(record))
    spots: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for at in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            spots.append((node, at))
            visit(node[at])

    visit(whole)
    node, at = data.draw(st.sampled_from(spots))
    node[at] = data.draw(mutilated)
    try:
        again = from_json(json.dumps(whole))
    except PlanError:
        return
    hash(again)
    assert alike(from_json(to_json(again)), again)


@given(st.text())
def test_no_text_gives_anything_but_a_plan_error(text: str) -> None:
    """`from_json(x)` raises `PlanError` for text that `to_json` never writes."""
    with pytest.raises(PlanError):
        from_json(text)


def test_files_and_specs_stand_once() -> None:
    """The text of `n` reads of one file grows by their names and offsets alone."""
    reads = tuple(Read(FILE, f"k{i:05}", TensorSpec([4, 4], "float32"), i) for i in range(1000))
    text = to_json(reads)
    assert text.count(FILE.path) == text.count("TensorSpec") == 1
    assert len({id(read.file) for read in from_json(text)}) == 1
