"""Many keys as few: `model.layers.{0...31}.mlp.{up, down}`, in time linear in the keys."""

from collections.abc import Callable, Collection, Iterable
from functools import cache
from itertools import groupby
from typing import Final, TypeAlias

_STAR_FROM: Final = 5  # so many different names below a number are written as `*`
_LISTED: Final = 8  # so many names one pair of braces lists
_DEPTH: Final = 64  # segments beyond this stay together: the tree is walked recursively
_NAMES: Final = "ijkmnpqr"


def fold(keys: Iterable[str], *, among: Collection[str] = ()) -> tuple[str, ...]:
    """The keys, with runs of numbers folded and leaves of one parent joined, in the order of their first key.

    Args:
        keys: dotted keys.
        among: all keys there are. Where five or more different names below a number are all there is, `*` stands for
            them; without `among`, the keys themselves are all there is.

    Example:
        >>> fold(["norm.w", *(f"layers.{i}.{name}" for i in range(32) for name in ("w", "b"))])
        ('norm.w', 'layers.{0...31}.{w, b}')
        >>> fold(["a.0", "a.1", "a.2", "a.7"]), fold(["head.weight"])
        (('a.{0...2, 7}',), ('head.weight',))
    """
    return folder(among)(keys)


def folder(among: Collection[str] = ()) -> Callable[[Iterable[str]], tuple[str, ...]]:
    """`fold` for several sets of keys among the same ones, which are looked at once.

    Example:
        >>> shorten = folder([f"h.{i}.{name}.w" for i in range(2) for name in "abcde"])
        >>> shorten(["h.0.a.w", "h.1.a.w"]), shorten(f"h.0.{name}.w" for name in "abcde")
        (('h.{0, 1}.a.w',), ('h.0.*',))
    """

    @cache
    def total() -> _Node:
        root = _tree(key.split(".", _DEPTH) for key in among)
        _measure(root, {}, None)
        return root

    def shorten(keys: Iterable[str]) -> tuple[str, ...]:
        listed = dict.fromkeys(keys)
        root = _tree(key.split(".", _DEPTH) for key in listed)
        _measure(root, {}, total() if len(listed) < len(among) else None)
        return tuple(line or "" for line in _lines(root, "."))

    return shorten


def fold_paths(paths: Iterable[str]) -> tuple[str, ...]:
    """File names with their numbers folded.

    Example:
        >>> fold_paths(["a/model-00001-of-00002.safetensors", "a/model-00002-of-00002.safetensors"])
        ('a/model-{00001...00002}-of-00002.safetensors',)
    """
    root = _tree(_pieces(path) for path in paths)
    _measure(root, {}, None)
    return tuple(line or "" for line in _lines(root, ""))


def _pieces(path: str) -> list[str]:
    pieces = ["".join(run) for _, run in groupby(path, str.isdigit)]
    return pieces if len(pieces) <= _DEPTH else [path]


def numbered(key: str) -> tuple[str, tuple[str, ...]]:
    """The key as a template with a placeholder per number, and the numbers.

    Example:
        >>> numbered("layers.3.experts.12.w1.weight")
        ('layers.{i}.experts.{j}.w1.weight', ('3', '12'))
    """
    numbers: list[str] = []
    segments: list[str] = []
    for segment in key.split("."):
        if segment.isdigit() and len(numbers) < len(_NAMES):
            segments.append("{" + _NAMES[len(numbers)] + "}")
            numbers.append(segment)
        else:
            segments.append(segment.replace("{", "{{").replace("}", "}}"))
    return ".".join(segments), tuple(numbers)


class _Node:
    """Everything below one prefix; built by `_tree`, measured once by `_measure`."""

    __slots__ = ("children", "ends", "keys", "shape", "whole")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.ends = False
        self.keys = 0
        self.shape = 0
        self.whole = True


_Shapes: TypeAlias = dict[tuple[bool, bool, frozenset[tuple[str, int]]], int]


def _tree(rows: Iterable[list[str]]) -> _Node:
    root = _Node()
    for segments in rows:
        node = root
        for segment in segments:
            child = node.children.get(segment)
            if child is None:
                child = node.children[segment] = _Node()
            node = child
        node.ends = True
    return root


def _measure(node: _Node, shapes: _Shapes, total: _Node | None) -> None:
    """Sets how many keys lie below, whether those are all there are, and a number that equal subtrees share."""
    keys = int(node.ends)
    content = []
    for label, child in node.children.items():
        _measure(child, shapes, total and total.children.get(label))
        keys += child.keys
        content.append((label, child.shape))
    node.keys = keys
    node.whole = total is None or total.keys <= keys
    node.shape = shapes.setdefault((node.ends, node.whole, frozenset(content)), len(shapes))


def _lines(node: _Node, dot: str) -> list[str | None]:
    """Texts of everything below a prefix, without the prefix; None is the prefix itself."""
    lines: list[str | None] = [None] if node.ends else []
    runs: dict[int, list[str]] = {}
    for label, child in node.children.items():
        if _is_number(label):
            runs.setdefault(child.shape, []).append(label)
    leaves = [] if not dot else [k for k, child in node.children.items() if not child.children and not _is_number(k)]
    for label, child in node.children.items():
        if _is_number(label):
            labels = runs.pop(child.shape, None)
            if labels is None:
                continue
            inner = _lines(child, dot)
            if len(inner) >= _STAR_FROM and child.whole:
                inner = ["*"]
            label = _run_text(labels)
        elif child.children or len(leaves) < 2:
            inner = _lines(child, dot)
        else:
            if label == leaves[0]:
                lines.append(_braces(leaves))
            continue
        lines += [label if text is None else f"{label}{dot}{text}" for text in inner]
    return lines


def _is_number(label: str) -> bool:
    return label.isdecimal() and label.isascii()


def _run_text(labels: list[str]) -> str:
    """`{0...31}`; a lone number stays bare."""
    if len(labels) == 1:
        return labels[0]
    ordered = sorted(labels, key=lambda label: (int(label), len(label)))
    runs: list[list[str]] = []
    for label in ordered:
        last = runs[-1][-1] if runs else None
        grown = last is not None and int(label) == int(last) + 1
        # 9 is followed by 10, but 09 belongs to another numbering.
        if last is not None and grown and (len(label) == len(last) or label[0] != "0" != last[0] or last == "0"):
            runs[-1].append(label)
        else:
            runs.append([label])
    return _braces([part for run in runs for part in (run if len(run) < 3 else [f"{run[0]}...{run[-1]}"])])


def _braces(parts: list[str]) -> str:
    more = len(parts) - _LISTED
    shown = parts if more <= 1 else [*parts[:_LISTED], f"and {more} more"]
    return "{" + ", ".join(shown) + "}"
