"""Shapes and dtypes of expressions, node by node, with torch as the oracle."""

import pytest
import torch

from funcmodel.core.shapes import dtype_of, selected, shape_of, spec_of
from funcmodel.records.dtypes import BFLOAT16, FLOAT32
from funcmodel.records.expressions import (
    Call,
    Cast,
    Concat,
    Expr,
    FileRef,
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

SPEC = TensorSpec([4, 3, 2], "float32")
X = Live("x", SPEC)
T = torch.zeros(4, 3, 2)


@pytest.mark.parametrize(
    "leaf", [X, Full(SPEC, 0.0), Noise(SPEC, 0.0, 1.0, 0), Read(FileRef("f", "safetensors", 200, ""), "x", SPEC, 8)]
)
def test_a_leaf_gives_its_own_record(leaf: Expr) -> None:
    assert spec_of(leaf) is SPEC


@pytest.mark.parametrize(
    ("expr", "tensor"),
    [
        (Index(X, (1, (0, 2), (1, 2))), T[1, 0:2, 1:2]),
        (Index(X, (1, 0, 1)), T[1, 0, 1]),
        (Index(X, ((2, 2), (0, 3), (0, 2))), T[2:2]),
        (Concat((X, X, X), 1), torch.cat([T, T, T], 1)),
        (Stack((X, X), 0), torch.stack([T, T], 0)),
        (Stack((X, X), 3), torch.stack([T, T], 3)),
        (Permute(X, (2, 0, 1)), T.permute(2, 0, 1)),
        (Take(X, 1, (2, 0, 2, 1)), T[:, [2, 0, 2, 1]]),
        (Reshape(X, (12, 2)), T.reshape(12, 2)),
        (Reshape(Stack((X, X), 1), (8, 6)), torch.stack([T, T], 1).reshape(8, 6)),
    ],
)
def test_structure(expr: Expr, tensor: torch.Tensor) -> None:
    assert shape_of(expr) == spec_of(expr).shape == tuple(tensor.shape)
    assert dtype_of(expr) is FLOAT32


def test_only_cast_and_call_change_the_dtype() -> None:
    half = Cast(X, "bfloat16")
    assert spec_of(half) == TensorSpec([4, 3, 2], "bfloat16")
    assert dtype_of(Permute(Stack((half, half), 0), (3, 2, 1, 0))) is BFLOAT16
    assert spec_of(Call("torch:angle", (X,), TensorSpec([7], "bfloat16"))) == TensorSpec([7], "bfloat16")


def test_selected_drops_the_axes_of_ints() -> None:
    assert selected(()) == ()
    assert selected((0, (1, 1), (2, 5), 3)) == (0, 3)
