"""Rules: any at all over a few keys, and packs together with a plan on which they have an inverse."""

from itertools import accumulate, count, pairwise

from hypothesis import strategies as st

from funcmodel.core import build
from funcmodel.core.shapes import spec_of
from funcmodel.core.templates import fill, placeholders
from funcmodel.records.expressions import Expr, FileRef
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.rules import Merge, Rename, Rule, Split, Stacked, Transpose, Unstacked
from funcmodel.records.tensors import TensorSpec
from property_tests.strategies.keys import key_sets, keys, template_texts

FILE = FileRef("theirs/model.safetensors", "safetensors", 1 << 30, "0" * 32)
FEWER = ("a", "0", "1")
SHAPES = ((4, 4), (4, 4), (4, 4), (2, 4), (4, 2), (4,), (), (2, 4, 4))


def stored(shapes: dict[str, tuple[int, ...]]) -> StateDictPlan:
    """A plan as `scan` would give it: one tensor after the other in one file."""
    specs = {key: TensorSpec(shape, "float32") for key, shape in shapes.items()}
    offsets = accumulate((spec.nbytes for spec in specs.values()), initial=4096)
    entries = zip(specs.items(), offsets, strict=False)
    return StateDictPlan({key: build.read(FILE, key, spec, offset) for (key, spec), offset in entries})


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """Any rule that `convert` accepts, over few segments."""
    fields = draw(st.sampled_from(((), ("i",), ("i",), ("*r",), ("i", "j"), ("i", "*r"))))
    text = template_texts(fields, FEWER, partial=False, max_literals=2)
    several = st.lists(text, min_size=2, max_size=3, unique=True)
    numbered = template_texts((*fields, "e"), FEWER, partial=False, max_literals=1)
    dim = st.integers(-2, 1)
    kind = draw(st.sampled_from((Rename, Rename, Merge, Split, Stacked, Unstacked, Transpose)))
    if kind is Rename:
        return Rename(draw(text), draw(text))
    if kind is Transpose:
        return Transpose(draw(text), tuple(draw(st.permutations(range(draw(st.sampled_from((2, 2, 2, 0, 1, 3))))))))
    if kind is Stacked or kind is Unstacked:
        how = {"over": "e", "dim": draw(dim), "count": draw(st.none() | st.integers(1, 3))}
        one, many = draw(text), draw(numbered)
        return Stacked(many, one, **how) if kind is Stacked else Unstacked(one, many, **how)
    many_texts = draw(several)
    sizes = draw(st.none() | st.lists(st.integers(1, 4), min_size=len(many_texts), max_size=len(many_texts)))
    if kind is Merge:
        return Merge(many_texts, draw(text), draw(dim), sizes)
    return Split(draw(text), many_texts, draw(dim), sizes)


def sources(rule: Rule) -> tuple[str, ...]:
    """The templates of the keys that a rule takes."""
    if isinstance(rule, Merge):
        return rule.sources
    return (rule.template,) if isinstance(rule, Transpose) else (rule.source,)


@st.composite
def encounters(draw: st.DrawFn, max_rules: int = 4) -> tuple[tuple[Rule, ...], StateDictPlan]:
    """Any rules, and a plan whose keys they meet: whole groups, groups with a gap, and keys of nobody."""
    some = draw(st.lists(rules(), min_size=1, max_size=max_rules))
    found = draw(key_sets(FEWER, 2, max_segments=3))
    for rule in some:
        numbers = [str(n) for n in range(draw(st.integers(1, 3)))] if isinstance(rule, Stacked) else ["0"]
        for _ in range(draw(st.integers(0, 2))):
            texts = sources(rule)
            shared = {name: draw(keys(FEWER, 2 if many else 1)) for name, many in placeholders(texts[0]).items()}
            found += [fill(t, shared | ({"e": n} if "e" in shared else {})) for t in texts for n in numbers]
        if found and not draw(st.integers(0, 7)):
            found.remove(draw(st.sampled_from(found)))
    usual = draw(st.sampled_from(SHAPES))
    odd = st.integers(0, 9).flatmap(lambda n: st.just(usual) if n else st.sampled_from(SHAPES))
    return tuple(some), stored({key: draw(odd) for key in draw(st.permutations(list(dict.fromkeys(found))))})


