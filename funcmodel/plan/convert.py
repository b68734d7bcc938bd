"""`convert`: rules applied to a plan. `invert` and `inverse`: rules turned around.

Rules act one after the other, each on the whole set of keys. A key costs what touches it, not how many rules there
are: it waits in the queue of the first rule that matches it, and what that rule makes of it is matched again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any, Final, TypeAlias, TypeVar, assert_never

from funcmodel.core import build
from funcmodel.core.shapes import shape_of
from funcmodel.core.templates import Values, fill, filled
from funcmodel.errors import RuleError, ShapeError
from funcmodel.plan.companions import check_whole, companions
from funcmodel.plan.rulebook import Compiled, Rulebook, reordered, wrong
from funcmodel.plan.transforms import Transform
from funcmodel.records.expressions import Expr
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.rules import Merge, Rename, Rule, Split, Stacked, Transpose, Unstacked

_SHOWN: Final = 8
T = TypeVar("T")

# A key that waits for its rule: the key, which source of the rule it matches, and the values.
Hit: TypeAlias = tuple[str, int, Values]
# What a rule makes: the keys it takes, and the keys it gives for them.
Product: TypeAlias = tuple[tuple[str, ...], Sequence[tuple[str, Expr]]]


def convert(*rules: Rule) -> Transform:
    """Applies `rules`, one after the other, each to the whole set of keys that the ones before it left.

    A key that no rule matches stays as it is; a rule that matches nothing does nothing (`unmatched` names those, for
    packs of rules that must fit). What a rule makes takes the place of the first key it was made from.

    Args:
        rules: for example a published pack; both sides of each have the same placeholders, so that `inverse` exists.

    Returns:
        A transform. `convert()` is the identity, `convert(*a, *b)` is `convert(*a)` followed by `convert(*b)`.

    Raises:
        TemplateError: a template cannot be parsed.
        RuleError: a rule has no inverse by its form. By the transform: two keys would become one, a member of a
            `Merge` or a number of a `Stacked` is missing, sizes or shapes do not fit, or a quantized weight is touched
            and one of its scales is not. Fields `rule` and `keys`.

    Example:
        >>> from funcmodel.records.rules import Merge, Rename
        >>> from funcmodel.records.tensors import TensorSpec
        >>> spec = TensorSpec([2, 4], "float32")
        >>> plan = StateDictPlan({k: build.live(k, spec) for k in ("model.0.q", "model.0.k", "model.norm")})
        >>> rules = (Rename("model.{*rest}", "{*rest}"), Merge(("{i}.q", "{i}.k"), "{i}.qk"))
        >>> mine = convert(*rules)(plan)
        >>> list(mine), shape_of(mine["0.qk"])
        (['0.qk', 'norm'], (4, 4))
        >>> convert(*inverse(*rules))(mine) == plan
        True
    """
    book = Rulebook(rules)

    def transform(plan: StateDictPlan) -> StateDictPlan:
        return _Run(book, plan).finish() if rules else plan

    return transform


def unmatched(rules: Iterable[Rule], plan: StateDictPlan) -> tuple[Rule, ...]:
    """The rules that match nothing when `rules` are applied to `plan`.

    Raises:
        TemplateError: as `convert`.
        RuleError: as `convert`.

    Example:
        >>> from funcmodel.records.rules import Rename
        >>> from funcmodel.records.tensors import TensorSpec
        >>> plan = StateDictPlan({"a.w": build.live("a.w", TensorSpec([2], "float32"))})
        >>> unmatched([Rename("a.{*p}", "b.{*p}"), Rename("a.{*p}", "c.{*p}"), Rename("b.{*p}", "d.{*p}")], plan)
        (Rename(source='a.{*p}', target='c.{*p}'),)
    """
    book = Rulebook(rules)
    run = _Run(book, plan)
    run.finish()
    return tuple(entry.rule for entry, hits in zip(book.rules, run.queues, strict=True) if not hits)


def invert(rule: Rule) -> Rule:
    """The rule that undoes `rule`.

    Raises:
        RuleError: the dims of a `Transpose` are no permutation.

    Example:
        >>> from funcmodel.records.rules import Merge
        >>> invert(Merge(("{i}.q", "{i}.k"), "{i}.qk", sizes=(4, 2)))
        Split(source='{i}.qk', targets=('{i}.q', '{i}.k'), dim=0, sizes=(4, 2))
    """
    match rule:
        case Rename(source, target):
            return Rename(target, source)
        case Merge(sources, target, dim, sizes):
            return Split(target, sources, dim, sizes)
        case Split(source, targets, dim, sizes):
            return Merge(targets, source, dim, sizes)
        case Stacked(source, target, over, dim, number):
            return Unstacked(target, source, over, dim, number)
        case Unstacked(source, target, over, dim, number):
            return Stacked(target, source, over, dim, number)
        case Transpose(text, dims):
            if sorted(dims) != list(range(len(dims))):
                raise wrong(rule, f"dims must name each axis once, found {list(dims)}", found=dims)
            return Transpose(text, tuple(dims.index(axis) for axis in range(len(dims))))
        case _:
            assert_never(rule)


def inverse(*rules: Rule) -> tuple[Rule, ...]:
    """The rules that undo `rules`: each inverted, in reverse order.

    They lead back wherever no key that the rules left alone looks like one that they make.

    Raises:
        RuleError: as `invert`.

    Example:
        >>> from funcmodel.records.rules import Rename
        >>> inverse(Rename("a.{*p}", "b.{*p}"), Rename("b.{i}", "c.{i}"))
        (Rename(source='c.{i}', target='b.{i}'), Rename(source='b.{*p}', target='a.{*p}'))
    """
    return tuple(map(invert, reversed(rules)))


class _Run:
    """One application of rules to one plan: which keys are left, where each stands, and which rule each waits for."""

    __slots__ = ("alive", "book", "finer", "groups", "origins", "places", "queues")

    def __init__(self, book: Rulebook, plan: StateDictPlan) -> None:
        self.book = book
        self.alive: dict[str, Expr] = dict(plan.items())
        # One number per key until something is split; the parts of a key then need a finer order.
        self.places: dict[str, Any] = dict(zip(self.alive, range(len(self.alive)), strict=True))
        self.finer = False
        self.groups = dict(companions(self.alive))
        # The keys of the plan that each made key came from; kept only where quantized weights make it matter.
        self.origins: dict[str, frozenset[str]] = {}
        self.queues: list[list[Hit]] = [[] for _ in book.rules]
        for key in self.alive:
            self._enqueue(key, 0)

    def _enqueue(self, key: str, start: int) -> None:
        hit = self.book.first(key, start)
        if hit is not None:
            self.queues[hit[0]].append((key, hit[1], hit[2]))

    def finish(self) -> StateDictPlan:
        """The plan after all rules, each key in the place of the first one it was made from."""
        for at, hits in enumerate(self.queues):
            entry = self.book.rules[at]
            rule = entry.rule
            if hits and isinstance(rule, Rename):
                self._rename(at, entry, hits)
            elif hits and not isinstance(rule, Rename):
                self._apply(at, list(_products(entry, rule, hits, self.alive)))
        if self.groups:
            self._check_companions()
        return StateDictPlan({key: self.alive[key] for key in sorted(self.alive, key=self.places.__getitem__)})

    def _rename(self, at: int, entry: Compiled, hits: list[Hit]) -> None:
        """What `_apply` does, for the rule that is nine in ten: one key for one, and never two the same."""
        alive, places, form, order = self.alive, self.places, entry.targets[0].form, entry.places[0]
        keys = [key for key, _, _ in hits]
        made = [form % (held if order is None else reordered(held, order)) for _, _, held in hits]
        taken = [(alive.pop(key), places.pop(key)) for key in keys]
        for key, new, (expr, place) in zip(keys, made, taken, strict=True):
            if new in alive:
                raise _collision(entry.rule, new, (key,), (new,))
            alive[new] = expr
            places[new] = place
            self._enqueue(new, at + 1)
        if self.groups:
            self._trace(((key,), (new,)) for key, new in zip(keys, made, strict=True))

    def _apply(self, at: int, products: list[Product]) -> None:
        """Takes away everything that the rule takes, then adds what it gives, so that two keys may trade names."""
        alive = self.alive
        if not self.finer and isinstance(self.book.rules[at].rule, Split | Unstacked):
            self.finer = True
            self.places = {key: (place,) for key, place in self.places.items()}
        first = [min([self.places.pop(key) for key in keys]) for keys, _ in products]
        for keys, _ in products:
            for key in keys:
                del alive[key]
        makers: dict[str, tuple[str, ...]] = {}
        for (keys, results), place in zip(products, first, strict=True):
            for part, (key, expr) in enumerate(results):
                if key in alive:
                    raise _collision(self.book.rules[at].rule, key, keys, makers.get(key, (key,)))
                alive[key] = expr
                makers[key] = keys
                self.places[key] = place if len(results) == 1 else (*place, part)
                self._enqueue(key, at + 1)
        if self.groups:
            self._trace((keys, tuple([key for key, _ in results])) for keys, results in products)

    def _trace(self, steps: Iterable[tuple[tuple[str, ...], tuple[str, ...]]]) -> None:
        """Notes where the keys that one rule gives came from."""
        pop = self.origins.pop
        for came, made in [(frozenset[str]().union(*[pop(key, {key}) for key in keys]), made) for keys, made in steps]:
            self.origins.update(dict.fromkeys(made, came))

    def _check_companions(self) -> None:
        """Refuses rules that reach a quantized weight without its scales, or lead them to different places."""
        origins = self.origins
        touched = frozenset().union(*origins.values())
        check_whole((key for group in self.groups.items() for key in (group[0], *group[1])), touched, what="a rule")
        weight_of = {other: weight for weight, others in self.groups.items() for other in others}
        for weight, others in companions(self.alive).items():
            held = origins.get(weight, {weight})
            for other in others:
                came = origins.get(other, {other})
                parted = {key for key in came if key in weight_of and weight_of[key] not in held}
                if parted:
                    raise RuleError(
                        f"the rules lead {', '.join(sorted(parted))} to {other!r}, beside a weight that is not theirs: "
                        f"{weight!r} comes from {', '.join(sorted(held))}",
                        keys=(*sorted(parted), *sorted(held)),
                    )


def _collision(rule: Rule, target: str, sources: tuple[str, ...], rivals: tuple[str, ...]) -> RuleError:
    return wrong(
        rule,
        f"{', '.join(sources[:_SHOWN])} and {', '.join(rivals[:_SHOWN])} would both become {target!r}",
        keys=(*sources, *rivals),
        target=target,
    )


def _products(
    entry: Compiled,
    rule: Merge | Split | Stacked | Unstacked | Transpose,
    hits: list[Hit],
    plan: dict[str, Expr],
) -> Iterator[Product]:
    """What a rule makes of the keys that it matches."""
    match rule:
        case Transpose(dims=dims):
            for key, _, _ in hits:
                yield (key,), ((key, _transposed(rule, dims, key, plan[key])),)
        case Split():
            for key, _, held in hits:
                parts = _cut(rule, key, plan[key])
                yield (key,), tuple(zip(_names(entry, held), parts, strict=True))
        case Unstacked():
            for key, _, held in hits:
                slices = enumerate(_slices(rule, key, plan[key]))
                yield (key,), [(_names(entry, (*held, str(n)))[0], part) for n, part in slices]
        case Merge():
            for values, members in _groups(entry, hits).items():
                sources = _complete(entry, values, members)
                yield sources, ((_names(entry, values)[0], _joined(rule, sources, [plan[key] for key in sources])),)
        case Stacked():
            for values, numbered in _numbered(entry, hits).items():
                sources = _gapless(entry, values, numbered)
                yield sources, ((_names(entry, values)[0], _stacked(rule, sources, [plan[key] for key in sources])),)
        case _:
            assert_never(rule)


def _names(entry: Compiled, values: Values) -> tuple[str, ...]:
    return tuple(filled(t, reordered(values, place)) for t, place in zip(entry.targets, entry.places, strict=True))


# -- sources that belong together ------------------------------------------------------------------------------------


def _groups(entry: Compiled, hits: list[Hit]) -> dict[Values, dict[int, str]]:
    """Values that sources share -> which source -> key."""
    groups: dict[Values, dict[int, str]] = {}
    for key, part, held in hits:
        groups.setdefault(reordered(held, entry.picks[part]), {})[part] = key
    return groups


def _complete(entry: Compiled, values: Values, members: dict[int, str]) -> tuple[str, ...]:
    if len(members) < len(entry.sources):
        fields = dict(zip(entry.fields, values, strict=True))
        missing = tuple(fill(t, fields) for part, t in enumerate(entry.sources) if part not in members)
        present = tuple(members.values())
        raise wrong(
            entry.rule,
            f"found {', '.join(present)}, missing {', '.join(missing)}; a merge needs all of its sources",
            keys=present,
            missing=missing,
        )
    return tuple([members[part] for part in range(len(members))])


def _numbered(entry: Compiled, hits: list[Hit]) -> dict[Values, dict[str, str]]:
    """Values that sources share -> number, as it is written -> key."""
    groups: dict[Values, dict[str, str]] = {}
    for key, _, held in hits:
        number = held[entry.number]
        if number[0] == "0" and number != "0":
            raise wrong(entry.rule, f"{key!r} has the number {number}; write it without leading zeros", keys=(key,))
        groups.setdefault(reordered(held, entry.picks[0]), {})[number] = key
    return groups


def _gapless(entry: Compiled, values: Values, numbered: dict[str, str]) -> tuple[str, ...]:
    """The members in the order of their numbers, which are 0, 1, 2, ... and as many as the rule says."""
    rule = entry.rule
    assert isinstance(rule, Stacked)
    wanted = len(numbered) if rule.count is None else rule.count
    if len(numbered) == wanted:
        found = [numbered[str(n)] for n in range(wanted) if str(n) in numbered]
        if len(found) == wanted:
            return tuple(found)
    # Looked for one by one, and few: a count, or a number in a key, may be absurdly large.
    gaps = islice((n for n in range(wanted) if str(n) not in numbered), _SHOWN)
    fields = dict(zip(entry.fields, values, strict=True))
    missing = tuple(fill(entry.sources[0], {**fields, rule.over: str(n)}) for n in gaps)
    raise wrong(
        rule,
        f"expected the numbers 0 to {wanted - 1}, found {len(numbered)} members, "
        f"missing {', '.join(missing) or 'none: there are too many'}",
        keys=tuple(numbered.values()),
        missing=missing,
        expected=wanted,
        found=len(numbered),
    )


# -- expressions -----------------------------------------------------------------------------------------------------


def _length(rule: Rule, key: str, expr: Expr, dim: int) -> int:
    shape = shape_of(expr)
    if not -len(shape) <= dim < len(shape):
        raise wrong(rule, f"{key!r} has {len(shape)} axes and no axis {dim}", keys=(key,), found=shape)
    if 0 in shape:
        raise wrong(rule, f"{key!r} has no elements, nothing could lead back to it", keys=(key,), found=shape)
    return shape[dim]


def _built(rule: Rule, keys: tuple[str, ...], make: Callable[[], T]) -> T:
    """What `make` builds; where the shapes or dtypes do not allow it, the rule does not apply."""
    try:
        return make()
    except ShapeError as error:
        raise wrong(rule, f"does not fit {', '.join(keys[:_SHOWN])}: {error}", keys=keys) from error


def _transposed(rule: Rule, dims: tuple[int, ...], key: str, expr: Expr) -> Expr:
    ndim = len(shape_of(expr))
    if ndim != len(dims):
        raise wrong(rule, f"{key!r} has {ndim} axes, the rule orders {len(dims)}", keys=(key,), found=ndim)
    return _built(rule, (key,), lambda: build.permute(expr, dims))


def _cut(rule: Split, key: str, expr: Expr) -> list[Expr]:
    length, parts = _length(rule, key, expr, rule.dim), len(rule.targets)
    sizes = rule.sizes or (length // parts,) * parts
    if sum(sizes) != length or 0 in sizes:
        expected = f"{parts} equal parts that are not empty" if rule.sizes is None else f"{sum(sizes)}"
        raise wrong(rule, f"{key!r} has length {length} along {rule.dim}, not {expected}", keys=(key,), found=length)
    cuts = pairwise(accumulate(sizes, initial=0))
    return _built(rule, (key,), lambda: [build.narrow(expr, rule.dim, start, stop) for start, stop in cuts])


def _slices(rule: Unstacked, key: str, expr: Expr) -> list[Expr]:
    length = _length(rule, key, expr, rule.dim)
    if length != (rule.count or length):
        raise wrong(rule, f"{key!r} has {length} slices along {rule.dim}, not {rule.count}", keys=(key,), found=length)
    return _built(rule, (key,), lambda: [build.select(expr, rule.dim, n) for n in range(length)])


def _joined(rule: Merge, keys: tuple[str, ...], parts: list[Expr]) -> Expr:
    sizes = tuple(_length(rule, key, part, rule.dim) for key, part in zip(keys, parts, strict=True))
    expected = rule.sizes or sizes[:1] * len(sizes)
    if sizes != expected:
        raise wrong(
            rule,
            f"{', '.join(keys)} have lengths {list(sizes)} along {rule.dim}, not {list(expected)}; parts that are "
            f"not equally long need sizes=",
            keys=keys,
            expected=expected,
            found=sizes,
        )
    return _built(rule, keys, lambda: build.concat(parts, rule.dim))


def _stacked(rule: Stacked, keys: tuple[str, ...], parts: list[Expr]) -> Expr:
    if 0 in shape_of(parts[0]):
        raise wrong(rule, f"{keys[0]!r} has no elements, nothing could lead back to it", keys=keys)
    return _built(rule, keys, lambda: build.stack(parts, rule.dim))
