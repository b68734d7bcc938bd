"""Laws 1 to 8 on the real constructors, against the naive evaluator of `strategies.reference`."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from typing import get_args

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from funcmodel.core import build
from funcmodel.core.casts import exact_cast
from funcmodel.core.lowering import byte_runs, leaves, lowered, reads
from funcmodel.core.shapes import dtype_of, shape_of, spec_of
from funcmodel.errors import ShapeError
from funcmodel.records.dtypes import DType
from funcmodel.records.expressions import (
    Call,
    Cast,
    Concat,
    Expr,
    Full,
    Index,
    Live,
    Noise,
    Permute,
    Read,
    Reshape,
    Stack,
    Take,
)
from funcmodel.records.tensors import TensorSpec
from property_tests.strategies.expressions import (
    dtypes,
    expressions,
    merges,
    shapes,
    slicings,
)
from property_tests.strategies.reference import alike, environment, evaluate, used


@given(expressions())
def test_law_1_spec_of_is_the_shape_and_dtype_of_the_tensor(e: Expr) -> None:
    """spec_of(e) = (shape, dtype) of evaluate(e)"""
    cells = evaluate(e, environment(e))
    spec = spec_of(e)
    assert spec.shape == tuple(cells.shape[:-1]) == shape_of(e)
    assert spec.dtype.bits == 8 * cells.shape[-1]
    assert spec.dtype is dtype_of(e)


@given(expressions())
def test_law_2_smart_constructors_are_sound(e: Expr) -> None:
    """evaluate(rebuilt(e)) ~ evaluate(e)"""
    given_by = environment(e)
    normal = build.rebuilt(e)
    assert spec_of(normal) == spec_of(e)
    assert alike(evaluate(normal, given_by), evaluate(e, given_by), dtype_of(e))


@given(expressions())
def test_law_3_smart_constructors_are_idempotent(e: Expr) -> None:
    """rebuilt(rebuilt(e)) = rebuilt(e)"""
    normal = build.rebuilt(e)
    assert build.rebuilt(normal) == normal


@given(expressions(), st.data())
def test_law_5_index_composes(e: Expr, data: st.DataObject) -> None:
    """index(index(e, a), b) = index(e, a.b)"""
    normal = build.rebuilt(e)
    a = data.draw(slicings(shape_of(normal)))
    once = build.index(normal, a)
    b = data.draw(slicings(shape_of(once)))
    rest = iter(b)
    both: list[int | tuple[int, int]] = []
    for first in a:
        if isinstance(first, int):
            both.append(first)
        else:
            then = next(rest)
            both.append(first[0] + then if isinstance(then, int) else (first[0] + then[0], first[0] + then[1]))
    assert build.index(once, b) == build.index(normal, both)


@given(expressions(), st.data())
def test_law_5_permutes_compose(e: Expr, data: st.DataObject) -> None:
    """permute(permute(e, p), q) = permute(e, p.q), and the inverse order gives e"""
    normal = build.rebuilt(e)
    ndim = len(shape_of(normal))
    p, q = data.draw(st.permutations(range(ndim))), data.draw(st.permutations(range(ndim)))
    assert build.permute(build.permute(normal, p), q) == build.permute(normal, [p[i] for i in q])
    assert build.permute(build.permute(normal, p), [p.index(i) for i in range(ndim)]) == normal


@given(expressions(), dtypes(), dtypes())
def test_law_5_exact_casts_fuse(e: Expr, a: DType, b: DType) -> None:
    """cast(cast(e, a), b) = cast(e, b) where e's dtype fits into a, all three of one kind"""
    source = dtype_of(e)
    normal = build.rebuilt(e)
    if source.kind == a.kind == b.kind and exact_cast(source, a):
        assert build.cast(build.cast(normal, a), b) == build.cast(normal, b)
    assert build.cast(normal, source) == normal


@given(merges(), st.data())
def test_law_4_concat_of_cuts_is_the_whole(e: Expr, data: st.DataObject) -> None:
    """concat(index(e, cuts...)) = e, along every axis, wherever it is cut"""
    for dim, n in enumerate(shape_of(e)):
        cuts = [0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=4))), n]
        assert build.concat([build.narrow(e, dim, a, b) for a, b in pairwise(cuts)], dim) == e


@given(merges())
def test_law_4_stack_of_selections_is_the_whole(e: Expr) -> None:
    """stack(index(e, i) for i) = e, where axes have two rows or more: one row does not say which axis it lost"""
    alone = isinstance(e, Stack) and len(e.parts) == 1
    for dim, n in enumerate(shape_of(e)):
        parts = e.parts if isinstance(e, Concat) and e.dim == dim else (e,)
        if not alone and min([shape_of(p)[dim] for p in parts]) > 1:
            assert build.stack([build.select(e, dim, i) for i in range(n)], dim) == e


