import pytest
import torch

from funcmodel.core import build
from funcmodel.core.shapes import spec_of
from funcmodel.errors import PlanError, ShapeError
from funcmodel.plan.parallel import chunk, tp_slice
from funcmodel.records.expressions import Index, Live
from funcmodel.records.mesh import Flat, Layout, LayoutMap, Only, Shard
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec


def live(key: str, shape=(8, 6), dtype="float32") -> Live:
    return Live(key, TensorSpec(shape, dtype))


PLAN = StateDictPlan({key: live(key) for key in ("layers.0.up", "layers.0.down", "norm")})
LAYOUT = {"layers.{i}.up": 0, "layers.{i}.down": Shard(-1)}


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 7, 10, 32003])
def test_chunks_are_those_of_torch(n, parts) -> None:
    ours = [chunk(n, parts, i) for i in range(parts)]
    theirs = [part.tolist() for part in torch.chunk(torch.arange(n), parts)]
    theirs += [[]] * (parts - len(theirs))
    assert [list(range(*bounds)) for bounds in ours] == theirs


@pytest.mark.parametrize(("n", "parts", "i"), [(4, 2, 2), (4, 2, -1), (4, 0, 0), (-1, 2, 0)])
def test_there_is_no_other_chunk(n, parts, i) -> None:
    with pytest.raises(PlanError):
        chunk(n, parts, i)


def test_each_rank_gets_its_part_and_whole_what_no_layout_names() -> None:
    part = tp_slice(LAYOUT, rank=1, world_size=4)(PLAN)
    assert part["layers.0.up"] == Index(PLAN["layers.0.up"], ((2, 4), (0, 6)))
    assert part["layers.0.down"] == Index(PLAN["layers.0.down"], ((0, 8), (2, 4)))
    assert part["norm"] == PLAN["norm"]
    assert list(part) == list(PLAN)


def test_uneven_and_empty_parts_lose_no_row() -> None:
    shapes = [spec_of(tp_slice(LAYOUT, rank=rank, world_size=5)(PLAN)["layers.0.up"]).shape for rank in range(5)]
    assert shapes == [(2, 6), (2, 6), (2, 6), (2, 6), (0, 6)]


def test_explicit_sizes_count_instead_of_chunks() -> None:
    layout = {"norm": Shard(0, sizes=(5, 0, 3))}
    parts = [tp_slice(layout, rank=rank, world_size=3)(PLAN)["norm"] for rank in range(3)]
    assert [spec_of(part).shape[0] for part in parts] == [5, 0, 3]
    assert build.concat(parts, 0) == PLAN["norm"]


def test_the_first_template_that_matches_counts() -> None:
    first = tp_slice({"norm": Layout(), "{*key}": 0}, rank=0, world_size=2)(PLAN)
    assert first["norm"] == PLAN["norm"]
    assert spec_of(tp_slice({"{*key}": 0, "norm": 1}, rank=0, world_size=2)(PLAN)["norm"]).shape == (4, 6)


def test_a_layout_over_the_one_axis_is_welcome() -> None:
    dims = {"layers.{i}.up": 0, "norm": 1}
    records = LayoutMap({text: Layout(order=(("tp", Shard(dim)),)) for text, dim in dims.items()})
    assert tp_slice(records, rank=1, world_size=2)(PLAN) == tp_slice(dims, rank=1, world_size=2)(PLAN)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(only=(Only(axis="pp", index=0),)),
        Layout(flat=Flat(axis="dp")),
        Layout(order=(("dp", Shard(0)),)),
        Layout(order=(("tp", Shard(0)), ("dp", Shard(0)))),
        Layout(order=(("tp", Shard(0)), ("tp", Shard(0)))),
    ],
)
def test_a_layout_that_needs_the_mesh_is_refused_before_there_is_a_plan(layout) -> None:
    with pytest.raises(PlanError) as caught:
        tp_slice({"norm": layout}, rank=0, world_size=2)
    assert (caught.value.template, caught.value.layout) == ("norm", layout)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_there_is_no_such_rank(rank, world_size) -> None:
    with pytest.raises(PlanError):
        tp_slice(LAYOUT, rank=rank, world_size=world_size)


def test_a_template_that_matches_nothing_is_a_typing_error() -> None:
    with pytest.raises(PlanError) as caught:
        tp_slice({**LAYOUT, "nrom": 0}, rank=0, world_size=2)(PLAN)
    assert (caught.value.templates, caught.value.near) == (("nrom",), ("norm",))


def test_axes_and_sizes_that_do_not_fit_are_refused() -> None:
    for dim in (2, -3):
        with pytest.raises(ShapeError) as caught:
            tp_slice({"norm": dim}, rank=0, world_size=2)(PLAN)
        assert caught.value.key == "norm"
    with pytest.raises(ShapeError) as sizes:
        tp_slice({"norm": Shard(0, sizes=(4, 3))}, rank=0, world_size=2)(PLAN)
    assert (sizes.value.key, sizes.value.expected) == ("norm", 8)
    with pytest.raises(ShapeError) as negative:
        tp_slice({"norm": Shard(0, sizes=(10, -2))}, rank=0, world_size=2)(PLAN)
    assert negative.value.found == (10, -2)
    with pytest.raises(PlanError):
        tp_slice({"norm": Shard(0, sizes=(4, 2, 2))}, rank=0, world_size=2)


def test_a_scale_goes_with_its_weight_or_is_said_to_stay() -> None:
    weight, scale = live("up.weight", dtype="float8_e4m3fn"), live("up.weight_scale", (8, 1))
    source = StateDictPlan({"up.weight": weight, "up.weight_scale": scale})
    with pytest.raises(PlanError) as caught:
        tp_slice({"up.weight": 0}, rank=0, world_size=2)(source)
    assert caught.value.keys == ("up.weight", "up.weight_scale")
    both = tp_slice({"up.weight": 0, "up.weight_scale": 0}, rank=1, world_size=2)(source)
    assert [spec_of(expr).shape for expr in both.values()] == [(4, 6), (4, 1)]
    columns = tp_slice({"up.weight": 1, "up.weight_scale": Layout()}, rank=1, world_size=2)(source)
    assert [spec_of(expr).shape for expr in columns.values()] == [(8, 3), (8, 1)]
    one = StateDictPlan({"up.weight": weight, "up.weight_scale": live("s", ())})
    assert spec_of(tp_slice({"up.weight": 0}, rank=1, world_size=2)(one)["up.weight"]).shape == (4, 6)
