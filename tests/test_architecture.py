"""The import law: a module imports from lower rooms, or from its own without a cycle; packages stay in their rooms."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "funcmodel"
ROOMS = ("records", "core", "plan", "run", "bind")
LEVEL = {
    "errors": 0,
    "_toolz": 0,
    "api": 5,
    "cli": 6,
    "demo": 6,
    "__init__": 6,
    "__main__": 6,
    **dict(zip(ROOMS, range(5), strict=True)),
}
ALLOWED = {  # package -> the rooms and files that may import it
    "torch": {"run", "bind", "api", "demo"},
    "numpy": {"run"},
    "safetensors": {"run"},
    "accelerate": {"bind"},
    "toolz": {"_toolz"},
    "transformers": {"demo"},
    "fracast": {"demo"},
}
FILE_SYSTEM = {"os", "io", "pathlib", "shutil", "tempfile", "mmap", "socket", "subprocess", "glob", "fcntl"}
MODULES = sorted(ROOT.rglob("*.py"))


def place(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module
            case ast.ImportFrom():
                raise AssertionError("imports are absolute")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_where_it_may(path: Path) -> None:
    home = place(path)
    for name in imports(ast.parse(path.read_text("utf-8"))):
        top, _, rest = name.partition(".")
        if top == "funcmodel":
            other = rest.partition(".")[0] or "__init__"
            assert LEVEL[other] <= LEVEL[home], f"{home} (L{LEVEL[home]}) imports {name} (L{LEVEL[other]})"
        if top in ALLOWED:
            assert home in ALLOWED[top], f"{home} imports {top}"
        if top in FILE_SYSTEM:
            assert LEVEL[home] >= 3, f"{home} imports {top}"
            assert home != "bind", f"bind imports {top}"


def test_there_is_no_cycle() -> None:
    def name(path: Path) -> str:
        return ".".join(("funcmodel", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")

    graph = {name(p): set(imports(ast.parse(p.read_text("utf-8")))) for p in MODULES if p != ROOT / "__init__.py"}
    done: set[str] = set()

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, " -> ".join((*trail, node))
        if node in graph and node not in done:
            for child in sorted(graph[node]):
                visit(child, (*trail, node))
            done.add(node)

    for node in graph:
        visit(node, ())


def test_no_file_is_named_after_nothing() -> None:
    assert not {p.stem for p in MODULES} & {"utils", "helpers", "common", "types", "misc"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_records_core_and_plan_work_without_torch() -> None:
    names = [
        ".".join(("funcmodel", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for p in MODULES
        if place(p) in {"records", "core", "plan", "errors", "_toolz"}
    ]
    assert run(f"import sys; sys.modules['torch'] = None\nimport {', '.join(names)}\nprint('fine')") == "fine\n"


def test_import_after_torch_is_light() -> None:
    code = """
import torch, sys, time
before, start = set(sys.modules), time.process_time()
import funcmodel
funcmodel.load, funcmodel.save, funcmodel.skeleton, funcmodel.convert, funcmodel.describe
new = set(sys.modules) - before
foreign = {m for m in new if m.partition('.')[0] != 'funcmodel'}
heavy = {'accelerate', 'transformers', 'huggingface_hub', 'torch.distributed.checkpoint'} & set(sys.modules)
print(len(new), len(foreign), sorted(heavy))
"""
    new, foreign, heavy = run(code).split(maxsplit=2)
    assert int(new) <= 110, f"{new} new modules"
    assert int(foreign) <= 40, f"{foreign} modules that are not funcmodel's"
    assert heavy.strip() == "[]"