Family = tuple[str, tuple[int, ...]]


class _Pack:
    """Families of keys (a template over {i}, or a literal key, with a shape) and the rules that lead to them."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.fresh = (f"t{n}" for n in count())
        self.layers = draw(st.integers(1, 4))
        shape = st.sampled_from(((2, 4), (4, 2), (4, 4), (4,), (2, 2, 4)))
        roots = draw(st.lists(st.sampled_from(("h", "h.w", "layers", "x")), min_size=1, max_size=2, unique=True))
        leaves = draw(st.lists(st.sampled_from(("q", "k", "v", "o.weight")), min_size=1, max_size=4, unique=True))
        self.families: list[Family] = [(f"{root}.{{i}}.{leaf}", draw(shape)) for root in roots for leaf in leaves]
        self.families += [("norm.weight", (4,)), ("norm", (4, 4))]
        self.rules: list[Rule] = []

    def start(self) -> dict[str, tuple[int, ...]]:
        return {
            text.replace("{i}", str(i)): shape
            for text, shape in self.families
            for i in range(self.layers if "{i}" in text else 1)
        }

    def new(self, like: str) -> str:
        """A target that no other key matches, with the placeholders of `like`."""
        name = next(self.fresh)
        return (
            self.draw(st.sampled_from((f"{name}.{{i}}.w", f"{{i}}.{name}", f"{name}.l{{i}}")))
            if "{i}" in like
            else name
        )

    def pop(self, suits: object = None) -> Family | None:
        fitting = [f for f in self.families if suits is None or suits(f)]  # type: ignore[operator]
        if not fitting:
            return None
        family = self.draw(st.sampled_from(fitting))
        self.families.remove(family)
        return family

    def step(self) -> None:
        getattr(self, self.draw(st.sampled_from(("rename", "prefix", "merge", "split", "stack", "unstack", "turn"))))()

    def rename(self) -> None:
        text, shape = self.pop() or ("", ())
        new = self.new(text)
        self.rules.append(Rename(text, new))
        self.families.append((new, shape))

    def prefix(self) -> None:
        name = next(self.fresh)
        self.rules.append(Rename("{*rest}", f"{name}.{{*rest}}"))
        self.families = [(f"{name}.{text}", shape) for text, shape in self.families]

    def merge(self) -> None:
        text, shape = self.pop(lambda f: f[1]) or ("", ())
        if not shape:
            return
        dim = self.draw(st.integers(0, len(shape) - 1))
        members, sizes = [text], [shape[dim]]
        for other, size in list(self.families):
            rest = (*size[:dim], *size[dim + 1 :])
            same = len(size) == len(shape) and rest == (*shape[:dim], *shape[dim + 1 :])
            if same and ("{i}" in other) == ("{i}" in text) and self.draw(st.booleans()):
                members.append(other)
                sizes.append(size[dim])
                self.families.remove((other, size))
        new = self.new(text)
        equal = len(set(sizes)) == 1 and self.draw(st.booleans())
        self.rules.append(
            Merge(members, new, dim - self.draw(st.sampled_from((0, len(shape)))), None if equal else sizes)
        )
        self.families.append((new, (*shape[:dim], sum(sizes), *shape[dim + 1 :])))

    def split(self) -> None:
        text, shape = self.pop(lambda f: f[1]) or ("", ())
        if not shape:
            return
        dim = self.draw(st.integers(0, len(shape) - 1))
        cuts = self.draw(st.lists(st.integers(0, shape[dim]), max_size=2, unique=True))
        sizes = [stop - start for start, stop in pairwise(sorted({0, *cuts, shape[dim]}))]
        targets = [self.new(text) for _ in sizes]
        equal = len(set(sizes)) == 1 and self.draw(st.booleans())
        self.rules.append(Split(text, targets, dim, None if equal else sizes))
        self.families += [(t, (*shape[:dim], n, *shape[dim + 1 :])) for t, n in zip(targets, sizes, strict=True)]

    def stack(self) -> None:
        text, shape = self.pop(lambda f: "{i}" in f[0]) or ("", ())
        if not text:
            return
        dim = self.draw(st.integers(0, len(shape)))
        new = next(self.fresh)
        self.rules.append(Stacked(text, new, "i", dim, self.draw(st.sampled_from((None, self.layers)))))
        self.families.append((new, (*shape[:dim], self.layers, *shape[dim:])))

    def unstack(self) -> None:
        text, shape = self.pop(lambda f: "{i}" not in f[0] and f[1]) or ("", ())
        if not text:
            return
        dim = self.draw(st.integers(0, len(shape) - 1))
        name, rest = next(self.fresh), (*shape[:dim], *shape[dim + 1 :])
        self.rules.append(Unstacked(text, f"{name}.{{e}}.w", "e", dim - self.draw(st.sampled_from((0, len(shape))))))
        self.families += [(f"{name}.{n}.w", rest) for n in range(shape[dim])]

    def turn(self) -> None:
        text, shape = self.pop() or ("", ())
        dims = tuple(self.draw(st.permutations(range(len(shape)))))
        self.rules.append(Transpose(text, dims))
        self.families.append((text, tuple(shape[d] for d in dims)))


@st.composite
def packs(draw: st.DrawFn) -> tuple[StateDictPlan, tuple[Rule, ...]]:
    """A plan as scanned and rules in whose domain it is: each makes keys that nothing else looks like."""
    pack = _Pack(draw)
    shapes = pack.start()
    for _ in range(draw(st.integers(0, 6))):
        pack.step()
    order = draw(st.permutations(list(shapes)))
    return stored({key: shapes[key] for key in order}), tuple(pack.rules)


@st.composite
def views(draw: st.DrawFn) -> tuple[StateDictPlan, StateDictPlan]:
    """A plan as scanned, and one whose keys hold boxes of its tensors that cover each of them once."""
    scanned = stored({f"s{n}": draw(st.sampled_from(SHAPES)) for n in range(draw(st.integers(1, 3)))})
    parts = {f"{name}.{n}": part for name, expr in scanned.items() for n, part in enumerate(_cut(draw, expr, 3))}
    order = draw(st.permutations(list(parts)))
    return scanned, StateDictPlan({key: parts[key] for key in order})


def _cut(draw: st.DrawFn, expr: Expr, depth: int) -> list[Expr]:
    """Parts of an expression that hold each of its elements once, in whatever way the vocabulary allows."""
    shape = spec_of(expr).shape
    if not depth or not shape:
        return [expr]
    dim = draw(st.integers(0, len(shape) - 1))
    length = shape[dim]
    match draw(st.sampled_from(("stop", "slice", "select", "take", "turn", "cast", "reshape"))):
        case "slice" if length > 1:
            cut = draw(st.integers(1, length - 1))
            parts = [build.narrow(expr, dim, 0, cut), build.narrow(expr, dim, cut, length)]
        case "select":
            parts = [build.select(expr, dim, n) for n in range(length)]
        case "take":
            rows = draw(st.permutations(range(length)))
            cut = draw(st.integers(0, length))
            parts = [build.take(expr, part, dim) for part in (rows[:cut], rows[cut:]) if part]
        case "turn":
            parts = [build.permute(expr, draw(st.permutations(range(len(shape)))))]
        case "cast":
            parts = [build.cast(expr, "float64")]
        case "reshape":
            parts = [build.reshape(expr, (-1,)) if draw(st.booleans()) else build.reshape(expr, (*shape, 1))]
        case _:
            parts = [expr]
    return [part for piece in parts for part in _cut(draw, piece, depth - 1)]
