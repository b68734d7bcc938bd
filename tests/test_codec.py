"""Plans as JSON: readable, complete, and nothing but data."""

import json
import subprocess
import sys

import pytest

from funcmodel.errors import PlanError, ShapeError
from funcmodel.plan.codec import from_json, to_json
from funcmodel.plan.loading import plan_load
from funcmodel.records.actions import Assign
from funcmodel.records.config import Config, JsonStyle
from funcmodel.records.devices import CPU
from funcmodel.records.expressions import (
    Call,
    Cast,
    Concat,
    Expr,
    FileRef,
    Full,
    Index,
    Live,
    Permute,
    Read,
    Reshape,
    Stack,
    Take,
)
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import ModuleSpec, ParamSpec
from funcmodel.records.plans import LoadPlan, StateDictPlan
from funcmodel.records.reports import LoadPolicy
from funcmodel.records.routes import Routing
from funcmodel.records.tensors import TensorSpec

FILE = FileRef("ckpt/model.safetensors", "safetensors", 8192, "ab" * 16)
W = TensorSpec([4, 2], "bfloat16")


def test_a_plan_that_was_written_when_routings_had_fewer_fields_is_still_read() -> None:
    """Fields are written by position and trailing defaults left out, so a new field can only be the last."""
    routing = '{"Routing": [{"map": [["w", "read"]]}, ["mapped"], ["direct"], 4, 3, 4096, true]}'
    plan = f'{{"LoadPlan": [[], {{"LoadReport": []}}, "", "", {{"map": []}}, {routing}]}}'
    text = f'{{"funcmodel": 1, "shared": [], "value": {plan}}}'
    expected = Routing(
        routes=FrozenMap({"w": "read"}),
        mapped=("mapped",),
        direct=("direct",),
        threads=4,
        buffers=3,
        buffer=4096,
        pinned=True,
    )
    found = from_json(text)
    assert isinstance(found, LoadPlan)
    assert found.routing == expected


def test_a_plan_reads_like_this() -> None:
    plan = StateDictPlan({"w": Read(FILE, "w", W, 4096), "v": Cast(Read(FILE, "v", W, 4112), "float32")})
    assert json.loads(to_json(plan)) == {
        "funcmodel": 1,
        "shared": [
            {"FileRef": ["ckpt/model.safetensors", "safetensors", 8192, "ab" * 16]},
            {"TensorSpec": [[4, 2], {"DType": ["bfloat16"]}]},
        ],
        "value": {
            "StateDictPlan": [
                {
                    "map": [
                        ["w", {"Read": [{"@": 0}, "w", {"@": 1}, 4096]}],
                        ["v", {"Cast": [{"Read": [{"@": 0}, "v", {"@": 1}, 4112]}, {"DType": ["float32"]}]}],
                    ]
                }
            ]
        },
    }


def test_a_plan_made_here_is_the_plan_there() -> None:
    spec = ModuleSpec(name="Net", params={"w": ParamSpec(spec=W), "b": ParamSpec(spec=W)})
    plan = plan_load(spec, {"w": Read(FILE, "w", W, 4096), "x": Read(FILE, "x", W, 4112)}, device_map="cuda:0")
    code = "import sys; from funcmodel.plan.codec import *; print(to_json(from_json(sys.stdin.read())), end='')"
    done = subprocess.run([sys.executable, "-c", code], input=to_json(plan), check=True, capture_output=True, text=True)
    assert from_json(done.stdout) == plan
    assert done.stdout == to_json(plan)


def test_the_layout_of_a_config_survives_though_it_is_no_part_of_equality() -> None:
    config = Config({"b": 1, "a": [1.5, None]}, JsonStyle(4, ascii=True))
    again = from_json(to_json(config))
    assert again.style == config.style
    assert list(again) == ["b", "a"]


def test_a_field_that_an_older_text_lacks_gets_its_default() -> None:
    assert from_json('{"funcmodel": 1, "shared": [], "value": {"LoadPolicy": []}}') == LoadPolicy()


@pytest.mark.parametrize(
    "value",
    [
        '{"LoadPolicy": ["never"]}',
        '{"LoadPolicy": ["init", "ignore", "init", "file", [], 1]}',
        '{"Live": ["w"]}',
        '{"Live": [1, {"TensorSpec": [[2], {"DType": ["I8"]}]}]}',
        '{"TensorSpec": [[-1], {"DType": ["I8"]}]}',
        '{"TensorSpec": [[2], {"DType": ["float33"]}]}',
        '{"TensorSpec": [[true], {"DType": ["I8"]}]}',
        '{"Device": ["cpu"], "Live": []}',
        '{"os.system": ["true"]}',
        '{"__class__": []}',
        '{"@": 0}',
        '{"map": [["a", 1], ["a", 2]]}',
        '{"map": [[[], 1]]}',
        '{"float": "0x1p3"}',
        "{}",
        "NaN",
        "1e",
    ],
)
def test_what_to_json_does_not_write_is_refused(value: str) -> None:
    with pytest.raises(PlanError):
        from_json('{"funcmodel": 1, "shared": [], "value": ' + value + "}")


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '{"funcmodel": 2, "shared": [], "value": 1}', '{"value": 1}', "\ud800"]
)
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        from_json(text)


def test_only_what_is_small_and_equal_is_shared() -> None:
    with pytest.raises(PlanError):
        from_json('{"funcmodel": 1, "shared": [{"LoadPolicy": []}], "value": {"@": 0}}')


def test_an_expression_whose_parts_do_not_fit_is_refused() -> None:
    beyond = Index(Live("w", W), ((0, 5), (0, 2)))
    for value in (beyond, StateDictPlan({"w": beyond}), (Cast(beyond, "float32"),), Assign("w", beyond, CPU)):
        with pytest.raises(ShapeError):
            from_json(to_json(value))


@pytest.mark.parametrize(
    "expr",
    [
        Reshape(Live("w", W), (-1,)),
        Concat((Live("w", W), Live("w", W)), -1),
        Stack((Cast(Permute(Live("w", W), (-1, 0)), "float32"),), 0),
        Index(Take(Live("w", W), -2, (0,)), (0, 0)),
        Call("pkg.mod:fn", (Stack((Live("w", W),), -1),), W),
    ],
)
def test_an_axis_counted_from_the_end_is_refused(expr: Expr) -> None:
    with pytest.raises(ShapeError):
        from_json(to_json(expr))


def test_bottomless_nesting_is_refused_both_ways() -> None:
    expr = Live("w", W)
    for _ in range(150):
        expr = Call("pkg.mod:fn", (expr,), W)
    with pytest.raises(PlanError):
        to_json(expr)
    with pytest.raises(PlanError):
        from_json('{"funcmodel": 1, "shared": [], "value": ' + "[" * 5000 + "]" * 5000 + "}")


@pytest.mark.parametrize("value", [[1], {"a": 1}, object(), FrozenMap(a=[1]), b"x"])
def test_what_is_no_record_is_refused(value: object) -> None:
    with pytest.raises(PlanError):
        to_json(value)


def test_numbers_without_a_place_in_json() -> None:
    spec = TensorSpec([2], "complex64")
    assert '{"complex": [0.0, {"float": "-inf"}]}' in to_json(Full(spec, complex(0, -float("inf"))))
    assert from_json(to_json(Full(spec, complex(0.0, -float("inf"))))).value == complex(0, -float("inf"))
