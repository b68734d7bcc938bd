"""Expressions that no smart constructor has touched: every nesting, axes of length 0 and 1, every dtype.

They are drawn from the result down: for a wanted spec, draw a node and draw what it needs below. Leaves come from a
small pool, and some nodes cut an expression and glue it together again, so that there is something to fuse. For the
leaves' tensors see `reference.environment`.
"""

from itertools import pairwise
from math import prod

from hypothesis import strategies as st

from funcmodel.core import build
from funcmodel.records.dtypes import DTYPES, DType, dtype
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

FILES = tuple(FileRef(f"{name}.safetensors", "safetensors", 2**40, name * 32) for name in "ab")
WHOLE_BYTES = tuple(d for d in DTYPES if d.torch and d.bits >= 8 and d.name != "complex32")


def dtypes() -> st.SearchStrategy[DType]:
    """Every dtype whose elements torch can hold one by one; the common ones often."""
    return st.one_of(st.sampled_from([dtype("F32"), dtype("BF16"), dtype("F16")]), st.sampled_from(WHOLE_BYTES))


def shapes(*, max_ndim: int = 3, longest: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    lengths = st.one_of(st.integers(1, longest), st.sampled_from([0, 1, 2, 4]))
    return st.lists(lengths, max_size=max_ndim).map(tuple)


def specs(*, max_ndim: int = 3) -> st.SearchStrategy[TensorSpec]:
    return st.builds(TensorSpec, shapes(max_ndim=max_ndim), dtypes())


@st.composite
def leaves(draw: st.DrawFn, spec: TensorSpec) -> Expr:
    """A leaf of `spec`, a stored one for half bytes; two draws may give the same one."""
    name = draw(st.sampled_from("xyz"))
    kind = draw(st.sampled_from("rrrrllfn")) if spec.dtype.bits >= 8 else "r"
    if kind == "f" or (kind == "n" and spec.dtype.kind != "float"):
        value = {"float": float, "int": int, "bool": bool, "complex": complex}[spec.dtype.kind]
        return Full(spec, value(draw(st.integers(0, 2))))
    if kind == "n":
        return Noise(spec, 0.0, 1.0, draw(st.integers(0, 2)))
    unique = f"{name}{list(spec.shape)}{spec.dtype.name}"
    if kind == "l":
        return Live(f"live {unique}", spec)
    return Read(draw(st.sampled_from(FILES[:1])), unique, spec, 8)


def convertible(source: DType, target: DType) -> bool:
    """Whether torch defines the result for every value: floats as ints are undefined beyond their range."""
    order = {"bool": 0, "int": 1, "float": 2, "complex": 3}
    return order[source.kind] <= order[target.kind] or (target.kind == "bool" and source.kind != "complex")


def _splits(draw: st.DrawFn, n: int, *, at_least: int = 0) -> list[int]:
    """Cut points of an axis, ends included; parts of no length are allowed."""
    return [0, *sorted(draw(st.lists(st.integers(0, n), min_size=at_least, max_size=3))), n]


@st.composite
def expressions(draw: st.DrawFn, spec: TensorSpec | None = None, *, depth: int = 4) -> Expr:
    """An expression of `spec`, or of any spec, at most `depth` nodes deep."""
    if spec is None:
        spec = draw(specs())
    if depth == 0:
        return draw(leaves(spec))
    nodes = [
        "leaf",
        "index",
        "concat",
        "stack",
        "permute",
        "take",
        "reshape",
        "cast",
        "call",
        "glue",
        "restack",
        "mosaic",
    ]
    match draw(st.sampled_from(nodes)):
        case "index":
            return draw(_indexed(spec, depth))
        case "concat" if spec.shape:
            dim = draw(st.integers(0, len(spec.shape) - 1))
            cuts = _splits(draw, spec.shape[dim])
            return Concat(
                tuple([draw(expressions(_resized(spec, dim, b - a), depth=depth - 1)) for a, b in pairwise(cuts)]), dim
            )
        case "stack" if spec.shape and 0 not in spec.shape and prod(spec.shape) < 200:
            dim = draw(st.integers(0, len(spec.shape) - 1))
            part = TensorSpec((*spec.shape[:dim], *spec.shape[dim + 1 :]), spec.dtype)
            return Stack(tuple([draw(expressions(part, depth=depth - 1)) for _ in range(spec.shape[dim])]), dim)
        case "permute":
            dims = draw(st.permutations(range(len(spec.shape))))
            below = [spec.shape[dims.index(d)] for d in range(len(dims))]
            return Permute(draw(expressions(TensorSpec(below, spec.dtype), depth=depth - 1)), tuple(dims))
        case "take" if spec.shape:
            dim = draw(st.integers(0, len(spec.shape) - 1))
            n = spec.shape[dim]
            below = draw(st.integers(min(n, 1), 6))
            rows = draw(st.lists(st.integers(0, below - 1), min_size=n, max_size=n)) if n else []
            if n and draw(st.booleans()):
                rows.sort()
            wide = _resized(spec, dim, below)
            if draw(st.booleans()):
                cut = draw(st.integers(0, below))
                halves = [draw(leaves(_resized(spec, dim, n))) for n in (cut, below - cut)]
                return Take(Concat(tuple(halves), dim), dim, tuple(rows))
            return Take(draw(expressions(wide, depth=depth - 1)), dim, tuple(rows))
        case "reshape":
            below = draw(st.sampled_from(reshapes(spec.shape)))
            return Reshape(draw(expressions(TensorSpec(below, spec.dtype), depth=depth - 1)), spec.shape)
        case "cast" if spec.dtype.bits >= 8:
            target = spec.dtype
            source = draw(st.sampled_from([d for d in WHOLE_BYTES if convertible(d, target)]))
            return Cast(draw(expressions(TensorSpec(spec.shape, source), depth=depth - 1)), target)
        case "call":
            return Call("torch:clone", (draw(expressions(spec, depth=depth - 1)),), spec)
        case "glue" if spec.shape:
            dim = draw(st.integers(0, len(spec.shape) - 1))
            return glued(draw(expressions(spec, depth=depth - 1)), spec, dim, _splits(draw, spec.shape[dim]))
        case "restack" if spec.shape and spec.shape[0] > 0:
            dim = draw(st.integers(0, len(spec.shape) - 1))
            if spec.shape[dim]:
                of = draw(expressions(spec, depth=depth - 1))
                return Stack(tuple([Index(of, _cut(spec.shape, dim, i)) for i in range(spec.shape[dim])]), dim)
        case "mosaic" if spec.shape and prod(spec.shape) < 200:
            return draw(_mosaics(spec))
    return draw(leaves(spec))


@st.composite
def _mosaics(draw: st.DrawFn, spec: TensorSpec) -> Expr:
    """Slices of two tensors, side by side: some are neighbors of one tensor, some are not, some repeat."""
    dim = draw(st.integers(0, len(spec.shape) - 1))
    across = draw(st.sampled_from(["concat", "stack"])) if spec.shape[dim] else "concat"
    parts: list[Expr] = []
    start = 0
    if across == "concat":
        for a, b in pairwise(_splits(draw, spec.shape[dim])):
            start = draw(st.sampled_from([start, start, draw(st.integers(0, 4))]))
            stop = start + b - a
            wide = _resized(spec, dim, 12 + spec.shape[dim])
            parts.append(Index(draw(_twins(wide)), _cut(wide.shape, dim, (start, stop))))
            start = stop
        return Concat(tuple(parts), dim)
    place = draw(st.integers(0, len(spec.shape) - 1))
    part = TensorSpec((*spec.shape[:dim], *spec.shape[dim + 1 :]), spec.dtype)
    for _ in range(spec.shape[dim]):
        start = min(draw(st.sampled_from([start, start, draw(st.integers(0, 4))])), 11)
        at = [(0, n) for n in part.shape]
        wide = TensorSpec((*part.shape[:place], 12, *part.shape[place:]), spec.dtype)
        parts.append(Index(draw(_twins(wide)), (*at[:place], start, *at[place:])))
        start += 1
    return Stack(tuple(parts), dim)


def _twins(spec: TensorSpec) -> st.SearchStrategy[Expr]:
    """One of two leaves of which there is one each per spec, usually the first."""
    one, two = (
        Read(FILES[1], f"{name}{list(spec.shape)}{spec.dtype.name}", spec, 8) for name in ("twin ", "other twin ")
    )
    return st.sampled_from([one, one, one, two])


@st.composite
def _indexed(draw: st.DrawFn, spec: TensorSpec, depth: int) -> Expr:
    below: list[int] = []
    at: list[int | tuple[int, int]] = []
    for n in spec.shape:
        start, more = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        below.append(start + n + more)
        at.append((start, start + n))
    if len(below) < 4:
        place, n = draw(st.integers(0, len(below))), draw(st.integers(1, 4))
        if draw(st.booleans()):
            below.insert(place, n)
            at.insert(place, draw(st.integers(0, n - 1)))
    return Index(draw(expressions(TensorSpec(below, spec.dtype), depth=depth - 1)), tuple(at))


def _resized(spec: TensorSpec, dim: int, n: int) -> TensorSpec:
    return TensorSpec((*spec.shape[:dim], n, *spec.shape[dim + 1 :]), spec.dtype)


def _cut(shape: tuple[int, ...], dim: int, a: int | tuple[int, int]) -> tuple[int | tuple[int, int], ...]:
    return tuple([a if d == dim else (0, n) for d, n in enumerate(shape)])


def glued(of: Expr, spec: TensorSpec, dim: int, cuts: list[int]) -> Concat:
    """`of` cut along `dim` at `cuts` (both ends included), put together again by hand."""
    return Concat(tuple([Index(of, _cut(spec.shape, dim, pair)) for pair in pairwise(cuts)]), dim)


def reshapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Other shapes of as many elements: axes joined, split, turned, and of length 1 added."""
    numel = prod(shape)
    found = [shape, (numel,), (1, *shape), (*shape, 1)]
    found += [(*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]) for i in range(len(shape) - 1)]
    for i, n in enumerate(shape):
        found += [(*shape[:i], k, n // k, *shape[i + 1 :]) for k in (2, 3) if n and n % k == 0]
    found += [(k, numel // k) for k in (2, 3, 4) if numel and numel % k == 0]
    return [s for s in found if len(s) <= 4]


@st.composite
def slicings(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int | tuple[int, int], ...]:
    """An in-range slicing of every axis of `shape`."""
    at: list[int | tuple[int, int]] = []
    for n in shape:
        start, stop = sorted([draw(st.integers(0, n)), draw(st.integers(0, n))])
        pick = draw(st.integers(0, 3))
        at.append(draw(st.integers(0, n - 1)) if pick == 0 and n else (0, n) if pick == 1 else (start, stop))
    return tuple(at)


@st.composite
def merges(draw: st.DrawFn) -> Expr:
    """One chain, or a concatenation or stack of chains, in normal form; no two chains over the same leaf.

    Whatever is cut from it shows where it belongs, which is what the structural half of law 4 needs.
    """
    spec = draw(specs().filter(lambda s: 0 not in s.shape))
    kind = draw(st.sampled_from(["chain", "concat", "stack"])) if spec.shape else "chain"
    if kind == "chain":
        return draw(_chains(spec, "x"))
    dim = draw(st.integers(0, len(spec.shape) - 1))
    if kind == "stack":
        part = TensorSpec((*spec.shape[:dim], *spec.shape[dim + 1 :]), spec.dtype)
        return build.stack([draw(_chains(part, f"x{i}", ints=False)) for i in range(spec.shape[dim])], dim)
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return build.concat([draw(_chains(_resized(spec, dim, n), f"x{i}")) for i, n in enumerate(lengths)], dim)


@st.composite
def _chains(draw: st.DrawFn, spec: TensorSpec, name: str, *, ints: bool = True) -> Expr:
    dims = draw(st.permutations(range(len(spec.shape))))
    source = (
        draw(st.sampled_from([d for d in WHOLE_BYTES if convertible(d, spec.dtype)]))
        if draw(st.booleans())
        else spec.dtype
    )
    shape: list[int] = []
    at: list[int | tuple[int, int]] = []
    for d in range(len(dims)):
        n, start, more = spec.shape[dims.index(d)], draw(st.integers(0, 2)), draw(st.integers(0, 2))
        shape.append(start + n + more)
        at.append((start, start + n))
    if ints and draw(st.booleans()):
        place = draw(st.integers(0, len(shape)))
        shape.insert(place, 3)
        at.insert(place, draw(st.integers(0, 2)))
    leaf = build.read(FILES[0], name, TensorSpec(shape, source), 8)
    return build.cast(build.permute(build.index(leaf, at), dims), spec.dtype)
