"""Laws of evaluation: it agrees with torch, bit for bit, and reads what it uses."""

import tempfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from funcmodel.core import build
from funcmodel.core.lowering import as_box, byte_runs, lowered, reads, stored
from funcmodel.core.shapes import spec_of
from funcmodel.plan.queries import cost
from funcmodel.plan.routing import GAP, routing
from funcmodel.records.dtypes import dtype
from funcmodel.records.expressions import Call, Expr, Index, Read
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.boxes import chunks, parts, ranges
from funcmodel.run.engine import opened
from funcmodel.run.evaluate import evaluate, fill, materialize, materialize_routed, stream
from funcmodel.run.formats import FORMATS
from funcmodel.run.moves import cut
from funcmodel.run.scan import scan
from funcmodel.run.tensors import tensor_spec

Pair = tuple[Expr, torch.Tensor]

# Numbers that every one of these dtypes holds exactly, so that casts lose nothing and equality can be exact.
EXACT = ("float32", "float64", "bfloat16", "float16", "int64", "int8", "uint8", "float8_e4m3fn", "complex64")
REAL = EXACT[:-1]
BITS = ("float32", "bfloat16", "float16", "float64", "int32", "bool", "uint16", "float8_e5m2", "complex64")


def bits(tensor: torch.Tensor) -> list[int]:
    rows = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    return torch.empty(tensor.shape, dtype=rows.dtype).copy_(rows).reshape(-1).view(torch.uint8).tolist()


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert bits(found) == bits(expected)


def counted(act: Callable[[], object]) -> int:
    """Bytes that the process asked its files for during `act`, as the kernel counts them."""
    before = Path("/proc/self/io").read_text()  # which is itself counted, after it was said
    act()
    after = Path("/proc/self/io").read_text()
    return int(after.split()[1]) - int(before.split()[1]) - len(before)


class Folder(NamedTuple):
    plan: StateDictPlan
    tensors: dict[str, torch.Tensor]

    def __repr__(self) -> str:  # for hypothesis, which prints it
        return "folder"


