"""The smart constructors: what each gives, what each refuses, and what vanishes. Laws: `property_tests`."""

from collections.abc import Callable

import pytest

from funcmodel.core.build import (
    call,
    cast,
    concat,
    full,
    index,
    narrow,
    noise,
    permute,
    read,
    rebuilt,
    reshape,
    select,
    stack,
    take,
    transpose,
)
from funcmodel.core.shapes import spec_of
from funcmodel.errors import PlanError, ShapeError
from funcmodel.records.expressions import (
    Call,
    Cast,
    Concat,
    Expr,
    FileRef,
    Full,
    Index,
    Permute,
    Read,
    Reshape,
    Stack,
    Take,
)
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec

FILE = FileRef("model.safetensors", "safetensors", 10_000, "")


def stored(name: str, *shape: int, dtype: str = "float32") -> Read:
    return read(FILE, name, TensorSpec(shape, dtype), 8)


A, B, C = stored("a", 4, 6), stored("b", 4, 6), stored("c", 2, 6)
Q, K, V = stored("q", 8, 4), stored("k", 2, 4), stored("v", 2, 4)


class TestSlices:
    def test_of_a_leaf(self) -> None:
        assert index(A, [(1, 3)]) == Index(A, ((1, 3), (0, 6)))
        assert index(A, [-1, slice(-2, None)]) == Index(A, (3, (4, 6)))
        assert select(A, -1, 2) == Index(A, ((0, 4), 2))
        assert narrow(A, 1, 2, 6) == Index(A, ((0, 4), (2, 6)))

    def test_bounds_beyond_the_end_mean_the_end(self) -> None:
        assert index(A, [(2, 99)]) == index(A, [(2, 4)])
        assert index(A, [slice(-99, 1)]) == index(A, [(0, 1)])

    def test_the_whole_is_the_thing_itself(self) -> None:
        assert index(A, []) is A
        assert index(A, [(0, 4), slice(None)]) is A

    def test_nothing_needs_no_leaf(self) -> None:
        assert index(A, [(3, 3)]) == Full(TensorSpec([0, 6], "float32"), 0.0)
        assert index(A, [(3, 1)]) == index(A, [(0, 0)])

    def test_an_empty_leaf_stays(self) -> None:
        empty = stored("e", 0, 6)
        assert index(empty, [(0, 0)]) is empty
        assert concat([empty, empty]) is empty

    def test_go_down_to_the_leaves(self) -> None:
        qkv = concat([Q, K, V])
        assert narrow(qkv, 0, 0, 8) is Q
        assert narrow(qkv, 0, 7, 9) == Concat((narrow(Q, 0, 7, 8), narrow(K, 0, 0, 1)), 0)
        assert select(qkv, 0, 11) == select(V, 0, 1)
        assert select(stack([A, B], 1), 1, 1) is B
        assert narrow(transpose(cast(A, "bfloat16")), 0, 0, 2) == transpose(cast(narrow(A, 1, 0, 2), "bfloat16"))
        assert index(take(A, [3, 0, 2]), [(1, 3), (0, 2)]) == take(narrow(A, 1, 0, 2), [0, 2])
        assert select(take(A, [3, 0, 2]), 0, 0) == select(A, 0, 3)

    def test_of_slices_are_slices(self) -> None:
        assert index(index(A, [(1, 4)]), [(1, 3), 0]) == index(A, [(2, 4), 0])

    @pytest.mark.parametrize("at", [[4], [-5], [0, 0, 0], [slice(0, 4, 2)], [slice(None, None, -1)]])
    def test_refused(self, at: list[int | tuple[int, int] | slice]) -> None:
        with pytest.raises(ShapeError):
            index(A, at)

    @pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 5), (3, 2)])
    def test_narrow_takes_no_liberties(self, start: int, stop: int) -> None:
        with pytest.raises(ShapeError) as caught:
            narrow(A, 0, start, stop)
        assert caught.value.fields == {"expected": 4, "found": (start, stop)}


