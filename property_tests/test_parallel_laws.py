"""Laws of tensor-parallel slices."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from funcmodel.core import build
from funcmodel.core.shapes import dtype_of, shape_of
from funcmodel.core.templates import literal
from funcmodel.plan.casting import cast
from funcmodel.plan.parallel import chunk, tp_slice
from funcmodel.records.expressions import Live
from funcmodel.records.mesh import Layout, LayoutMap, Shard
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.evaluate import materialize
from property_tests.strategies.plans import FLOATS, plans

worlds = st.integers(1, 7)


@st.composite
def cases(draw):
    """A plan, a number of ranks, and a layout for some of the keys: an axis, or sizes of any unevenness."""
    plan, world = draw(plans()), draw(worlds)
    layout = {}
    for key, expr in plan.items():
        shape = shape_of(expr)
        if not shape or draw(st.booleans()):
            continue
        dim = draw(st.integers(-len(shape), len(shape) - 1))
        cuts = sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=world - 1, max_size=world - 1)))
        sizes = tuple(b - a for a, b in zip([0, *cuts], [*cuts, shape[dim]], strict=True))
        layout[literal(key)] = draw(st.sampled_from((dim, Shard(dim), Shard(dim, sizes))))
    return plan, world, layout


@given(cases())
def test_law_20_the_parts_of_all_ranks_tile_every_tensor(case) -> None:
    """concat(tp_slice(l, rank=r)(p)[k] for r) = p[k] for every k that is cut; every rank holds the rest whole."""
    plan, world, layout = case
    parts = [tp_slice(layout, rank=rank, world_size=world)(plan) for rank in range(world)]
    for key, expr in plan.items():
        cut = layout.get(literal(key))
        if cut is None:
            assert all(part[key] == expr for part in parts)
        else:
            dim = cut.dim if isinstance(cut, Shard) else cut
            joined = build.concat([part[key] for part in parts], dim % len(shape_of(expr)))
            assert joined == expr
    assert all(list(part) == list(plan) for part in parts)


@given(cases())
def test_the_parts_are_those_of_torch_chunk(case) -> None:
    """shape of each part = shape of torch.chunk's part, or empty where torch gives fewer; torch is the oracle."""
    plan, world, layout = case
    for key, expr in plan.items():
        cut = layout.get(literal(key))
        if cut is None or (isinstance(cut, Shard) and cut.sizes is not None):
            continue
        dim = (cut.dim if isinstance(cut, Shard) else cut) % len(shape_of(expr))
        theirs = [tuple(part.shape) for part in torch.chunk(torch.empty(shape_of(expr), device="meta"), world, dim)]
        empty = (*shape_of(expr)[:dim], 0, *shape_of(expr)[dim + 1 :])
        theirs += [empty] * (world - len(theirs))
        assert [shape_of(tp_slice(layout, rank=r, world_size=world)(plan)[key]) for r in range(world)] == theirs


@given(cases(), st.sampled_from(FLOATS), st.data())
def test_law_21_tp_slice_commutes_with_cast(case, dtype, data) -> None:
    """tp_slice(l) . cast(d) = cast(d) . tp_slice(l), as plans."""
    plan, world, layout = case
    part = tp_slice(layout, rank=data.draw(st.integers(0, world - 1)), world_size=world)
    assert cast(dtype)(part(plan)) == part(cast(dtype)(plan))
    assert all(dtype_of(expr).kind != "float" or dtype_of(expr) is dtype for expr in part(cast(dtype)(plan)).values())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), worlds, st.data())
def test_the_values_are_those_of_torch_chunk(shape, world, data) -> None:
    """materialize(tp_slice(l, rank=r)(p)) ~ torch.chunk(materialize(p))[r]; torch is the oracle."""
    dim = data.draw(st.integers(0, len(shape) - 1))
    whole = torch.arange(prod(shape), dtype=torch.float32).reshape(shape)
    plan = StateDictPlan({"w": Live("w", TensorSpec(shape, "float32"))})
    for rank, theirs in enumerate(torch.chunk(whole, world, dim)):
        part = tp_slice({"w": dim}, rank=rank, world_size=world)(plan)
        assert torch.equal(materialize(part, live={"w": whole})["w"], theirs)


@given(cases())
def test_a_layout_is_the_same_however_it_is_written(case) -> None:
    """An axis, a Shard and a Layout over "tp" say the same."""
    plan, world, layout = case
    shards = {text: Shard(value) if isinstance(value, int) else value for text, value in layout.items()}
    records = LayoutMap({text: Layout(order=(("tp", shard),)) for text, shard in shards.items()})
    results = [tp_slice(one, rank=world - 1, world_size=world)(plan) for one in (layout, shards, records)]
    assert results[0] == results[1] == results[2]


@given(st.integers(0, 200), st.integers(1, 40))
def test_chunks_are_those_of_torch(n, parts) -> None:
    """chunk(n, k, i) = bounds of torch.chunk(arange(n), k)[i], empty behind the last."""
    theirs = [part.tolist() for part in torch.chunk(torch.arange(n), parts)]
    theirs += [[]] * (parts - len(theirs))
    assert [list(range(*chunk(n, parts, i))) for i in range(parts)] == theirs