@pytest.fixture(scope="module")
def folder():
    """A file of tensors of every rank, and the same tensors as safetensors itself reads them."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as path:
        tensors = {}
        shapes = [(), (4,), (0,), (3, 4), (4, 3), (4, 4), (2, 3, 4), (4, 2, 3), (1, 4, 1), (2, 2, 2, 2)]
        for i, shape in enumerate(shapes):
            for kind in EXACT:
                values = torch.randint(0, 8, shape, generator=generator)
                tensors[f"{i}.{kind}"] = values.to(getattr(torch, kind))
        file = f"{path}/model.safetensors"
        save_file(tensors, file)
        with safe_open(file, "pt") as oracle:
            yield Folder(scan(file), {key: oracle.get_tensor(key) for key in tensors})


def of_real(draw: Any, pair: Pair, target: str) -> Pair:
    expr, tensor = pair
    return build.cast(expr, target), tensor.to(getattr(torch, target))


def step(draw: Any, pair: Pair) -> Pair:
    """One operation, on the expression by its constructor and on the tensor by torch."""
    expr, tensor = pair
    kinds = ["cast", "reshape", "call"]
    if tensor.ndim:
        kinds += ["narrow", "select", "permute", "take", "concat", "stack", "halves"]
    kind = draw(st.sampled_from(kinds))
    dim = draw(st.integers(0, tensor.ndim - 1)) if tensor.ndim else 0
    size = tensor.shape[dim] if tensor.ndim else 0
    match kind:
        case "cast":
            return of_real(draw, pair, draw(st.sampled_from(("complex64",) if tensor.is_complex() else EXACT)))
        case "reshape":
            shape = draw(st.sampled_from([(-1,), (1, *tensor.shape), (*tensor.shape, 1), tuple(tensor.shape[::-1])]))
            shape = (tensor.numel(),) if shape == (-1,) else shape
            return build.reshape(expr, shape), tensor.reshape(shape)
        case "call":
            spec = tensor_spec(tensor)
            return Call("torch:clone", (expr,), spec), tensor.clone()
        case "narrow":
            start = draw(st.integers(0, size))
            stop = draw(st.integers(start, size))
            return build.narrow(expr, dim, start, stop), tensor.narrow(dim, start, stop - start)
        case "select" if size:
            i = draw(st.integers(0, size - 1))
            return build.select(expr, dim, i), tensor.select(dim, i)
        case "permute":
            dims = draw(st.permutations(range(tensor.ndim)))
            return build.permute(expr, dims), tensor.permute(*dims)
        case "take":
            rows = draw(st.lists(st.integers(0, size - 1), max_size=4)) if size else []
            return build.take(expr, rows, dim), tensor.index_select(dim, torch.tensor(rows, dtype=torch.int64))
        case "concat":
            return build.concat([expr, expr], dim), torch.cat([tensor, tensor], dim)
        case "stack":
            return build.stack([expr, expr], dim), torch.stack([tensor, tensor], dim)
        case "halves":
            cut = draw(st.integers(0, size))
            parts = [build.narrow(expr, dim, cut, size), build.narrow(expr, dim, 0, cut)]
            return build.concat(parts, dim), torch.cat(tensor.split([cut, size - cut], dim)[::-1], dim)
        case _:
            return pair


@st.composite
def pairs(draw: Any, plan: Any, tensors: dict[str, torch.Tensor], steps: int = 5) -> Pair:
    key = draw(st.sampled_from(sorted(tensors)))
    pair: Pair = plan[key], tensors[key]
    for _ in range(draw(st.integers(0, steps))):
        if pair[1].ndim < 6 and pair[1].numel() <= 512:
            pair = step(draw, pair)
    return pair


@given(data=st.data())
def test_law_1_and_7_evaluate_agrees_with_torch_and_with_its_spec(folder, data):
    """evaluate(e) ~ e in torch; spec_of(e) = spec of evaluate(e); the copies of lowered(e) cover it once."""
    expr, expected = data.draw(pairs(*folder))
    found = evaluate(expr)
    same(found, expected)
    assert tensor_spec(found) == spec_of(expr)
    assert found.is_contiguous()
    assert sum(prod(spec_of(copy.of).shape) for copy in lowered(expr)) == found.numel()


@given(data=st.data())
def test_law_2_rebuilding_changes_no_value(folder, data):
    """evaluate(rebuilt(e)) ~ evaluate(e)"""
    expr, _ = data.draw(pairs(*folder))
    same(evaluate(build.rebuilt(expr)), evaluate(expr))


@given(data=st.data())
def test_materialize_stream_and_fill_agree(folder, data):
    """dict(stream(p)) ~ materialize(p) ~ what fill(p, d) leaves in d, whatever the strides of d; in plan order."""
    drawn = data.draw(st.lists(pairs(*folder), max_size=6))
    plan = {f"k{i}": expr for i, (expr, _) in enumerate(drawn)}
    found = materialize(plan)
    streamed = dict(stream(plan))
    strided = {f"k{i}": torch.empty((*t.shape, 2), dtype=t.dtype).select(-1, 1) for i, (_, t) in enumerate(drawn)}
    dense = {f"k{i}": torch.empty(t.shape, dtype=t.dtype) for i, (_, t) in enumerate(drawn)}
    fill(plan, strided)
    fill(plan, dense)
    assert list(found) == list(streamed) == list(plan)
    for i, (_, expected) in enumerate(drawn):
        for got in (found, streamed, strided, dense):
            same(got[f"k{i}"], expected)


@given(data=st.data())
def test_what_passes_through_buffers_is_what_does_not(folder, data):
    """materialize(p, route="stage") ~ evaluate, expression by expression, and so is fill(p, d, route="stage")."""
    drawn = data.draw(st.lists(pairs(*folder), max_size=6))
    plan = {f"k{i}": expr for i, (expr, _) in enumerate(drawn)}
    found = materialize(plan, route="stage")
    strided = {f"k{i}": torch.empty((*t.shape, 2), dtype=t.dtype).select(-1, 1) for i, (_, t) in enumerate(drawn)}
    dense = {f"k{i}": torch.empty(t.shape, dtype=t.dtype) for i, (_, t) in enumerate(drawn)}
    fill(plan, strided, route="stage")
    fill(plan, dense, route="stage")
    assert list(found) == list(plan)
    for i, (_, expected) in enumerate(drawn):
        for got in (found, strided, dense):
            same(got[f"k{i}"], expected)


@given(data=st.data())
def test_live_tensors_of_any_strides_are_copied(folder, data):
    """evaluate(e with Live leaves) ~ e in torch, and shares no memory with them."""
    tensors = folder.tensors
    key = data.draw(st.sampled_from(sorted(tensors)))
    dims = data.draw(st.permutations(range(tensors[key].ndim)))
    given_tensor = tensors[key].permute(*dims) if dims else tensors[key]
    pair: Pair = build.live("x", tensor_spec(given_tensor)), given_tensor
    for _ in range(data.draw(st.integers(0, 3))):
        pair = step(data.draw, pair)
    found = evaluate(pair[0], {"x": given_tensor})
    same(found, pair[1])
    assert not found.numel() or found.untyped_storage().data_ptr() != given_tensor.untyped_storage().data_ptr()


@st.composite
def stored_bits(draw: Any) -> dict[str, torch.Tensor]:
    tensors = {}
    for i in range(draw(st.integers(1, 6))):
        kind = getattr(torch, draw(st.sampled_from(BITS)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        raw = draw(st.binary(min_size=prod(shape) * kind.itemsize, max_size=prod(shape) * kind.itemsize))
        flat = torch.tensor(list(raw), dtype=torch.uint8)
        tensors[f"t{i}"] = flat.view(kind).reshape(shape)
    return tensors


@given(tensors=stored_bits(), pad=st.integers(0, 7), data=st.data())
def test_any_bits_at_any_offset_arrive_unchanged(tensors, pad, data):
    """NaN payloads, bools of 2 and odd offsets: without a cast every bit is what the file holds, in boxes too."""
    with tempfile.TemporaryDirectory() as path:
        file = Path(path, "m.safetensors")
        save_file(tensors, file, metadata={"pad": "x" * pad})
        raw = file.read_bytes()
        n = int.from_bytes(raw[:8], "little")
        text = raw[8 : 8 + n].rstrip(b" ")
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])
        plan = scan(file)
        for route in (None, "stage"):
            for key, tensor in materialize(plan, route=route).items():
                same(tensor, tensors[key])
        key = data.draw(st.sampled_from(sorted(tensors)))
        if tensors[key].ndim:
            rows = tensors[key].shape[-1]
            start = data.draw(st.integers(0, rows))
            same(evaluate(build.narrow(plan[key], -1, start, rows)), tensors[key].narrow(-1, start, rows - start))
            same(evaluate(build.transpose(plan[key], 0, -1)), tensors[key].transpose(0, -1))
            picked = data.draw(st.lists(st.integers(0, rows - 1), max_size=5)) if rows else []
            if picked:
                columns = tensors[key].view(torch.uint8) if tensors[key].dtype == torch.bool else tensors[key]
                columns = torch.stack([columns.select(-1, i) for i in picked], -1)
                same(evaluate(build.take(plan[key], picked, -1)), columns.view(tensors[key].dtype))


@given(data=st.data())
def test_law_49_bytes_read_are_the_bytes_of_the_boxes_that_are_used(folder, data):
    """Bytes that the kernel handed out = bytes of the boxes that `reads` names, headers aside."""
    plan, _ = folder
    drawn = data.draw(st.lists(pairs(*folder, steps=3), min_size=1, max_size=4))
    wanted = {f"k{i}": expr for i, (expr, _) in enumerate(drawn)}
    ref = next(iter(plan.values())).file
    used = sum(
        prod(stop - start for start, stop in box) * read.spec.dtype.bits // 8
        for expr in wanted.values()
        for read, box in reads(expr)
    )
    touched = any(True for expr in wanted.values() for _ in reads(expr))

    def check_only() -> None:
        with opened([ref], FORMATS):
            pass

    materialize(wanted)
    header = counted(check_only) if touched else 0
    said = sum(cost(StateDictPlan(wanted)).read.values())
    small = sum(type(expr) is Read for expr in wanted.values())
    assert used <= said <= used + GAP * max(0, small - 1)
    assert counted(lambda: materialize(wanted)) - header == said
    assert counted(lambda: [None for _ in stream(wanted)]) - header == used


@given(data=st.data())
def test_what_stands_in_a_file_as_it_is_wanted_is_a_stored_tensor(folder, data):
    """stored(e) is None or stored(e) ~ e, and has the bytes that reads(e) has; stored(index(r)) iff that is one run"""
    expr, expected = data.draw(pairs(*folder))
    read = stored(expr)
    if read is not None:
        assert spec_of(read) == spec_of(expr)
        same(evaluate(read), expected)
        assert sum(prod(stop - start for start, stop in box) for _, box in reads(expr)) == read.spec.numel
    if isinstance(expr, Index) and isinstance(expr.of, Read):
        runs = byte_runs(expr.of.spec.shape, expr.of.spec.dtype.bits, as_box(expr.at))
        assert (read is not None) is (len(runs) == 1)


SIZES: Final = [0, 1, 8, 600, 4088, 4096, 4104, 9000]


@given(
    st.lists(st.tuples(st.sampled_from(SIZES), st.integers(0, 3)), max_size=40),
    st.sampled_from([None, "read", "slab", "stage", "transform"]),
)
def test_law_49_bytes_read_of_some_of_a_files_tensors_are_those_of_the_cost(parts, route):
    """What lies between small tensors is read with them, what is staged for several keys once; the cost knows."""
    with tempfile.TemporaryDirectory() as path:
        tensors = {f"{i:02d}": torch.zeros(size, dtype=torch.uint8) for i, (size, _) in enumerate(parts)}
        save_file(tensors, f"{path}/m.safetensors")
        plan = scan(path)
        counts = zip(sorted(plan), parts, strict=True)
        chosen = StateDictPlan({f"{key}.{i}": plan[key] for key, (_, n) in counts for i in range(n)})
        routes = routing(chosen, route=route)
        cpu = torch.device("cpu")

        def check_only() -> None:
            with opened([read.file for read in chosen.values()], FORMATS):
                pass

        def load() -> None:
            materialize_routed(chosen, routes, cpu, None, FORMATS, "ignore")

        load()  # which imports what it needs
        header = counted(check_only)
        found = counted(load) - header
        said = sum(cost(chosen, routes=routes).read.values())
        assert found == said


CHANGES: Final[dict[str, Callable[[Expr, Expr], Expr]]] = {
    "as it is": lambda a, b: a,
    "cast": lambda a, b: build.cast(a, "float16"),
    "widened": lambda a, b: build.cast(a, "float64"),
    "turned": lambda a, b: build.transpose(a),
    "cut": lambda a, b: build.narrow(a, 1, 1, 4),
    "picked": lambda a, b: build.take(a, [3, 0, 3], 0),
    "joined": lambda a, b: build.concat([a, build.cast(b, "float32")]),
    "flat": lambda a, b: build.reshape(build.transpose(a), [-1]),
    "flat, cast": lambda a, b: build.cast(build.reshape(build.transpose(a), [-1]), "float16"),
    "cut of flat": lambda a, b: build.narrow(build.reshape(build.transpose(a), [-1]), 0, 5, 99),
    "negative": lambda a, b: Call("torch:neg", (a,), TensorSpec([40, 70], "float32")),
}


@given(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(1, 3)), unique_by=lambda one: one[0]))
def test_law_49_what_is_changed_for_several_keys_is_read_once_and_the_cost_knows(parts):
    with tempfile.TemporaryDirectory() as path:
        tensors = {f"{name} {x}": torch.randn(40, 70) for name, _ in parts for x in "ab"}
        save_file(tensors, f"{path}/m.safetensors")
        plan = scan(path)
        exprs = {name: CHANGES[name](plan[f"{name} a"], plan[f"{name} b"]) for name, _ in parts}
        chosen = StateDictPlan({f"{name}.{i}": exprs[name] for name, n in parts for i in range(n)})
        routes = routing(chosen, route="stage")
        cpu = torch.device("cpu")
        once = StateDictPlan(exprs)

        def loaded(wanted: StateDictPlan) -> int:
            def load() -> None:
                found = materialize_routed(wanted, routing(wanted, route="stage"), cpu, None, FORMATS, "ignore")
                assert all(torch.equal(found[key], found[f"{key.partition('.')[0]}.0"]) for key in found if "." in key)

            load()  # which imports what it needs
            return counted(load)

        aside = {
            f"{name}.{i}": exprs[name] for name, n in parts if name in ("cut of flat", "negative") for i in range(1, n)
        }
        more = sum(4 * prod(stop - start for start, stop in box) for e in aside.values() for _, box in reads(e))
        assert loaded(chosen) == loaded(once) + more
        header = counted(lambda: check_only(chosen))
        assert loaded(chosen) - header == sum(cost(chosen, routes=routes).read.values())


def check_only(plan: StateDictPlan) -> None:
    files = [read.file for expr in plan.values() for read, _ in reads(expr)]
    with opened(files, FORMATS):
        pass


@st.composite
def boxes(draw: Any) -> tuple[tuple[int, ...], Any]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    box = []
    for size in shape:
        runs = []
        for _ in range(draw(st.integers(1, 3))):
            start = draw(st.integers(0, size - 1))
            runs.append((start, draw(st.integers(1, size - start))))
        box.append(draw(st.sampled_from([tuple(runs), ((0, size),)])))
    return shape, tuple(box)


def selected(grid: torch.Tensor, box: Any) -> torch.Tensor:
    for axis, runs in enumerate(box):
        grid = torch.cat([grid.narrow(axis, start, length) for start, length in runs], axis)
    return grid


@given(boxes(), st.sampled_from([torch.uint8, torch.int16, torch.int64, torch.complex128]), st.integers(0, 9))
def test_what_is_cut_out_is_the_selection(drawn, kind, start):
    shape, box = drawn
    grid = torch.arange(prod(shape)).reshape(shape).to(kind)
    expected = selected(grid, box).contiguous()
    found = torch.empty_like(expected)
    stored = memoryview(bytes(start) + grid.numpy().tobytes())
    cut(stored, start, shape, kind.itemsize, box, memoryview(found.view(-1).view(torch.uint8).numpy()))
    assert torch.equal(found, expected)


@given(boxes(), st.sampled_from([1, 2, 8]))
def test_ranges_are_the_bytes_of_the_selection_in_order(drawn, itemsize):
    """concat(bytes[a : a + n] for (a, n) in ranges(box)) = bytes of the selection, in row-major order"""
    shape, box = drawn
    grid = torch.arange(prod(shape)).reshape(shape)
    got = [at // itemsize for first, n in ranges(shape, itemsize, box) for at in range(first, first + n, itemsize)]
    assert got == selected(grid, box).flatten().tolist()


@given(boxes(), st.sampled_from([8, 1 << 18, 1 << 22]))
def test_chunks_cover_a_box_exactly_once(drawn, itemsize):
    """The chunks of a box are disjoint, cover it, are what `selected` holds there, and read no element twice."""
    shape, box = drawn
    grid = torch.arange(prod(shape)).reshape(shape)
    expected = selected(grid, box)
    seen = torch.full_like(expected, -1)
    for part, wide, place in chunks(shape, itemsize, box):
        where = tuple(slice(start, start + size) for start, size in place)
        assert bool((seen[where] == -1).all())
        seen[where] = selected(grid, part)
        held = selected(grid, wide).flatten().tolist()
        assert len(set(held)) == len(held)
        assert set(selected(grid, part).flatten().tolist()) <= set(held)
    assert torch.equal(seen, expected)


@given(boxes(), st.sampled_from([1, 2, 8]), st.integers(1, 200))
def test_parts_cover_a_box_exactly_once_and_stay_small(drawn, itemsize, most):
    shape, box = drawn
    grid = torch.arange(prod(shape)).reshape(shape)
    expected = selected(grid, box)
    seen = torch.full_like(expected, -1)
    for part, place in parts(itemsize, box, most):
        where = tuple(slice(start, start + size) for start, size in place)
        assert bool((seen[where] == -1).all())
        seen[where] = selected(grid, part)
        assert seen[where].numel() == 1 or seen[where].numel() * itemsize <= most
    assert torch.equal(seen, expected)


@given(
    st.sampled_from(["float32", "float64", "bfloat16", "float16"]),
    st.lists(st.integers(0, 5), max_size=3),
    st.floats(-2, 2),
    st.floats(0.1, 2),
    st.integers(0, 2**63),
    st.data(),
)
def test_noise_is_drawn_whole_by_its_own_generator(kind, shape, mean, std, seed, data):
    """index(noise(s, seed)) ~ index(draw of s in float32 by a own generator, cast); the global one stays."""
    spec = TensorSpec(shape, kind)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(seed)
    expected = torch.empty(shape).normal_(mean, std, generator=generator).to(getattr(torch, kind))
    noise = build.noise(spec, mean=mean, std=std, seed=seed)
    same(evaluate(noise), expected)
    if shape:
        stop = data.draw(st.integers(0, shape[0]))
        same(evaluate(build.narrow(noise, 0, 0, stop)), expected[:stop])
    assert torch.equal(torch.get_rng_state(), before)


@given(st.sampled_from(REAL), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 100))
def test_full_is_full(kind, shape, value):
    """evaluate(full(s, v)) ~ torch.full"""
    spec = TensorSpec(shape, dtype(kind))
    same(evaluate(build.full(spec, value)), torch.full(tuple(shape), value, dtype=getattr(torch, kind)))