class TestJoining:
    def test_neighbors_are_one_again(self) -> None:
        assert concat([narrow(A, 0, 0, 1), narrow(A, 0, 1, 4)]) is A
        assert concat([narrow(A, 1, 2, 3), narrow(A, 1, 3, 5)], 1) == narrow(A, 1, 2, 5)
        assert concat([narrow(A, 0, 0, 1), narrow(A, 0, 2, 4)]) == Concat((narrow(A, 0, 0, 1), narrow(A, 0, 2, 4)), 0)
        assert stack([select(A, 1, i) for i in range(6)], 1) is A
        assert stack([select(A, 1, i) for i in range(6)], 0) == transpose(A)

    def test_also_below_what_changes_every_element_alike(self) -> None:
        e = cast(permute(A, [1, 0]), "bfloat16")
        assert concat([narrow(e, 0, 0, 2), narrow(e, 0, 2, 6)]) == e
        merged = concat([Q, K, V])
        assert concat([narrow(merged, 1, 0, 1), narrow(merged, 1, 1, 4)], 1) == merged
        experts = stack([A, B])
        assert stack([select(experts, 1, i) for i in range(4)], 1) == experts

    def test_picked_rows_count_as_neighbors(self) -> None:
        e = take(A, [3, 0, 2, 1])
        assert concat([narrow(e, 0, 0, 1), narrow(e, 0, 1, 4)]) == e
        assert concat([take(A, [0, 2]), take(A, [1, 3])]) == take(A, [0, 2, 1, 3])

    def test_rows_of_several_tensors(self) -> None:
        rows = [select(A, 0, i) for i in range(4)] + [select(C, 0, i) for i in range(2)]
        assert stack(rows) == Concat((A, C), 0)

    def test_flat_and_without_empty_parts(self) -> None:
        nothing = stored("n", 0, 6)
        assert concat([concat([A, B]), nothing, C]) == Concat((A, B, C), 0)
        assert concat([nothing, A]) is A
        assert concat([A]) is A
        inner = concat([A, B], 1)
        assert concat([inner, inner]) == Concat((inner, inner), 0)

    def test_refused(self) -> None:
        with pytest.raises(ShapeError):
            concat([])
        with pytest.raises(ShapeError):
            stack([])
        with pytest.raises(ShapeError) as caught:
            concat([A, Q])
        assert (caught.value.fields["expected"], caught.value.fields["found"]) == (A.spec, Q.spec)
        with pytest.raises(ShapeError):
            concat([A, cast(B, "bfloat16")])
        with pytest.raises(ShapeError):
            concat([A, B], 2)
        with pytest.raises(ShapeError):
            concat([select(select(A, 0, 0), 0, 0)])
        with pytest.raises(ShapeError) as caught:
            stack([A, C])
        assert (caught.value.fields["expected"], caught.value.fields["found"]) == (A.spec, C.spec)
        with pytest.raises(ShapeError):
            stack([A, B], 3)

    def test_the_new_axis_may_be_last(self) -> None:
        assert stack([A, B], -1) == stack([A, B], 2) == Stack((A, B), 2)


class TestAxes:
    def test_orders_compose_and_cancel(self) -> None:
        x = stored("x", 2, 3, 4)
        assert permute(permute(x, [2, 0, 1]), [1, 2, 0]) is x
        assert permute(x, [-1, 0, 1]) == Permute(x, (2, 0, 1))
        assert transpose(x, 0, -1) == Permute(x, (2, 1, 0))

    def test_below_joining(self) -> None:
        assert transpose(concat([A, B])) == Concat((transpose(A), transpose(B)), 1)
        assert permute(stack([A, B]), [1, 0, 2]) == Stack((A, B), 1)

    @pytest.mark.parametrize("dims", [[0], [0, 0], [0, 2], [0, 1, 2]])
    def test_refused(self, dims: list[int]) -> None:
        with pytest.raises(ShapeError):
            permute(A, dims)


class TestRows:
    def test_ascending_neighbors_are_a_slice(self) -> None:
        assert take(A, [1, 2, 3]) == narrow(A, 0, 1, 4)
        assert take(A, range(4)) is A
        assert take(A, []) == Full(TensorSpec([0, 6], "float32"), 0.0)
        assert take(A, [-1, 0]) == Take(A, 0, (3, 0))

    def test_compose(self) -> None:
        assert take(take(A, [3, 1, 0]), [2, 0]) == take(A, [0, 3])
        assert take(take(A, [3, 1, 0]), [2, 1]) == narrow(A, 0, 0, 2)
        assert take(narrow(A, 0, 1, 4), [2, 0]) == take(A, [3, 1])
        assert take(take(A, [5, 0], 1), [3, 0], 0) == take(take(A, [3, 0], 0), [5, 0], 1)

    def test_across_parts(self) -> None:
        assert take(concat([A, B]), [0, 2, 5, 6, 1]) == Concat(
            (take(A, [0, 2]), narrow(B, 0, 1, 3), select_row(A, 1)), 0
        )
        assert take(stack([A, B]), [1, 0, 1]) == Stack((B, A, B), 0)
        assert take(concat([A, B]), [5, 0], 1) == Concat((take(A, [5, 0], 1), take(B, [5, 0], 1)), 0)

    @pytest.mark.parametrize("indices", [[4], [0, -5]])
    def test_refused(self, indices: list[int]) -> None:
        with pytest.raises(ShapeError) as caught:
            take(A, indices)
        assert caught.value.fields == {"expected": 4, "found": indices[-1]}


