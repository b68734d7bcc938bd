"""From an expression to copies, boxes and bytes."""

import pytest

from funcmodel.core.build import (
    call,
    cast,
    concat,
    full,
    index,
    live,
    narrow,
    permute,
    read,
    reshape,
    select,
    stack,
    take,
)
from funcmodel.core.lowering import ByteRuns, Copy, byte_runs, leaves, lowered, reads, runs_of
from funcmodel.errors import ShapeError
from funcmodel.records.expressions import Cast, Concat, FileRef, Permute, Stack, Take
from funcmodel.records.tensors import TensorSpec

FILE = FileRef("model.safetensors", "safetensors", 10_000, "")
A, B = (read(FILE, name, TensorSpec([4, 6], "float32"), 8) for name in "ab")
X = live("x", TensorSpec([4, 6], "float32"))


class TestCopies:
    def test_a_chain_is_one_copy(self) -> None:
        e = cast(permute(narrow(A, 0, 1, 3), [1, 0]), "bfloat16")
        assert lowered(e) == (Copy(((0, 6), (0, 2)), e),)

    def test_parts_go_side_by_side(self) -> None:
        assert lowered(concat([A, B], 1)) == (Copy(((0, 4), (0, 6)), A), Copy(((0, 4), (6, 12)), B))
        assert lowered(stack([A, B], 1)) == (Copy(((0, 4), 0, (0, 6)), A), Copy(((0, 4), 1, (0, 6)), B))

    def test_stacks_within_concats_within_stacks(self) -> None:
        e = stack([concat([A, stack([select(B, 0, 3), select(A, 0, 2)])]), concat([stack([select(A, 0, 0)] * 2), B])])
        assert [c.to for c in lowered(e)] == [
            (0, (0, 4), (0, 6)),
            (0, 4, (0, 6)),
            (0, 5, (0, 6)),
            (1, 0, (0, 6)),
            (1, 1, (0, 6)),
            (1, (2, 6), (0, 6)),
        ]

    def test_two_axes(self) -> None:
        e = concat([concat([A, B], 1), concat([B, A], 1)])
        assert [(c.to, c.of) for c in lowered(e)] == [
            (((0, 4), (0, 6)), A),
            (((0, 4), (6, 12)), B),
            (((4, 8), (0, 6)), B),
            (((4, 8), (6, 12)), A),
        ]

    def test_opaque_nodes_are_sources(self) -> None:
        mixed = reshape(concat([A, B]), [6, 8])
        assert lowered(mixed) == (Copy(((0, 6), (0, 8)), mixed),)
        called = call("torch:neg", [mixed], TensorSpec([6, 8], "float32"))
        assert [c.of for c in lowered(concat([mixed, called]))] == [mixed, called]

    def test_nothing_to_copy(self) -> None:
        assert lowered(narrow(A, 0, 2, 2)) == ()
        assert lowered(live("e", TensorSpec([3, 0], "int8"))) == ()

    def test_of_a_number(self) -> None:
        assert lowered(index(A, [0, 0])) == (Copy((), index(A, [0, 0])),)

    def test_of_trees_that_no_constructor_made(self) -> None:
        raw = Take(Permute(Cast(Concat((A, B), 0), "bfloat16"), (1, 0)), 1, (7, 0, 1))
        assert [(c.to, c.of) for c in lowered(raw)] == [
            (((0, 6), (0, 1)), cast(permute(narrow(B, 0, 3, 4), [1, 0]), "bfloat16")),
            (((0, 6), (1, 3)), cast(permute(narrow(A, 0, 0, 2), [1, 0]), "bfloat16")),
        ]
        assert [c.to for c in lowered(Permute(Stack((A, B), 0), (1, 0, 2)))] == [
            ((0, 4), 0, (0, 6)),
            ((0, 4), 1, (0, 6)),
        ]