@given(expressions(), st.data())
def test_law_4_holds_for_values_of_every_expression(e: Expr, data: st.DataObject) -> None:
    """concat(index(e, cuts...)) ~ e, stack(index(e, i) for i) ~ e, for any e"""
    normal, given_by = build.rebuilt(e), environment(e)
    expected = evaluate(normal, given_by)
    for dim, n in enumerate(shape_of(normal)):
        cuts = [0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=3))), n]
        whole = build.concat([build.narrow(normal, dim, a, b) for a, b in pairwise(cuts)], dim)
        assert alike(evaluate(whole, given_by), expected, dtype_of(e))
        if n:
            whole = build.stack([build.select(normal, dim, i) for i in range(n)], dim)
            assert alike(evaluate(whole, given_by), expected, dtype_of(e))


def assert_normal(e: Expr) -> None:
    match e:
        case Read() | Live() | Full() | Noise():
            pass
        case Call(_, args):
            for arg in args:
                assert_normal(arg)
        case Concat(parts, dim):
            assert len(parts) > 1
            assert 0 not in [shape_of(p)[dim] for p in parts]
            for part in parts:
                assert not (isinstance(part, Concat) and part.dim == dim)
                assert_normal(part)
        case Stack(parts):
            for part in parts:
                assert_normal(part)
        case Index(of, at):
            assert isinstance(of, Read | Live | Noise | Call | Reshape)
            assert at != tuple([(0, n) for n in shape_of(of)])
            assert_normal(of)
        case Take(of, dim, indices):
            assert isinstance(of, Read | Live | Noise | Call | Reshape | Index | Take)
            assert not (isinstance(of, Take) and of.dim >= dim)
            assert indices != tuple(range(indices[0], indices[0] + len(indices)))
            assert_normal(of)
        case Permute(of, dims):
            assert isinstance(of, Read | Live | Noise | Call | Reshape | Index | Take)
            assert list(dims) != sorted(dims)
            assert_normal(of)
        case Cast(of, to):
            assert isinstance(of, Read | Live | Noise | Call | Index | Take | Permute | Cast | Full)
            assert dtype_of(of) is not to
            assert_normal(of)
        case Reshape(of, shape):
            assert not isinstance(of, Reshape | Full)
            assert shape != shape_of(of)
            assert_normal(of)


@given(expressions(), st.data())
def test_law_6_slices_lie_on_leaves(e: Expr, data: st.DataObject) -> None:
    """no normal form has Index above anything but a leaf, Reshape or Call; nor any other node out of its place"""
    normal = build.rebuilt(e)
    assert_normal(normal)
    assert_normal(build.index(normal, data.draw(slicings(shape_of(normal)))))


@given(expressions(), st.booleans())
def test_law_7_lowered_covers_each_element_once(e: Expr, raw: bool) -> None:
    """lowered(e) covers each destination element exactly once and performing it ~ evaluate(e), normal or not"""
    given_by = environment(e)
    lowerable = e if raw else build.rebuilt(e)
    expected = evaluate(e, given_by)
    found, count = torch.zeros_like(expected), torch.zeros(expected.shape[:-1], dtype=torch.int64)
    for copy in lowered(lowerable):
        place = tuple([a if isinstance(a, int) else slice(*a) for a in copy.to])
        source = copy.of
        while isinstance(source, Cast | Permute | Take | Index):
            source = source.of
        assert not isinstance(source, Concat | Stack)
        assert len(copy.to) == count.ndim
        assert tuple(count[place].shape) == shape_of(copy.of)
        count[place] += 1
        found[place] = evaluate(copy.of, given_by)
    assert (count == 1).all()
    assert alike(found, expected, dtype_of(e))


def positions(read: Read, box: tuple[tuple[int, int], ...]) -> set[int]:
    place = torch.arange(read.spec.numel).reshape(read.spec.shape)
    return set(place[tuple([slice(*a) for a in box])].flatten().tolist())


@given(expressions())
def test_law_8_only_what_is_used_is_read(e: Expr) -> None:
    """the boxes of e = the elements of its leaves that e uses, plus opaque arguments; and no more than before"""
    normal = build.rebuilt(e)
    found: dict[str, set[int]] = {}
    for leaf, box in reads(normal):
        found.setdefault(leaf.name, set()).update(positions(leaf, box))
    result, opaque = used(normal)
    before, opaque_before = used(e)
    for name, elements in found.items():
        assert elements == result.get(name, set()) | opaque.get(name, set())
        assert elements <= before.get(name, set()) | opaque_before.get(name, set())
    assert {n for n, elements in found.items() if elements} == set(result) | set(opaque)


