"""Laws of routes: whatever way bytes travel, they arrive the same; and the choice is a pure function."""

from math import prod
from typing import Any

import pytest
import torch
from attrs import evolve
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import property_tests.test_evaluate as evaluation
from funcmodel.core import build, lowering
from funcmodel.core.lowering import reads
from funcmodel.errors import PlanError
from funcmodel.plan.queries import cost
from funcmodel.plan.routing import BLOCK, COLD, HOT, LARGE, SLAB, Into, obstacle, routing
from funcmodel.records.devices import CPU, device
from funcmodel.records.expressions import Expr, FileRef, Index, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.routes import ROUTES, Machine, Memory, Routing, Storage
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.evaluate import fill, fill_routed, materialize, materialize_routed
from funcmodel.run.formats import FORMATS
from property_tests.test_evaluate import pairs, same

folder = evaluation.folder  # the fixture

MIB = 1 << 20
# One example tries every route, or several: of the profile's examples a part is enough.
few = settings(max_examples=max(10, settings.default.max_examples // 5))
some = settings(max_examples=max(10, settings.default.max_examples // 4))
FRESH: Into = "fresh"
WAYS: list[dict[str, Any]] = [{"route": route} for route in (None, *ROUTES)] + [{"memory": "borrow"}]


# -- values ------------------------------------------------------------------------------------------------------------


@few
@given(data=st.data())
def test_every_route_gives_the_same_bits(folder, data):
    """materialize(p, route=r) ~ torch, for every r and for borrowed memory; in plan order."""
    drawn = data.draw(st.lists(pairs(*folder), max_size=4))
    plan = {f"k{i}": expr for i, (expr, _) in enumerate(drawn)}
    for way in WAYS:
        found = materialize(plan, **way)
        assert list(found) == list(plan)
        for i, (_, expected) in enumerate(drawn):
            same(found[f"k{i}"], expected)


@few
@given(data=st.data())
def test_past_the_page_cache_every_route_gives_the_same_bits(folder, data):
    """materialize(p, route=r) ~ torch where every file is read past the cache, by whole blocks, however few at once."""
    drawn = data.draw(st.lists(pairs(*folder), max_size=4))
    plan = {f"k{i}": expr for i, (expr, _) in enumerate(drawn)}
    paths = tuple({leaf.file.path for leaf in folder.plan.values()})
    for route in (None, "read", "slab", "transform", "stage"):
        past = evolve(routing(plan, route=route), direct=paths, span=data.draw(st.sampled_from([BLOCK, 3 * BLOCK])))
        found = materialize_routed(plan, past, torch.device("cpu"), None, FORMATS, "ignore")
        into = {f"k{i}": laid_out(t, data.draw(st.integers(0, 3))) for i, (_, t) in enumerate(drawn)}
        again = evolve(past, routes=routing(plan, route=route, into="existing").routes, into="existing")
        fill_routed(plan, again, {key: inside for key, (_, inside) in into.items()}, None, FORMATS, "ignore")
        for i, (_, expected) in enumerate(drawn):
            same(found[f"k{i}"], expected)
            same(into[f"k{i}"][1], expected)


@few
@given(data=st.data())
def test_every_route_fills_tensors_of_any_strides(folder, data):
    """fill(p, d, route=r) leaves the same in d for every r, and nothing beside it."""
    drawn = data.draw(st.lists(pairs(*folder), max_size=3))
    plan = {f"k{i}": expr for i, (expr, _) in enumerate(drawn)}
    for route in (None, *ROUTES):
        bases = {f"k{i}": laid_out(t, data.draw(st.integers(0, 3))) for i, (_, t) in enumerate(drawn)}
        fill(plan, {key: inside for key, (_, inside) in bases.items()}, route=route)
        for i, (_, expected) in enumerate(drawn):
            base, inside = bases[f"k{i}"]
            same(inside, expected)
            inside.zero_()
            assert not base.view(torch.uint8).any()


def laid_out(like: torch.Tensor, how: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros, and a view of them that has the shape and dtype of `like` and strides of its own."""
    shape = tuple(like.shape)
    if how == 0 or not shape:
        base = torch.zeros((*shape, 2), dtype=torch.uint8).to(like.dtype)
        return base, base.select(-1, 1)
    if how == 1:
        base = torch.zeros(tuple(n + 1 for n in shape), dtype=torch.uint8).to(like.dtype)
        return base, base[tuple(slice(1, None) for _ in shape)]
    if how == 2:
        base = torch.zeros(shape[::-1], dtype=torch.uint8).to(like.dtype)
        return base, base.permute(*range(len(shape))[::-1])
    base = torch.zeros((3, *shape), dtype=torch.uint8).to(like.dtype)
    return base, base[1]


@given(data=st.data())
def test_a_borrowed_tensor_can_be_written_to_and_the_next_one_is_as_the_file_is(folder, data):
    """Writing into what was borrowed changes no file, and nobody else's tensors."""
    key = data.draw(st.sampled_from(sorted(key for key, t in folder.tensors.items() if t.numel())))
    plan = {"a": folder.plan[key], "b": folder.plan[key]}
    found = materialize(plan, memory="borrow")
    again = materialize(plan, memory="borrow")
    found["a"].view(-1).view(torch.uint8).bitwise_not_()
    same(again["a"], folder.tensors[key])
    same(materialize(plan)["a"], folder.tensors[key])


# -- the choice --------------------------------------------------------------------------------------------------------

FILES = [FileRef(f"/nowhere/{name}", "safetensors", 1 << 40, "") for name in ("a", "b", "c")]
KINDS = ("float32", "bfloat16", "int8", "float64", "complex64")


@st.composite
def stored(draw: st.DrawFn, name: str) -> Read:
    """A stored tensor of no file that exists, from a few bytes to more than a few files' worth."""
    rows = draw(st.sampled_from([1, 3, 8]))
    columns = draw(st.sampled_from([0, 1, 5, 4095, 16384, MIB, 3 * MIB, 8 * MIB]))
    offset = draw(st.integers(1, 1 << 20))
    return build.read(draw(st.sampled_from(FILES)), name, TensorSpec([rows, columns], draw(KIND)), offset)


KIND = st.sampled_from(KINDS)


@st.composite
def exprs(draw: st.DrawFn, name: str) -> Expr:
    read = draw(stored(name))
    rows, columns = read.spec.shape
    match draw(st.sampled_from(["read", "read", "rows", "columns", "cast", "turned", "joined", "full"])):
        case "rows":
            start = draw(st.integers(0, rows))
            return build.narrow(read, 0, start, draw(st.integers(start, rows)))
        case "columns":
            start = draw(st.integers(0, columns))
            return build.narrow(read, 1, start, draw(st.integers(start, columns)))
        case "cast":
            return build.cast(read, "complex128")
        case "turned":
            return build.transpose(read)
        case "joined":
            return build.concat([read, read])
        case "full":
            return build.full(read.spec, 1)
    return read


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Expr]:
    keys = draw(st.lists(st.sampled_from(["a", "b", "c.a", "c.b", "c.d.a", "e"]), unique=True, max_size=5))
    return {key: draw(exprs(key)) for key in keys}


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    shares = st.sampled_from([0.0, 0.2, COLD, 0.5, 0.89, HOT, 1.0])
    storage = st.builds(Storage, kind=st.just("ext4"), mappable=st.booleans(), cached=shares, direct=st.booleans())
    found = {ref.path: draw(storage) for ref in FILES if draw(st.integers(0, 3))}
    memory = st.none() | st.sampled_from([0, 16 * MIB, 100 * MIB, 1 << 40])
    return Machine(threads=draw(st.integers(1, 8)), available=draw(memory), storage=FrozenMap(found))


intos = st.sampled_from(["fresh", "existing"])
memories = st.sampled_from(["own", "borrow"])


def bytes_wanted(plan: dict[str, Expr], chosen: Routing) -> dict[str, int]:
    """Bytes of the stored tensors of which anything is read, per file."""
    found: dict[str, int] = {}
    for key, expr in plan.items():
        if chosen.routes[key] != "map":
            for read, _ in reads(expr):
                found[read.file.path] = found.get(read.file.path, 0) + read.spec.nbytes
    return found


def stands_in_one_piece(expr: Expr, machine: Machine) -> bool:
    """Whether a file holds the very bytes of a tensor side by side, where its elements may begin."""
    read = expr.of if isinstance(expr, Index) else expr
    if not isinstance(read, Read) or not machine.storage.get(read.file.path, Storage()).mappable:
        return False
    ((_, box),) = reads(expr) if prod(spec_shape(expr)) else ((read, ((0, 0), (0, 0))),)
    strides = (read.spec.shape[1], 1)
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    last = sum((stop - 1) * stride for (_, stop), stride in zip(box, strides, strict=True))
    count = prod(stop - start for start, stop in box)
    size = read.spec.dtype.bits // 8
    return not count or (last - first + 1 == count and (read.offset + first * size) % size == 0)


def spec_shape(expr: Expr) -> tuple[int, ...]:
    from funcmodel.core.shapes import spec_of

    return spec_of(expr).shape


@some
@given(plans(), machines(), intos)
def test_every_key_has_a_route_and_the_choice_is_a_function(plan, machine, into):
    """keys(routing(p, m).routes) = keys(p); equal arguments give equal values; the order of the keys is irrelevant."""
    before = dict(plan)
    chosen = routing(plan, machine, into=into)
    assert set(chosen.routes) == set(plan)
    assert chosen == routing(dict(plan), evolve(machine), into=into)
    assert plan == before
    turned = routing(dict(reversed(plan.items())), machine, into=into)
    assert dict(turned.routes) == dict(chosen.routes)
    assert evolve(turned, routes=chosen.routes) == chosen
    assert all(not obstacle(way, plan[key], CPU, machine, fresh=into == FRESH) for key, way in chosen.routes.items())


@some
@given(plans(), machines(), intos)
def test_nothing_is_mapped_that_was_not_asked_for(plan, machine, into):
    """ "map" not in routing(p, m, memory="own", route=r) for any r but "map"."""
    for route in (None, "read", "slab", "transform", "stage"):
        assert "map" not in routing(plan, machine, into=into, route=route).routes.values()


@some
@given(plans(), machines())
def test_borrowing_maps_exactly_what_stands_in_its_file(plan, machine):
    """routing(p, m, memory="borrow").routes = routing(p, m).routes, but for what the file holds in one piece."""
    own, borrowed = routing(plan, machine).routes, routing(plan, machine, memory="borrow").routes
    for key, expr in plan.items():
        if borrowed[key] == "map":
            assert stands_in_one_piece(expr, machine)
        else:
            assert borrowed[key] == own[key]
            # What is empty has no place in its file, so either answer is right.
            assert not prod(spec_shape(expr)) or not stands_in_one_piece(expr, machine)


@some
@given(plans(), machines(), intos, st.sampled_from([None, *ROUTES]))
def test_past_the_cache_goes_what_is_large_and_cold_or_does_not_fit(plan, machine, into, route):
    """direct(p) and mapped(p) are disjoint; each follows from what was found of the file."""
    chosen = routing(plan, machine, into=into, route=route)
    assert not {*chosen.direct} & {*chosen.mapped}
    for path in chosen.direct:
        found, size = machine.storage[path], bytes_wanted(plan, chosen)[path]
        crowded = machine.available is not None and 2 * size > machine.available
        assert found.direct
        assert size >= LARGE
        assert found.cached < COLD or (crowded and found.cached < HOT)
    for path in chosen.mapped:
        assert machine.storage[path].mappable
        assert machine.storage[path].cached >= HOT
    assert chosen.threads >= machine.threads
    assert bool(chosen.buffers) == bool(chosen.buffer)
    if {"transform", "stage"} & set(chosen.routes.values()):
        assert chosen.buffers >= 1


@some
@given(plans(), machines(), intos, st.sampled_from([None, *ROUTES]))
def test_what_stays_on_the_cpu_passes_through_64_mib(plan, machine, into, route):
    """buffers(routing(p, m, on="cpu")) <= 64 MiB, however many threads read, and whatever they read past."""
    chosen = routing(plan, machine, into=into, route=route)
    assert cost(StateDictPlan(plan), routes=chosen).buffers <= 64 * MIB
    assert bool(chosen.span) == bool(chosen.direct)
    assert chosen.span % BLOCK == 0


@some
@given(plans(), machines(), machines())
def test_a_warmer_file_or_more_memory_takes_nothing_past_the_cache(plan, one, other):
    """cached <= cached' and available <= available'  =>  direct' is in direct, and mapped is in mapped'."""
    paths = one.storage.keys() & other.storage.keys()
    assume(paths)
    low = {p: evolve(one.storage[p], cached=min(one.storage[p].cached, other.storage[p].cached)) for p in paths}
    high = {p: evolve(one.storage[p], cached=max(one.storage[p].cached, other.storage[p].cached)) for p in paths}
    ranks = sorted((m.available for m in (one, other)), key=lambda n: float("inf") if n is None else n)
    colder = routing(plan, evolve(one, storage=FrozenMap(low), available=ranks[0]))
    warmer = routing(plan, evolve(one, storage=FrozenMap(high), available=ranks[1]))
    assert warmer.direct <= colder.direct
    assert colder.mapped <= warmer.mapped


@some
@given(plans(), machines(), intos, st.sampled_from(ROUTES))
def test_one_route_for_all_reaches_those_that_can_take_it(plan, machine, into, route):
    """routes[k] = r where k can take r, and what it was otherwise."""
    own = routing(plan, machine, into=into).routes
    asked = routing(plan, machine, into=into, route=route).routes
    for key, expr in plan.items():
        can = not obstacle(route, expr, CPU, machine, fresh=into == FRESH)
        assert asked[key] == (route if can else own[key])


@some
@given(plans(), machines(), intos, st.sampled_from(ROUTES), st.sampled_from(["{*r}", "c.{*r}", "{x}", "a", "z"]))
def test_a_template_reaches_all_that_it_matches_or_says_who_cannot(plan, machine, into, route, template):
    """routing(route={t: r}): the keys of t take r and no others; PlanError where one cannot, or there is none."""
    hits = {
        "{*r}": lambda key: True,
        "c.{*r}": lambda key: key.startswith("c."),
        "{x}": lambda key: "." not in key,
        "a": lambda key: key == "a",
        "z": lambda key: False,
    }
    matched = {key for key in plan if hits[template](key)}
    unable = {key for key in matched if obstacle(route, plan[key], CPU, machine, fresh=into == FRESH)}
    if unable or not matched:
        with pytest.raises(PlanError) as caught:
            routing(plan, machine, into=into, route={template: route})
        assert caught.value.keys
        assert set(caught.value.keys) <= (unable or {template})
        return
    own = routing(plan, machine, into=into).routes
    asked = routing(plan, machine, into=into, route={template: route}).routes
    assert dict(asked) == {key: route if key in matched else own[key] for key in plan}


@some
@given(plans(), machines(), memories)
def test_existing_tensors_are_neither_mapped_nor_moved_into_slabs(plan, machine, memory: Memory):
    """routing(into="existing") is in {read, transform, stage}; nothing can be borrowed for it."""
    if memory == "borrow":
        with pytest.raises(PlanError):
            routing(plan, machine, into="existing", memory=memory)
        return
    for route in (None, *ROUTES):
        chosen = routing(plan, machine, into="existing", route=route).routes
        assert set(chosen.values()) <= {"read", "transform", "stage"}


@some
@given(plans(), machines(), memories)
def test_what_goes_to_a_gpu_is_staged(plan, machine, memory: Memory):
    """routing(p, m, on="cuda").routes = {k: "stage"}, whatever is asked for; by name nothing else can be had."""
    gpu = device("cuda:0")
    for route in (None, *ROUTES):
        chosen = routing(plan, machine, on=gpu, memory=memory, route=route)
        assert set(chosen.routes.values()) <= {"stage"}
    for key in plan:
        with pytest.raises(PlanError):
            routing(plan, machine, on=gpu, route={key: "read"})


@some
@given(plans(), machines())
def test_slabs_hold_small_tensors_only(plan, machine):
    """A tensor on the route "slab" is stored as it is wanted and fits a slab, asked for or not."""
    for route in (None, "slab"):
        for key, way in routing(plan, machine, route=route).routes.items():
            expr = plan[key]
            read = lowering.stored(expr)
            assert way != "slab" or (read is not None and read.spec.nbytes <= SLAB)


@pytest.mark.parametrize("wrong", ["fast", "", "MAP", {"a": "fast"}])
def test_a_route_that_does_not_exist_is_a_value_error(wrong):
    """routing(route=r) raises ValueError for r not in ROUTES."""
    with pytest.raises(ValueError, match="route"):
        routing({"a": build.full(TensorSpec([1], "float32"), 1)}, route=wrong)
