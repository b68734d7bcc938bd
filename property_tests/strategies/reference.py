"""A naive evaluator of expression trees, normal or not: the oracle of the expression laws.

A tensor is its *cells*: a uint8 tensor of shape `[*shape, bytes]` with the bytes of each element last, so that slicing
and joining mean the same for every dtype, also those for which torch lacks the operation. Elements of half a byte take
one cell each. Only `Cast` and `Noise` look at numbers.
"""

import warnings
from collections.abc import Callable, Mapping
from zlib import crc32

import torch

from funcmodel.records.dtypes import DType
from funcmodel.records.expressions import (
    Call,
    Cast,
    Concat,
    Expr,
    Full,
    Index,
    Leaf,
    Live,
    Noise,
    Permute,
    Read,
    Reshape,
    Stack,
    Take,
)
from funcmodel.records.tensors import TensorSpec

Cells = torch.Tensor
PATTERNS = (0x00, 0xFF, 0x80, 0x7F)


def torch_type(dtype: DType) -> torch.dtype:
    found = getattr(torch, str(dtype.torch))
    assert isinstance(found, torch.dtype)
    return found


def tensor_for(name: str, spec: TensorSpec) -> torch.Tensor:
    """A tensor of `spec` whose bits depend on `name` alone: any bits, NaNs, infinities and denormals among them."""
    generator = torch.Generator().manual_seed(crc32(f"{name} {spec!r}".encode()))
    cell = max(spec.dtype.bits // 8, 1)
    numel = spec.nbytes // cell
    cells = torch.randint(0, 256, (numel, cell), dtype=torch.uint8, generator=generator)
    special = torch.randint(0, 4 * len(PATTERNS), (numel,), generator=generator)
    for i, pattern in enumerate(PATTERNS):
        cells[special == i] = pattern
    if spec.dtype.kind == "bool":
        cells &= 1
    flat = cells.flatten().view(torch_type(spec.dtype))
    if spec.dtype.pack == 1:
        return flat.reshape(spec.shape)
    fits = spec.shape and spec.shape[-1] % spec.dtype.pack == 0
    return flat.reshape(*spec.shape[:-1], spec.shape[-1] // spec.dtype.pack) if fits else flat


def environment(expr: Expr) -> dict[str, torch.Tensor]:
    """A tensor for the name of every `Read` and the key of every `Live` in `expr`."""
    found: dict[str, torch.Tensor] = {}
    fold(expr, leaf=lambda x: _collect(x, found), cast=lambda cells, source, target: cells)
    return found


def _collect(leaf: Leaf, found: dict[str, torch.Tensor]) -> Cells:
    if isinstance(leaf, Read | Live):
        name = leaf.name if isinstance(leaf, Read) else leaf.key
        found[name] = tensor_for(name, leaf.spec)
    return torch.zeros((*leaf.spec.shape, 1), dtype=torch.uint8)


def cells_of(tensor: torch.Tensor, spec: TensorSpec) -> Cells:
    raw = tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    if spec.dtype.bits == 4:
        raw = torch.stack([raw & 15, raw >> 4], 1).reshape(-1)[: spec.numel]
    return raw.reshape(*spec.shape, max(spec.dtype.bits // 8, 1))


def numbers_of(cells: Cells, dtype: DType) -> torch.Tensor:
    dense = cells.clone(memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch_type(dtype)).reshape(cells.shape[:-1])


def evaluate(expr: Expr, environment: Mapping[str, torch.Tensor]) -> Cells:
    """The cells of `expr`, node by node as torch would."""

    def leaf(x: Leaf) -> Cells:
        match x:
            case Read(_, name, spec):
                return cells_of(environment[name], spec)
            case Live(key, spec):
                return cells_of(environment[key], spec)
            case Full(spec) if 0 in spec.shape:
                return torch.zeros((*spec.shape, max(spec.dtype.bits // 8, 1)), dtype=torch.uint8)
            case Full(spec, value):
                wide = {"float": torch.float64, "int": torch.int64, "bool": torch.bool, "complex": torch.complex128}
                one = torch.tensor(value, dtype=torch.uint64 if value.real >= 2**63 else wide[spec.dtype.kind])
                return cells_of(one.to(torch_type(spec.dtype)).expand(spec.shape), spec)
            case Noise(spec, mean, std, seed):
                drawn = torch.empty(spec.shape).normal_(mean, std, generator=torch.Generator().manual_seed(seed))
                return cells_of(drawn.to(torch_type(spec.dtype)), spec)

    def cast(cells: Cells, source: DType, target: DType) -> Cells:
        numbers = numbers_of(cells, source).to(torch_type(target))
        return cells_of(numbers, TensorSpec(numbers.shape, target))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32 is experimental, torch says
        return fold(expr, leaf=leaf, cast=cast)


def fold(
    expr: Expr,
    *,
    leaf: Callable[[Leaf], Cells],
    cast: Callable[[Cells, DType, DType], Cells],
    whole: Callable[[Cells], None] = lambda cells: None,
) -> Cells:
    """`expr` bottom up; `whole` sees the arguments of opaque nodes, all of whose elements are used."""

    def go(e: Expr) -> Cells:
        match e:
            case Read() | Live() | Full() | Noise():
                return leaf(e)
            case Index(of, at):
                return go(of)[tuple([a if isinstance(a, int) else slice(*a) for a in at])]
            case Concat(parts, dim):
                return torch.cat([go(p) for p in parts], dim)
            case Stack(parts, dim):
                return torch.stack([go(p) for p in parts], dim)
            case Permute(of, dims):
                return go(of).permute(*dims, len(dims))
            case Take(of, dim, indices):
                return go(of).index_select(dim, torch.tensor(indices, dtype=torch.int64))
            case Reshape(of, shape):
                cells = go(of)
                whole(cells)
                return cells.reshape(*shape, cells.shape[-1])
            case Cast(of, dtype):
                return cast(go(of), dtype_below(of), dtype)
            case Call("torch:clone", (of,)):
                cells = go(of)
                whole(cells)
                return cells.clone()
        raise AssertionError(f"no reference for {e!r}")

    return go(expr)


def dtype_below(expr: Expr) -> DType:
    while not isinstance(expr, Read | Live | Full | Noise | Call | Cast):
        expr = expr.parts[0] if isinstance(expr, Concat | Stack) else expr.of
    return expr.dtype if isinstance(expr, Cast) else expr.spec.dtype


def alike(a: Cells, b: Cells, dtype: DType) -> bool:
    """The same bits, or a NaN in both (its payload is not part of the contract of a cast)."""
    if a.shape != b.shape:
        return False
    equal = (a == b).all(-1)
    if dtype.kind in ("float", "complex") and dtype.bits >= 8:
        x, y = numbers_of(a, dtype), numbers_of(b, dtype)
        if dtype.kind == "complex":
            x, y = torch.view_as_real(x), torch.view_as_real(y)
            return bool(((x == y) & (x.signbit() == y.signbit()) | (x.isnan() & y.isnan())).all())
        equal |= x.double().isnan() & y.double().isnan()
    return bool(equal.all())


def used(expr: Expr) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """Row-major positions of the elements of every `Read`, by name: those that reach the result, and those that are
    arguments of opaque nodes.
    """
    names: list[tuple[str, int]] = []
    opaque: dict[str, set[int]] = {}

    def ids(x: Leaf) -> Cells:
        if not isinstance(x, Read):
            return torch.full((*x.spec.shape, 1), -1, dtype=torch.int64)
        first = len(names)
        names.extend((x.name, i) for i in range(x.spec.numel))
        return torch.arange(first, len(names)).reshape(*x.spec.shape, 1)

    def collect(cells: Cells, into: dict[str, set[int]]) -> None:
        for i in cells.unique().tolist():
            if i >= 0:
                into.setdefault(names[i][0], set()).add(names[i][1])

    result: dict[str, set[int]] = {}
    cells = fold(expr, leaf=ids, cast=lambda c, source, target: c, whole=lambda c: collect(c, opaque))
    collect(cells, result)
    return result, opaque
