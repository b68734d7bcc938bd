"""The public names: each exists, is documented, and stands in the typed block that type checkers read."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import funcmodel as fm

INIT = Path(fm.__file__).read_text("utf-8")


def test_every_public_name_resolves_and_is_listed() -> None:
    assert len(set(fm.__all__)) == len(fm.__all__)
    for name in fm.__all__:
        assert getattr(fm, name) is not None
        assert name in dir(fm)


def test_the_typed_block_names_exactly_the_public_names() -> None:
    typed = next(node for node in ast.parse(INIT).body if isinstance(node, ast.If))
    names = {
        alias.asname or alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert names | {"__version__"} == set(fm.__all__)


def test_every_public_function_and_class_has_a_docstring() -> None:
    for name in fm.__all__:
        value = getattr(fm, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), name


def test_functions_of_the_pure_rooms_show_an_example() -> None:
    for name in fm.__all__:
        value = getattr(fm, name)
        if inspect.isfunction(value) and value.__module__.startswith(("funcmodel.core", "funcmodel.plan")):
            assert ">>>" in (inspect.getdoc(value) or ""), name


def test_no_public_function_takes_a_boolean_parameter() -> None:
    for name in fm.__all__:
        value = getattr(fm, name)
        if inspect.isfunction(value):
            for parameter in inspect.signature(value).parameters.values():
                assert parameter.annotation is not bool, f"{name}({parameter.name})"
                assert not isinstance(parameter.default, bool), f"{name}({parameter.name})"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        fm.nothing  # noqa: B018


def test_import_itself_touches_neither_torch_nor_the_rooms() -> None:
    code = "import sys, funcmodel; print('torch' in sys.modules, sum(m.startswith('funcmodel.') for m in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False 0\n"
    )
