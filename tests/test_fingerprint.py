"""No public function changes the process or its arguments: when it succeeds, when it fails, when it is interrupted."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import funcmodel as fm
from tests.fingerprint import differences, fingerprint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("angles", 1.0 / torch.arange(1, 5), persistent=False)


def boom(*args: torch.Tensor) -> torch.Tensor:
    raise ValueError("as asked")


class Boom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        raise ValueError("as asked")


@pytest.fixture
def w(tmp_path: Path) -> Any:
    """A small world: a module, its state dict, a checkpoint of it, plans."""
    net = Net()
    state = {key: value.detach().clone() for key, value in net.state_dict().items() if key != "head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    plan = fm.scan(tmp_path)
    spec = fm.module_spec(net)
    load = fm.checked(fm.plan_load(spec, plan))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{}")
    return SimpleNamespace(
        net=net,
        state=state,
        path=tmp_path,
        plan=plan,
        spec=spec,
        load=load,
        broken=broken,
        config={"a": 1},
        save=fm.plan_save(plan),
        checkpoint=fm.scan_checkpoint(tmp_path),
        ties=spec.tied,
        out=tmp_path / "out",
        other=Net(),
        linear=nn.Linear(3, 2),
        failing=fm.at("frozen", lambda k, e: fm.expr.call("tests.test_fingerprint:boom", (e,), fm.spec_of(e)))(plan),
    )


Calls = tuple[Callable[[Any], object], Callable[[Any], object]]
RULE = fm.Rename("frozen", "thawed")
# Of every public function, a call that succeeds and one that fails.
FUNCTIONS: dict[str, Calls] = {
    "compose_left": (lambda w: fm.compose_left(len)("a"), lambda w: fm.compose_left(len)(1)),
    "pipe": (lambda w: fm.pipe(w.plan, fm.cast("bfloat16")), lambda w: fm.pipe(w.plan, fm.cast("no"))),
    "load": (lambda w: fm.load(fm.skeleton(Net), w.path), lambda w: fm.load(w.net, w.failing)),
    "save": (lambda w: fm.save(w.net, w.out, config=w.config), lambda w: fm.save(w.failing, w.out)),
    "apply": (lambda w: fm.apply(w.save, w.out), lambda w: fm.apply(w.plan, w.out)),
    "assign": (lambda w: fm.assign(w.load, w.other), lambda w: fm.assign(w.load, w.linear)),
    "initialize": (
        lambda w: fm.initialize(w.linear, fm.Initialize("", ("bias",), "reset_parameters", 0, fm.device("cpu"))),
        lambda w: fm.initialize(w.net, fm.Initialize("no", ("bias",), "reset_parameters", 0, fm.device("cpu"))),
    ),
    "live_tensors": (lambda w: fm.live_tensors(w.net), lambda w: fm.live_tensors(None)),
    "module_spec": (lambda w: fm.module_spec(w.net), lambda w: fm.module_spec(None)),
    "skeleton": (lambda w: fm.skeleton(Net), lambda w: fm.skeleton(Boom)),
    "spec_of": (lambda w: fm.spec_of(w.plan["frozen"]), lambda w: fm.spec_of(None)),
    "parse_config": (lambda w: fm.parse_config('{"a": 1}'), lambda w: fm.parse_config("{")),
    "render_config": (lambda w: fm.render_config(fm.Config(w.config)), lambda w: fm.render_config(None)),
    "cast": (lambda w: fm.cast("float16", where="frozen")(w.plan), lambda w: fm.cast("float16", where="no")(w.plan)),
    "casts": (lambda w: fm.casts(w.plan), lambda w: fm.casts(None)),
    "like": (lambda w: fm.like(w.spec)(w.plan), lambda w: fm.like(None)(w.plan)),
    "from_json": (lambda w: fm.from_json(fm.to_json(w.load)), lambda w: fm.from_json("{")),
    "to_json": (lambda w: fm.to_json(w.plan), lambda w: fm.to_json(w.net)),
    "convert": (lambda w: fm.convert(RULE)(w.plan), lambda w: fm.convert(fm.Rename("{a}.{b}", "{a}"))(w.plan)),
    "inverse": (lambda w: fm.inverse(RULE), lambda w: fm.inverse(None)),
    "invert": (lambda w: fm.invert(RULE), lambda w: fm.invert(None)),
    "unmatched": (lambda w: fm.unmatched((RULE,), w.plan), lambda w: fm.unmatched((None,), w.plan)),
    "describe": (lambda w: fm.describe(w.load), lambda w: fm.describe(w.net)),
    "fold": (lambda w: fm.fold(["a.0", "a.1"]), lambda w: fm.fold(None)),
    "diff": (lambda w: fm.diff(w.plan, w.checkpoint), lambda w: fm.diff(w.plan, None)),
    "checked": (lambda w: fm.checked(w.load), lambda w: fm.checked(fm.plan_load(w.spec, {}))),
    "plan_load": (
        lambda w: fm.plan_load(w.spec, w.plan),
        lambda w: fm.plan_load(w.spec, w.plan, device_map={"no": "x"}),
    ),
    "chunk": (lambda w: fm.chunk(10, 3, 1), lambda w: fm.chunk(10, 0, 1)),
    "tp_slice": (
        lambda w: fm.tp_slice({"embed.weight": 0}, rank=0, world_size=2)(w.plan),
        lambda w: fm.tp_slice({"no": 0}, rank=0, world_size=2)(w.plan),
    ),
    "aligned": (lambda w: fm.aligned(w.spec)(w.plan), lambda w: fm.aligned(None)(w.plan)),
    "alignment": (lambda w: fm.alignment(w.spec, w.plan), lambda w: fm.alignment(None, w.plan)),
    "cost": (lambda w: fm.cost(w.load), lambda w: fm.cost(None)),
    "footprint": (lambda w: fm.footprint(w.spec), lambda w: fm.footprint(None)),
    "nbytes": (lambda w: fm.nbytes(w.plan), lambda w: fm.nbytes(None)),
    "num_parameters": (lambda w: fm.num_parameters(w.spec), lambda w: fm.num_parameters(None)),
    "origins": (lambda w: fm.origins(w.spec, w.load), lambda w: fm.origins(None, None)),
    "resize_rows": (
        lambda w: fm.resize_rows("embed.weight", 8, fill=0.0)(w.plan),
        lambda w: fm.resize_rows("no", 8, fill=0.0)(w.plan),
    ),
    "resized": (lambda w: fm.resized("embed.weight", 8)(w.spec), lambda w: fm.resized("no", 8)(w.spec)),
    "restored": (lambda w: fm.restored(w.plan)(w.plan), lambda w: fm.restored(None)(None)),
    "live_plan": (lambda w: fm.live_plan(w.spec), lambda w: fm.live_plan(None)),
    "plan_save": (lambda w: fm.plan_save(w.plan), lambda w: fm.plan_save(w.plan, variant="../x")),
    "plan_shards": (lambda w: fm.plan_shards({"a": 3}, 2), lambda w: fm.plan_shards({"a": 3}, "x")),
    "canonical": (lambda w: fm.canonical(w.ties), lambda w: fm.canonical((None,))),
    "dedupe": (lambda w: fm.dedupe(w.ties)(w.plan), lambda w: fm.dedupe(None)(w.plan)),
    "recorded": (lambda w: fm.recorded(w.checkpoint), lambda w: fm.recorded(None)),
    "spread": (lambda w: fm.spread(w.ties)(w.plan), lambda w: fm.spread(None)(w.plan)),
    "at": (lambda w: fm.at("frozen", lambda k, e: e)(w.plan), lambda w: fm.at("frozen", lambda k, e: 1 / 0)(w.plan)),
    "combine": (lambda w: fm.combine("mean", *[fm.keep("frozen")(w.plan)] * 2), lambda w: fm.combine("mean")),
    "drop": (lambda w: fm.drop("frozen")(w.plan), lambda w: fm.drop("no")(w.plan)),
    "keep": (lambda w: fm.keep("frozen")(w.plan), lambda w: fm.keep("no")(w.plan)),
    "overlay": (lambda w: fm.overlay(w.plan)(w.plan), lambda w: fm.overlay(None)(w.plan)),
    "take": (lambda w: fm.take("frozen", [0])(w.plan), lambda w: fm.take("frozen", [9])(w.plan)),
    "device": (lambda w: fm.device("cuda:1"), lambda w: fm.device("")),
    "device_map": (lambda w: fm.device_map("cpu"), lambda w: fm.device_map(3.5)),
    "dtype": (lambda w: fm.dtype("float32"), lambda w: fm.dtype("float31")),
    "format_size": (lambda w: fm.format_size(10), lambda w: fm.format_size("x")),
    "parse_size": (lambda w: fm.parse_size("1GB"), lambda w: fm.parse_size("1XB")),
    "fill": (
        lambda w: fm.fill(w.plan, {k: torch.zeros_like(v) for k, v in w.state.items()}),
        lambda w: fm.fill(w.plan, {}),
    ),
    "materialize": (lambda w: fm.materialize(w.plan), lambda w: fm.materialize(w.failing)),
    "routing": (lambda w: fm.routing(w.plan, memory="borrow"), lambda w: fm.routing(w.plan, route={"no": "map"})),
    "routed": (lambda w: fm.routed(w.load), lambda w: fm.routed(w.load, commit="in_place", memory="borrow")),
    "machine": (lambda w: fm.machine([r.file for r in w.plan.values()], smallest=0), lambda w: fm.machine(None)),
    "probed": (lambda w: fm.probed(w.load, memory="borrow"), lambda w: fm.probed(w.load, route={"no": "map"})),
    "stream": (lambda w: list(fm.stream(w.plan)), lambda w: list(fm.stream(w.failing))),
    "existing_checkpoint": (lambda w: fm.existing_checkpoint(w.path), lambda w: fm.existing_checkpoint("a\0")),
    "torch_zip": (lambda w: fm.torch_zip(".x"), lambda w: fm.scan(w.broken, formats=(fm.torch_zip(".safetensors"),))),
    "legacy_torch": (
        lambda w: fm.legacy_torch(".x"),
        lambda w: fm.scan(w.broken, formats=(fm.legacy_torch(".safetensors"),)),
    ),
    "plan_of": (lambda w: fm.plan_of(w.checkpoint), lambda w: fm.plan_of(None)),
    "scan": (lambda w: fm.scan(w.path), lambda w: fm.scan(w.broken)),
    "scan_checkpoint": (lambda w: fm.scan_checkpoint(w.path), lambda w: fm.scan_checkpoint(w.broken)),
    "record_digests": (lambda w: fm.record_digests(w.path), lambda w: fm.record_digests(w.broken)),
    "verify": (lambda w: fm.verify(w.path), lambda w: fm.verify(w.path / "nowhere")),
    "write": (lambda w: fm.write(w.save, w.out), lambda w: fm.write(fm.plan_save(w.failing), w.out)),
}


def public(test: Callable[[Any], bool]) -> list[str]:
    return [name for name in fm.__all__ if test(getattr(fm, name))]


def test_every_public_function_has_its_two_calls() -> None:
    assert set(public(inspect.isroutine)) <= set(FUNCTIONS)


def unchanged(call: Callable[[], object], *arguments: Any) -> BaseException | None:
    """Make a call, and compare; its error is returned."""
    before = fingerprint(*arguments)
    raised: BaseException | None = None
    try:
        call()
    except BaseException as error:
        raised = error
    after = fingerprint(*arguments)
    assert differences(before, after) == []
    return raised


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_leaves_the_process_and_its_arguments_alone(name: str, w: Any) -> None:
    good, bad = FUNCTIONS[name]
    for _ in range(2):  # the first call may import
        raised = None
        try:
            good(w)
            bad(w)
        except Exception as error:
            raised = error
        assert raised is not None, f"the second call of {name} does not fail"
    arguments = (w.net, w.state, w.config, w.plan, w.spec, w.load)
    assert unchanged(lambda: good(w), *arguments) is None
    assert isinstance(unchanged(lambda: bad(w), *arguments), Exception)


def test_records_and_errors_are_made_without_a_trace(w: Any) -> None:
    """Instances that a checkpoint, a module and plans hold, made again; errors; and calls that no class accepts."""
    held: dict[type, Any] = {}

    def collect(value: Any) -> None:
        if attrs.has(type(value)):
            held.setdefault(type(value), value)
            for field in attrs.fields(type(value)):
                collect(getattr(value, field.name, None))
        elif isinstance(value, dict | fm.FrozenMap):
            for inner in value.values():
                collect(inner)
        elif isinstance(value, tuple | list):
            for inner in value:
                collect(inner)

    for value in (w.plan, w.spec, w.load, w.save, w.checkpoint, fm.cost(w.load), fm.FORMATS, RULE):
        collect(value)

    def make() -> None:
        for name in public(inspect.isclass):
            cls = getattr(fm, name)
            if issubclass(cls, BaseException):
                str(cls("message"))
            elif cls in held:
                attrs.evolve(held[cls]), hash(held[cls]), repr(held[cls])
            with suppress(Exception):
                cls(object(), no_such_argument=1)

    make()
    assert len(held) > 15
    assert unchanged(make, w.net, w.state) is None


# -- errors and interrupts at every step -------------------------------------------------------------------------------

ERRORS = (OSError(5, "as asked"), MemoryError("as asked"), KeyboardInterrupt("as asked"))


def steps(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, error: BaseException) -> Iterator[list[int]]:
    """Fail the first, the second, ... call of a function of the system's or of torch, until none fails any more."""
    original = getattr(where, name)
    at = 0
    while True:
        at += 1
        count = [0]

        def failing(*args: Any, count: list[int] = count, at: int = at, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                raise error
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, failing)
            yield count
        if count[0] < at:
            return


