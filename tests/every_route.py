"""A pytest plugin (`-p tests.every_route`) that runs every test once for each route.

It changes what is chosen where nobody asks: that route is then asked for, by every key that can take it. A test in
which nothing is loaded runs once.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings

import funcmodel.api
import funcmodel.bind.assign
import funcmodel.run.evaluate
from funcmodel.records.plans import LoadPlan
from funcmodel.records.routes import ROUTES

REPORT: Final = "FUNCMODEL_ROUTE_REPORT"  # path of the file that says what was run

# What the routes that are asked for here do not promise: test, those routes, and why.
_EVALUATE: Final = "tests/test_evaluate.py::test_"
EXEMPT: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "property_tests/test_evaluate.py::test_law_49_bytes_read_are_the_bytes_of_the_boxes_that_are_used": (
        ROUTES,
        "it counts what the process reads; whoever asks for a route has /proc read for a file of any size",
    ),
    f"{_EVALUATE}a_large_tensor_needs_its_own_bytes_and_a_small_buffer": (
        ("stage",),
        "its bound is that of the buffers on the way to the CPU; those on the way to a device are larger",
    ),
    f"{_EVALUATE}a_stream_holds_one_tensor": (("stage",), "likewise"),
    f"{_EVALUATE}one_small_tensor_keeps_no_more_than_its_block_alive": (
        ("read", "stage"),
        "there are no blocks, but small pieces of the heap, which keeps them",
    ),
    f"{_EVALUATE}large_tensors_are_read_by_threads_and_equal_what_safetensors_reads": (
        ("map",),
        "what is mapped begins where its file has it, not at a multiple of 64",
    ),
}

settings.register_profile(
    "routes", max_examples=8, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


class _Asked:
    """The route that the running test asks for, and what came of it."""

    def __init__(self) -> None:
        self.route = ""
        self.chosen = 0  # choices made in the running test
        self.idle: set[object] = set()  # tests in which nothing was chosen
        self.taken: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()

    def asking(self, resolve: Callable[..., Any]) -> Callable[..., Any]:
        """A function that chooses routes, asked for one where it was asked for none."""

        def resolved(*args: Any, memory: str = "own", route: Any = None, **options: Any) -> Any:
            if route is None and memory == "own" and self.route:
                route = self.route
            found = resolve(*args, memory=memory, route=route, **options)
            self.chosen += 1
            routing = found.routing if isinstance(found, LoadPlan) else found
            self.taken.update(way for way in routing.routes.values() if way == self.route)
            return found

        return resolved


_asked = _Asked()


def pytest_configure() -> None:
    probed = _asked.asking(funcmodel.bind.assign.probed)
    inner = funcmodel.run.evaluate._probed
    keyed = _asked.asking(
        lambda plan, formats, device, *, memory, route, into: inner(plan, formats, device, memory, route, into)
    )

    def by_position(plan: Any, formats: Any, device: Any, memory: Any, route: Any, into: Any = "fresh") -> Any:
        return keyed(plan, formats, device, memory=memory, route=route, into=into)

    funcmodel.run.evaluate._probed = by_position
    funcmodel.bind.assign.probed = funcmodel.api.probed = probed


@pytest.fixture(autouse=True)
def asked_route(request: pytest.FixtureRequest) -> Iterator[None]:
    _asked.route, _asked.chosen = request.param, 0
    yield
    _asked.route = ""
    if not _asked.chosen:
        _asked.idle.add(_same_test(request.node))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("asked_route", ROUTES, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is exempt, and refuse an exemption of a test that there is not."""
    if unknown := EXEMPT.keys() - {_name(item) for item in items}:
        raise pytest.UsageError(f"exempt, but no such test: {sorted(unknown)}")
    out = [item for item in items if _route(item) in ("", *EXEMPT.get(_name(item), ((),))[0])]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _same_test(item) in _asked.idle:
        pytest.skip("nothing is loaded in it")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _asked.passed.update(
            route for route in ROUTES if route in report.nodeid.partition("[")[2].strip("]").split("-")
        )


def pytest_sessionfinish() -> None:
    Path(os.environ[REPORT]).write_text(json.dumps({"passed": _asked.passed, "taken": _asked.taken}))


def _name(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _route(item: pytest.Item) -> str:
    """The route of an item; a doctest has none."""
    callspec = getattr(item, "callspec", None)
    return callspec.params["asked_route"] if callspec is not None else ""


def _same_test(item: pytest.Item) -> object:
    """Equal for one test with one set of parameters, whatever its route."""
    indices = item.callspec.indices  # type: ignore[attr-defined]
    return _name(item), tuple((name, i) for name, i in indices.items() if name != "asked_route")