def select_row(of: Expr, i: int) -> Expr:
    return narrow(of, 0, i, i + 1)


class TestShapes:
    def test_vanish_and_compose(self) -> None:
        assert reshape(A, [4, 6]) is A
        assert reshape(reshape(A, [24]), [-1, 6]) is A
        assert reshape(A, [2, -1]) == Reshape(A, (2, 12))
        assert spec_of(reshape(A, [2, 3, -1])).shape == (2, 3, 4)

    def test_leading_axes_are_transparent(self) -> None:
        heads = reshape(A, [2, 2, 6])
        assert select(heads, 0, 1) == narrow(A, 0, 2, 4)
        assert index(heads, [1, 1]) == select(A, 0, 3)
        assert index(heads, [(1, 2), (0, 1), (0, 3)]) == reshape(index(A, [(2, 3), (0, 3)]), [1, 1, 3])
        flat = reshape(heads, [24])
        assert narrow(flat, 0, 6, 12) == select(A, 0, 1)
        assert narrow(flat, 0, 13, 15) == index(A, [2, (1, 3)])
        assert narrow(flat, 0, 13, 20) == Index(reshape(narrow(A, 0, 2, 4), [12]), ((1, 8),))

    def test_mixing_axes_is_opaque(self) -> None:
        mixed = reshape(A, [6, 4])
        assert narrow(mixed, 0, 0, 3) == Index(mixed, ((0, 3), (0, 4)))

    @pytest.mark.parametrize("shape", [[5, 5], [-1, -1], [-1, 7], [-2, -12], [0, -1], []])
    def test_refused(self, shape: list[int]) -> None:
        with pytest.raises(ShapeError):
            reshape(A, shape)


class TestCasts:
    def test_fuse_only_where_the_first_is_exact(self) -> None:
        x = stored("x", 2, dtype="bfloat16")
        assert cast(x, "bfloat16") is x
        assert cast(cast(x, "float32"), "bfloat16") is x
        assert cast(cast(x, "float32"), "float16") == Cast(x, "float16")
        assert cast(cast(x, "float16"), "float32") == Cast(Cast(x, "float16"), "float32")

    def test_never_across_kinds(self) -> None:
        x = stored("x", 2, dtype="uint8")
        assert cast(cast(x, "int32"), "int64") == Cast(x, "int64")
        assert cast(cast(x, "float32"), "float64") == Cast(Cast(x, "float32"), "float64")

    def test_commute_with_everything_else(self) -> None:
        a, b = cast(A, "bfloat16"), cast(B, "bfloat16")
        assert cast(transpose(A), "bfloat16") == transpose(a)
        assert cast(reshape(A, [24]), "bfloat16") == reshape(a, [24])
        assert cast(take(A, [3, 0]), "bfloat16") == take(a, [3, 0])
        assert cast(concat([A, B]), "bfloat16") == concat([a, b])
        assert cast(stack([A, B]), "bfloat16") == stack([a, b])
        mixed = narrow(reshape(A, [6, 4]), 0, 1, 3)
        assert cast(transpose(mixed), "bfloat16") == transpose(narrow(reshape(a, [6, 4]), 0, 1, 3))

    def test_half_bytes_are_not_converted(self) -> None:
        with pytest.raises(ShapeError):
            cast(stored("x", 4, dtype="F4"), "float32")
        with pytest.raises(ShapeError):
            cast(A, "F4")