WORK: dict[str, Callable[[Any], object]] = {
    "swap": lambda w: fm.apply(w.load, w.net),
    "in_place": lambda w: fm.apply(w.load, w.net, commit="in_place"),
    "materialize": lambda w: fm.materialize(fm.cast("bfloat16")(w.plan)),
    "save": lambda w: fm.save(w.net, w.out, durability="none"),
    "skeleton": lambda w: fm.skeleton(Net),
    "scan": lambda w: fm.scan(w.path),
}
PLACES = [(os, "preadv"), (os, "open"), (os, "fstat"), (torch, "empty"), (torch, "from_numpy"), (nn.init, "normal_")]


@pytest.mark.parametrize("where", PLACES, ids=lambda place: place[1])
@pytest.mark.parametrize("what", WORK)
def test_g6_after_a_failure_of_any_step_all_is_what_it_was(
    what: str, where: tuple[Any, str], w: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the process; and in the module, but for what an error of an in-place load names."""
    for error in ERRORS:
        for count in steps(monkeypatch, *where, error):
            old = {key: value.clone() for key, value in w.net.state_dict().items()}
            with torch.no_grad():
                for p in w.net.parameters():
                    p.add_(1)
            marked = {key: value.clone() for key, value in w.net.state_dict().items()}
            arguments = (w.state, w.config) if what in ("swap", "in_place") else (w.net, w.state, w.config)
            objects = [id(t) for t in (*w.net.parameters(), *w.net.buffers())]
            raised = unchanged(lambda: WORK[what](w), *arguments)
            assert objects == [id(t) for t in (*w.net.parameters(), *w.net.buffers())]
            if raised is None:
                continue
            assert count[0] > 0
            if isinstance(error, KeyboardInterrupt):
                assert isinstance(raised, KeyboardInterrupt)
            changed = {k for k, v in w.net.state_dict().items() if not torch.equal(v, marked[k])}
            told = {*getattr(raised, "torn", ()), *getattr(raised, "done", ())}
            if what == "in_place" and not isinstance(raised, fm.ActionError) and getattr(raised, "__notes__", ()):
                told |= changed
            if "embed.weight" in told:
                told.add("head.weight")
            assert changed <= told
            assert old.keys() == marked.keys()


def test_an_error_at_any_step_of_a_constructor(w: Any) -> None:
    class Stepwise(nn.Module):
        def __init__(self, fail_at: int, error: type[BaseException]) -> None:
            super().__init__()
            for i, make in enumerate((self.first, self.second, self.third, self.fourth)):
                if i == fail_at:
                    raise error("as asked")
                make()

        def first(self) -> None:
            self.linear = nn.Linear(600, 500)

        def second(self) -> None:
            nn.init.orthogonal_(self.linear.weight)

        def third(self) -> None:
            self.register_buffer("sum", self.linear.weight.detach().sum(0))

        def fourth(self) -> None:
            torch.manual_seed(3)

    for error in (ValueError, KeyboardInterrupt):
        for at in range(4):
            fm.skeleton(Net)
            raised = unchanged(lambda at=at, error=error: fm.skeleton(Stepwise, at, error), w.net)  # type: ignore[misc]
            assert type(raised) is error
