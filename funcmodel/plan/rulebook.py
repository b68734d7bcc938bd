"""The rulebook: rules checked, their templates compiled into one matcher that names the first rule a key meets."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias, assert_never

from attrs import frozen

from funcmodel.core.templates import Matcher, Template, Values, placeholders, template
from funcmodel.errors import RuleError
from funcmodel.records.rules import Merge, Rename, Rule, Split, Stacked, Transpose, Unstacked

Order: TypeAlias = tuple[int, ...] | None


@frozen(kw_only=True)
class Compiled:
    """A rule with its templates parsed.

    Attributes:
        rule: the rule.
        sources: the templates of the keys that it takes.
        targets: the templates of the keys that it gives.
        fields: the placeholders that both sides share, in one order.
        picks: per source, where in its matched values each of `fields` is; None where they are in that order.
        places: per target, where in the values of `fields` (and the number, last) each of its own is; None likewise.
        number: where in the matched values of the source the number of a `Stacked` is.
    """

    rule: Rule
    sources: tuple[Template, ...]
    targets: tuple[Template, ...]
    fields: tuple[str, ...]
    picks: tuple[Order, ...]
    places: tuple[Order, ...]
    number: int = -1


def _order(wanted: Sequence[str], present: Sequence[str]) -> Order:
    order = tuple(present.index(name) for name in wanted)
    return None if order == tuple(range(len(present))) else order


def wrong(rule: Rule, why: str, **fields: object) -> RuleError:
    """The error for a rule that does not apply.

    Example:
        >>> wrong(Rename("a", "b"), "found nothing", keys=("a",)).keys
        ('a',)
    """
    return RuleError(f"{rule}: {why}", rule=rule, **fields)


def _sides(rule: Rule) -> tuple[tuple[str, ...], tuple[str, ...]]:
    match rule:
        case Merge(sources=sources, target=target):
            return sources, (target,)
        case Split(source=source, targets=targets):
            return (source,), targets
        case Rename(source=source, target=target) | Stacked(source=source, target=target):
            return (source,), (target,)
        case Unstacked(source=source, target=target):
            return (source,), (target,)
        case Transpose(template=text):
            return (text,), (text,)
        case _:
            assert_never(rule)


def _check_numbers(rule: Rule, many: tuple[str, ...]) -> None:
    """The parts of a rule that are no templates."""
    match rule:
        case Merge(sizes=sizes) | Split(sizes=sizes):
            if not many or len(set(many)) < len(many):
                raise wrong(rule, f"needs one part or more, each another one; found {list(many)}")
            if sizes is not None and (len(sizes) != len(many) or min(sizes) < 1):
                raise wrong(rule, f"sizes must be {len(many)} positive numbers, found {list(sizes)}", found=sizes)
        case Stacked(count=count) | Unstacked(count=count):
            if count is not None and count < 1:
                raise wrong(rule, f"count must be positive, found {count}", found=count)
        case Transpose(dims=dims):
            if sorted(dims) != list(range(len(dims))):
                raise wrong(rule, f"dims must name each axis once, found {list(dims)}", found=dims)
        case Rename():
            pass
        case _:
            assert_never(rule)


def compiled(rule: Rule) -> Compiled:
    """The rule, checked for what makes it invertible, whatever plan it is for.

    Raises:
        TemplateError: a template cannot be parsed.
        RuleError: not a rule, its sides differ in their placeholders, or its sizes, count or dims make no sense.

    Example:
        >>> compiled(Stacked("{i}.experts.{e}.w", "{i}.w", over="e")).fields
        ('i',)
    """
    if not isinstance(rule, Rename | Merge | Split | Stacked | Unstacked | Transpose):
        raise RuleError(f"not a rule: {rule!r}; write Rename, Merge, Split, Stacked, Unstacked or Transpose", rule=rule)
    left, right = _sides(rule)
    _check_numbers(rule, right if isinstance(rule, Split) else left)
    sources, targets = tuple(map(template, left)), tuple(map(template, right))
    over = rule.over if isinstance(rule, Stacked | Unstacked) else None
    _check_placeholders(rule, sources, targets, over)
    fields = tuple(name for name in sources[0].fields if name != over)
    with_number = fields if over is None else (*fields, over)
    return Compiled(
        rule=rule,
        sources=sources,
        targets=targets,
        fields=fields,
        picks=tuple(_order(fields, t.fields) for t in sources),
        places=tuple(_order(t.fields, with_number if over in t.fields else fields) for t in targets),
        number=sources[0].fields.index(over) if over in sources[0].fields else -1,
    )


def _check_placeholders(
    rule: Rule, sources: tuple[Template, ...], targets: tuple[Template, ...], over: str | None
) -> None:
    """Both sides have the same, but for the number, which one side has and does not spread over several segments."""
    found = [dict(placeholders(t)) for t in (*sources, *targets)]
    if over is not None and found[-1 if isinstance(rule, Unstacked) else 0].pop(over, True):
        raise wrong(rule, f"over={over!r} must be a placeholder {{{over}}} of the side that has many keys", found=over)
    for other in found:
        if other != found[0]:
            raise wrong(
                rule,
                f"both sides need the same placeholders, else there is no way back; found {_shown(found[0])} and "
                f"{_shown(other)}",
                expected=tuple(found[0]),
                found=tuple(other),
            )


def _shown(names: dict[str, bool]) -> str:
    return ", ".join(f"{{{'*' * many}{name}}}" for name, many in names.items()) or "none"


def reordered(values: Values, order: Order) -> Values:
    """`values` at the positions of `order`.

    Example:
        >>> reordered(("0", "w"), (1, 0)), reordered(("0", "w"), None)
        (('w', '0'), ('0', 'w'))
    """
    return values if order is None else tuple([values[i] for i in order])


class Rulebook:
    """Compiled rules and the one matcher over all of their sources.

    Example:
        >>> book = Rulebook([Rename("a.{*p}", "b.{*p}"), Merge(("a.{i}", "b.{i}"), "c.{i}")])
        >>> book.first("a.0", 0), book.first("a.0", 1), book.first("a.0", 2)
        ((0, 0, ('0',)), (1, 0, ('0',)), None)
    """

    __slots__ = ("_find", "_owners", "rules")

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(map(compiled, rules))
        self._find = Matcher(t for c in self.rules for t in c.sources).values
        self._owners = tuple((at, part) for at, c in enumerate(self.rules) for part in range(len(c.sources)))

    def first(self, key: str, start: int) -> tuple[int, int, Values] | None:
        """The first rule from `start` on that matches `key`: (position of the rule, which of its sources, values).

        Raises:
            RuleError: the key matches two sources of that rule.
        """
        hit: tuple[int, int, Values] | None = None
        for position, held in self._find(key):
            at, part = self._owners[position]
            if at < start:
                continue
            if hit is not None:
                if at == hit[0]:
                    raise wrong(self.rules[at].rule, f"{key!r} matches two of its sources", keys=(key,))
                break
            number = self.rules[at].number
            # {e} of a Stacked stands for a number; a neighbor called "shared" is none of its members.
            if number < 0 or (held[number].isascii() and held[number].isdigit()):
                hit = (at, part, held)
        return hit