class TestConstants:
    SPEC = TensorSpec([2, 3], "float32")

    def test_stay_one_constant(self) -> None:
        one = full(self.SPEC, 1)
        assert one == Full(self.SPEC, 1.0)
        assert index(one, [0]) == full(TensorSpec([3], "float32"), 1)
        assert concat([one, one]) == full(TensorSpec([4, 3], "float32"), 1)
        assert stack([one, one], 1) == full(TensorSpec([2, 2, 3], "float32"), 1)
        assert transpose(one) == full(TensorSpec([3, 2], "float32"), 1)
        assert take(one, [1, 0]) == one
        assert reshape(one, [6]) == full(TensorSpec([6], "float32"), 1)
        assert cast(one, "int8") == full(TensorSpec([2, 3], "int8"), 1)

    def test_zeros_of_two_signs_are_two_constants(self) -> None:
        assert isinstance(concat([full(self.SPEC, 0.0), full(self.SPEC, -0.0)]), Concat)
        nan = full(self.SPEC, float("nan"))
        assert isinstance(concat([nan, full(self.SPEC, float("nan"))]), Full)

    def test_keep_a_cast_that_changes_them(self) -> None:
        assert cast(full(self.SPEC, 0.1), "float64") == Cast(full(self.SPEC, 0.1), "float64")
        assert cast(full(self.SPEC, 1e30), "float16") == Cast(full(self.SPEC, 1e30), "float16")

    @pytest.mark.parametrize(
        ("dtype", "value"),
        [("int8", 128), ("int8", 0.5), ("uint8", -1), ("bool", 2), ("float32", 1j), ("int64", 2**63)],
    )
    def test_refused(self, dtype: str, value: complex) -> None:
        with pytest.raises(ShapeError) as caught:
            full(TensorSpec([2], dtype), value)
        assert caught.value.fields["found"] == value

    def test_noise_is_a_float(self) -> None:
        assert noise(self.SPEC, std=2, seed=3).std == 2.0
        with pytest.raises(ShapeError):
            noise(TensorSpec([2], "int8"))
        with pytest.raises(ShapeError):
            noise(self.SPEC, std=-1.0)


class TestHalfBytes:
    X = stored("x", 3, 8, dtype="F4")

    def test_cut_between_bytes(self) -> None:
        assert index(self.X, [1, (2, 4)]) == Index(self.X, (1, (2, 4)))
        assert concat([narrow(self.X, 1, 0, 2), narrow(self.X, 1, 2, 8)], 1) == self.X
        assert take(self.X, [2, 0]) == Take(self.X, 0, (2, 0))

    @pytest.mark.parametrize(
        "build",
        [
            lambda x: narrow(x, 1, 1, 3),
            lambda x: narrow(x, 1, 0, 3),
            lambda x: select(x, 1, 2),
            lambda x: take(x, [2, 0], 1),
            lambda x: transpose(x),
            lambda x: stack([x, x], 2),
            lambda x: select(stored("odd", 2, 3, dtype="F4"), 0, 1),
            lambda x: concat([stored("odd", 2, 3, dtype="F4")] * 2, 1),
        ],
    )
    def test_never_within_one(self, build: Callable[[Expr], Expr]) -> None:
        with pytest.raises(ShapeError):
            build(self.X)


class TestLeavesAndCalls:
    def test_a_read_lies_within_its_file(self) -> None:
        with pytest.raises(ShapeError):
            read(FILE, "x", TensorSpec([2500], "float32"), 8)
        with pytest.raises(ShapeError):
            read(FILE, "x", TensorSpec([1], "float32"), -1)

    def test_call_names_its_function(self) -> None:
        spec = TensorSpec([24], "float32")
        e = call(spec_of, [A, B], spec, axes=[0, 1], alpha=0.5)
        assert e == Call("funcmodel.core.shapes:spec_of", (A, B), spec, {"axes": (0, 1), "alpha": 0.5})
        assert e == call("funcmodel.core.shapes:spec_of", [A, B], spec, alpha=0.5, axes=(0, 1))
        assert isinstance(e.static, FrozenMap)
        assert hash(e) == hash(call(spec_of, [A, B], spec, alpha=0.5, axes=(0, 1)))

    @pytest.mark.parametrize("fn", ["torch.neg", "torch:a.b", ":f", "m:", lambda x: x, [].append])
    def test_a_function_without_a_module_level_name_is_refused(self, fn: str) -> None:
        with pytest.raises(PlanError):
            call(fn, [A], A.spec)

    def test_slices_stop_at_calls(self) -> None:
        e = call("torch:neg", [A], A.spec)
        assert narrow(e, 0, 0, 2) == Index(e, ((0, 2), (0, 6)))


def test_rebuilt_gives_the_normal_form() -> None:
    assert rebuilt(Index(Concat((A, B), 0), ((0, 4), (0, 6)))) is A
    assert rebuilt(Full(A.spec, 1)) == full(A.spec, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        Concat((A, Q), 0),
        Take(A, 0, (4,)),
        Index(A, ((0, 5), (0, 6))),
        Index(A, ((3, 2), (0, 6))),
        Index(A, (-1, (0, 6))),
        Index(A, (4, (0, 6))),
        Index(A, ((0, 4),)),
        Permute(A, (0, 0)),
        Reshape(A, (5, 5)),
        Full(TensorSpec([1], "int8"), 300),
        Read(FILE, "odd", TensorSpec([3], "F4"), 8),
        Call("torch:neg", (A,), TensorSpec([3], "F4")),
    ],
    ids=lambda e: type(e).__name__,
)
def test_rebuilt_checks(wrong: Expr) -> None:
    with pytest.raises(ShapeError):
        rebuilt(wrong)