class TestReads:
    def test_boxes(self) -> None:
        e = concat([permute(index(A, [(1, 3), 2]), [0]), select(B, 1, 0)])
        assert list(reads(e)) == [(A, ((1, 3), (2, 3))), (B, ((0, 4), (0, 1)))]

    def test_picked_rows_are_runs(self) -> None:
        e = take(take(A, [3, 0, 0, 1]), [5, 0], 1)
        assert [box for _, box in reads(e)] == [
            ((0, 2), (0, 1)),
            ((0, 2), (5, 6)),
            ((3, 4), (0, 1)),
            ((3, 4), (5, 6)),
        ]

    def test_arguments_of_opaque_nodes_are_whole(self) -> None:
        mixed = reshape(narrow(A, 0, 1, 3), [4, 3])
        assert list(reads(narrow(mixed, 0, 0, 1))) == [(A, ((1, 3), (0, 6)))]
        assert list(reads(narrow(call("torch:neg", [A], A.spec), 0, 0, 1))) == [(A, ((0, 4), (0, 6)))]

    def test_only_stored_tensors_are_read(self) -> None:
        e = concat([X, full(TensorSpec([1, 6], "float32"), 0), A])
        assert [leaf for leaf, _ in reads(e)] == [A]
        assert list(leaves(e)) == [X, full(TensorSpec([1, 6], "float32"), 0), A]

    def test_leaves_below_opaque_nodes_and_repeated(self) -> None:
        e = stack([A, call("torch:add", [A, reshape(transposed(X), [4, 6])], A.spec)])
        assert list(leaves(e)) == [A, A, X]


def transposed(e: object) -> Permute:
    return Permute(e, (1, 0))  # type: ignore[arg-type]


class TestBytes:
    def test_whole_and_leading_rows_are_one_run(self) -> None:
        assert byte_runs((4, 6), 32, ((0, 4), (0, 6))) == ByteRuns(0, 96)
        assert byte_runs((4, 6), 32, ((1, 3), (0, 6))) == ByteRuns(24, 48)
        assert byte_runs((), 64, ()) == ByteRuns(0, 8)

    def test_columns_are_a_run_per_row(self) -> None:
        runs = byte_runs((4, 6), 32, ((0, 4), (2, 3)))
        assert runs == ByteRuns(8, 4, (4,), (24,))
        assert (len(runs), list(runs)) == (4, [(8, 4), (32, 4), (56, 4), (80, 4)])

    def test_loops_that_continue_each_other_are_one(self) -> None:
        assert byte_runs((2, 3, 4), 8, ((0, 2), (0, 3), (1, 2))) == ByteRuns(1, 1, (6,), (4,))
        assert byte_runs((2, 3, 4), 8, ((0, 2), (0, 2), (1, 2))) == ByteRuns(1, 1, (2, 2), (12, 4))
        assert byte_runs((2, 1, 4), 8, ((0, 2), (0, 1), (0, 4))) == ByteRuns(0, 8)

    def test_an_empty_box_has_no_run(self) -> None:
        runs = byte_runs((4, 6), 32, ((2, 2), (0, 6)))
        assert (len(runs), list(runs)) == (0, [])

    def test_half_bytes(self) -> None:
        assert list(byte_runs((2, 4), 4, ((0, 2), (2, 4)))) == [(1, 1), (3, 1)]
        assert list(byte_runs((2, 4), 6, ((1, 2), (0, 4)))) == [(3, 3)]
        for box in (((0, 2), (1, 3)), ((0, 2), (0, 1))):
            with pytest.raises(ShapeError):
                byte_runs((2, 4), 4, box)
        with pytest.raises(ShapeError):
            byte_runs((2, 3), 4, ((0, 1), (0, 3)))


def test_runs_of_rows() -> None:
    assert runs_of((5, 1, 2, 2, 0, 9)) == [(0, 3), (5, 6), (9, 10)]
    assert runs_of(()) == []