@given(merges())
def test_law_8_nothing_is_read_twice(e: Expr) -> None:
    """sum of the sizes of the boxes of e = number of elements that e uses, where no part repeats another"""
    result, opaque = used(e)
    assert not opaque
    assert sum([prod([b - a for a, b in box]) for _, box in reads(e)]) == sum(map(len, result.values()))


@given(expressions())
def test_leaves_are_the_leaves(e: Expr) -> None:
    """a normal form has no leaf that the expression had not, but what became constant"""
    normal = build.rebuilt(e)
    assert {x for x in leaves(normal) if not isinstance(x, Full)} <= set(leaves(e))
    assert {x for x in leaves(normal) if isinstance(x, Read)} == {x for x, _ in reads(normal)}


@given(shapes(max_ndim=4), st.sampled_from([4, 6, 8, 16, 64]), st.data())
def test_byte_runs_are_the_bytes_of_the_box(shape: tuple[int, ...], bits: int, data: st.DataObject) -> None:
    """the runs of a box, in order, are its elements in row-major order; neighbors never touch"""
    at = data.draw(slicings(shape))
    box = tuple([(a, a + 1) if isinstance(a, int) else a for a in at])
    elements = torch.arange(prod(shape)).reshape(shape)[tuple([slice(*a) for a in box])].flatten().tolist()
    expected = [bit for i in elements for bit in range(i * bits, (i + 1) * bits)]
    try:
        runs = byte_runs(shape, bits, box)
    except ShapeError:
        assert bits % 8
        starts = [a for a, b in zip(expected, [None, *expected], strict=False) if b is None or a != b + 1]
        stops = [a + 1 for a, b in zip(expected, [*expected[1:], None], strict=True) if b is None or b != a + 1]
        assert any(edge % 8 for edge in starts + stops)
        return
    found = list(runs)
    assert len(runs) == len(found)
    assert [bit for start, n in found for bit in range(start * 8, (start + n) * 8)] == expected
    assert all(a + n < b for (a, n), (b, _) in pairwise(found))


@given(st.data())
def test_half_bytes_are_cut_between_bytes_or_not_at_all(data: st.DataObject) -> None:
    """for elements of 4 bits: ShapeError, or rebuilt(e) ~ e and every byte that is read or written is whole"""
    spec = TensorSpec(data.draw(shapes().filter(lambda s: prod(s) % 2 == 0)), "F4")
    e = data.draw(expressions(spec))
    try:
        normal = build.rebuilt(e)
    except ShapeError:
        return
    given_by = environment(e)
    assert torch.equal(evaluate(normal, given_by), evaluate(e, given_by))
    for leaf, box in reads(normal):
        byte_runs(leaf.spec.shape, 4, box)
    for copy in lowered(normal):
        byte_runs(spec.shape, 4, tuple([(a, a + 1) if isinstance(a, int) else a for a in copy.to]))


def nodes(e: Expr) -> Iterator[Expr]:
    """Every node of `e`, parents first."""
    yield e
    match e:
        case Index(of) | Permute(of) | Take(of) | Reshape(of) | Cast(of):
            yield from nodes(of)
        case Concat(parts) | Stack(parts) | Call(_, parts):
            for part in parts:
                yield from nodes(part)


@pytest.mark.parametrize(
    "wanted",
    [
        *[pytest.param(lambda e, kind=kind: kind is type(e), id=kind.__name__) for kind in get_args(Expr)],
        pytest.param(lambda e: shape_of(e) == (), id="no axis"),
        pytest.param(lambda e: 0 in shape_of(e), id="no element"),
        pytest.param(lambda e: isinstance(e, Take) and isinstance(build.rebuilt(e), Concat), id="rows across parts"),
        pytest.param(lambda e: isinstance(e, Stack) and isinstance(build.rebuilt(e), Concat), id="rows of two tensors"),
        pytest.param(
            lambda e: isinstance(e, Stack) and isinstance(build.rebuilt(e), Read), id="a stack that is a leaf"
        ),
        pytest.param(lambda e: isinstance(e, Index) and isinstance(build.rebuilt(e), Index | Permute), id="a slice"),
    ],
)
def test_the_strategy_reaches(wanted: Callable[[Expr], bool]) -> None:
    """expressions() holds every node and every case that the laws are about"""
    plain = settings(max_examples=2000, phases=[Phase.generate], database=None, derandomize=True)
    find(expressions(), lambda e: any(map(wanted, nodes(e))), settings=plain)
