"""Templates: the one pattern language for keys, and a matcher whose cost is the key's segments, not the templates.

A key is segments joined by dots. In a template `{i}` stands for one segment that is not empty (or, with literal text
around it as in `w{n}`, for a part of one), `{*rest}` for one segment or more; everything else is literal, and `{{`
and `}}` stand for the braces themselves. Each placeholder occurs once and at most one is a `{*rest}`, so a key has
at most one reading: matching inverts filling by construction.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TypeAlias

from attrs import frozen

from funcmodel.errors import TemplateError
from funcmodel.records.mapping import FrozenMap


@frozen
class Placeholder:
    """One segment of a template that is not literal: `prefix{name}suffix`, or `{*name}` where `many`."""

    name: str
    prefix: str = ""
    suffix: str = ""
    many: bool = False


Segment: TypeAlias = str | Placeholder
# What the placeholders of a template hold, from left to right.
Values: TypeAlias = tuple[str, ...]


@frozen
class Template:
    """A parsed template.

    Attributes:
        text: as written.
        segments: literal text (braces unescaped) or a placeholder, one per segment.
        fields: names of the placeholders, from left to right.
        form: the same as a `%s` format, which is the fastest way to fill it.
        star: which segment is a `{*rest}`, or None.
    """

    text: str
    segments: tuple[Segment, ...]
    fields: tuple[str, ...]
    form: str
    star: int | None


def _wrong(text: str, why: str) -> TemplateError:
    return TemplateError(
        f"template {text!r} {why}; write {{i}} for one segment, {{*rest}} for several, {{{{ and }}}} for braces",
        template=text,
    )


def _tokens(text: str) -> list[tuple[str, bool]]:
    """Alternating literal text and contents of braces, as (token, whether it came in braces)."""
    tokens: list[tuple[str, bool]] = []
    literal = ""
    at = 0
    while at < len(text):
        char = text[at]
        if char in "{}" and text[at : at + 2] == char * 2:
            literal += char
            at += 2
        elif char == "{":
            end = text.find("}", at)
            if end < 0:
                raise _wrong(text, "has a { without its }")
            tokens += [(literal, False), (text[at + 1 : end], True)]
            literal = ""
            at = end + 1
        elif char == "}":
            raise _wrong(text, "has a } without its {")
        else:
            literal += char
            at += 1
    return [*tokens, (literal, False)]


def _segments(text: str, tokens: list[tuple[str, bool]]) -> tuple[Segment, ...]:
    """Tokens regrouped by the dots of their literal text."""
    segments: list[Segment] = []
    before, field, after = "", "", ""

    def close() -> None:
        if not field:
            segments.append(before)
            return
        many = field[0] == "*"
        if many and (before or after):
            raise _wrong(text, f"has text beside {{{field}}} in one segment")
        segments.append(Placeholder(field[many:], before, after, many))

    for token, braced in tokens:
        if braced:
            if field:
                raise _wrong(text, "has two placeholders in one segment")
            if not token[token[:1] == "*" :].isidentifier():
                raise _wrong(text, f"has {{{token}}}, which is not a name")
            field = token
            continue
        head, *rest = token.split(".")
        before, after = (before, after + head) if field else (before + head, "")
        for piece in rest:
            close()
            before, field, after = piece, "", ""
    close()
    return tuple(segments)


@lru_cache(maxsize=8192)
def template(text: str) -> Template:
    """The parsed form of `text`.

    Raises:
        TemplateError: unbalanced braces, a placeholder that is no identifier or occurs twice, more than one
            `{*rest}`, or two placeholders in one segment.

    Example:
        >>> template("layers.{i}.{*rest}").fields
        ('i', 'rest')
        >>> template("w{n}").segments
        (Placeholder(name='n', prefix='w', suffix='', many=False),)
    """
    if not isinstance(text, str):
        raise TemplateError(f"a template is text, not {type(text).__name__}: {text!r}", template=text)
    tokens = _tokens(text)
    segments = _segments(text, tokens)
    holes = [segment for segment in segments if isinstance(segment, Placeholder)]
    names = tuple(hole.name for hole in holes)
    if len(set(names)) < len(names):
        raise _wrong(text, "names one placeholder twice")
    stars = [at for at, segment in enumerate(segments) if isinstance(segment, Placeholder) and segment.many]
    if len(stars) > 1:
        raise _wrong(text, "has more than one {*...}, so a key could be read in several ways")
    form = "".join("%s" if braced else token.replace("%", "%%") for token, braced in tokens)
    return Template(text, segments, names, form, stars[0] if stars else None)


def literal(key: str) -> str:
    """The template that matches `key` and nothing else.

    Example:
        >>> literal("layers.0.weight"), literal("odd.{key}")
        ('layers.0.weight', 'odd.{{key}}')
    """
    return "".join(char * 2 if char in "{}" else char for char in key)


def placeholders(of: str | Template) -> FrozenMap[str, bool]:
    """Placeholder name -> whether it is a `{*rest}`; what two templates must share to be filled from each other.

    Example:
        >>> dict(placeholders("layers.{i}.{*rest}"))
        {'i': False, 'rest': True}
    """
    parsed = of if isinstance(of, Template) else template(of)
    return FrozenMap((s.name, s.many) for s in parsed.segments if isinstance(s, Placeholder))


def _value(hole: Placeholder, segment: str) -> str | None:
    """What a one-segment placeholder holds of `segment`, or None where it does not fit."""
    start, stop = len(hole.prefix), len(segment) - len(hole.suffix)
    fits = start < stop and segment.startswith(hole.prefix) and segment.endswith(hole.suffix)
    return segment[start:stop] if fits else None


def match(of: str | Template, key: str) -> FrozenMap[str, str] | None:
    """The fields with which the template gives `key`, or None.

    Args:
        of: a template, parsed or as text.
        key: a key of a state dict.

    Raises:
        TemplateError: the text is no template.

    Example:
        >>> match("layers.{i}.{*rest}", "layers.3.mlp.up.weight")
        FrozenMap({'i': '3', 'rest': 'mlp.up.weight'})
        >>> match("layers.{i}", "layers.3.mlp") is None
        True
        >>> match("lm_head.weight", "lm_head.weight")
        FrozenMap({})
    """
    parsed = of if isinstance(of, Template) else template(of)
    wanted, found = parsed.segments, key.split(".")
    star = parsed.star
    if star is not None:
        stop = len(found) - (len(wanted) - star - 1)
        if stop <= star:
            return None
        found[star:stop] = [".".join(found[star:stop])]
    if len(found) != len(wanted):
        return None
    fields: dict[str, str] = {}
    for segment, text in zip(wanted, found, strict=True):
        if isinstance(segment, str):
            if segment != text:
                return None
        elif segment.many:
            fields[segment.name] = text
        else:
            value = _value(segment, text)
            if value is None:
                return None
            fields[segment.name] = value
    return FrozenMap(fields)


def fill(of: str | Template, fields: Mapping[str, str]) -> str:
    """The key that the template gives for `fields`; `match` inverts it.

    Args:
        of: a template, parsed or as text.
        fields: one value per placeholder, no more; for `{i}` text that is not empty and has no dot.

    Raises:
        TemplateError: a field is missing, unknown or cannot stand in its place.

    Example:
        >>> fill("layers.{i}.{*rest}", {"i": "3", "rest": "mlp.up.weight"})
        'layers.3.mlp.up.weight'
    """
    parsed = of if isinstance(of, Template) else template(of)
    if set(parsed.fields) != set(fields):
        raise TemplateError(
            f"template {parsed.text!r} needs the fields {sorted(parsed.fields)}, found {sorted(fields)}",
            template=parsed.text,
            expected=parsed.fields,
            found=tuple(fields),
        )
    for segment in parsed.segments:
        if isinstance(segment, Placeholder) and not segment.many:
            value = fields[segment.name]
            if not value or "." in value:
                raise TemplateError(
                    f"{{{segment.name}}} of template {parsed.text!r} stands for one segment, not {value!r}",
                    template=parsed.text,
                    found=value,
                )
    return filled(parsed, tuple([fields[name] for name in parsed.fields]))


def filled(of: Template, values: Values) -> str:
    """`fill` without its checks, for values in the order of `of.fields` that came from a match.

    Example:
        >>> filled(template("layers.{i}.w{n}"), ("3", "1"))
        'layers.3.w1'
    """
    return of.form % values


class _Node:
    """A node of the trie; built by `Matcher.__init__`, never changed afterwards."""

    __slots__ = ("ends", "inside", "literals", "shapes", "tail", "whole")

    def __init__(self) -> None:
        self.literals: dict[str, _Node] = {}
        self.whole: _Node | None = None
        self.inside: dict[tuple[str, str], _Node] = {}
        self.shapes: tuple[tuple[int, int], ...] = ()
        self.tail: _Node | None = None
        self.ends: tuple[int, ...] = ()

    def child(self, segment: Segment) -> "_Node":
        if isinstance(segment, str):
            return self.literals.setdefault(segment, _Node())
        around = (segment.prefix, segment.suffix)
        if around == ("", ""):
            self.whole = self.whole or _Node()
            return self.whole
        self.shapes = tuple(sorted({*self.shapes, (len(around[0]), len(around[1]))}))
        return self.inside.setdefault(around, _Node())


class Matcher:
    """Many templates, compiled once into a trie on their segments.

    Calling it with a key gives every template that matches, as (position among the templates, fields), positions
    ascending. `values` gives the same with the bare values in the order of the template's fields; it is the fast path.

    Example:
        >>> find = Matcher(["layers.{i}.{*rest}", "lm_head.weight", "{*key}"])
        >>> find("lm_head.weight")
        ((1, FrozenMap({})), (2, FrozenMap({'key': 'lm_head.weight'})))
        >>> find.values("layers.0.w")
        [(0, ('0', 'w')), (2, ('layers.0.w',))]
        >>> find.first("layers.0.w")
        0
    """

    __slots__ = ("_root", "templates")

    def __init__(self, templates: Iterable[str | Template]) -> None:
        self.templates = tuple(t if isinstance(t, Template) else template(t) for t in templates)
        self._root = _Node()
        for position, parsed in enumerate(self.templates):
            node, star = self._root, parsed.star
            for segment in parsed.segments if star is None else parsed.segments[:star]:
                node = node.child(segment)
            if star is not None:
                # Behind a {*rest} the segments are matched from the end, where their number is known.
                node.tail = node = node.tail or _Node()
                for segment in reversed(parsed.segments[star + 1 :]):
                    node = node.child(segment)
            node.ends += (position,)

    def __call__(self, key: str) -> tuple[tuple[int, FrozenMap[str, str]], ...]:
        """Position and fields of every template that matches `key`, positions ascending."""
        templates = self.templates
        return tuple((at, FrozenMap(zip(templates[at].fields, held, strict=True))) for at, held in self.values(key))

    def first(self, key: str) -> int | None:
        """Position of the first template that matches `key`, or None."""
        found = self.values(key)
        return found[0][0] if found else None

    def values(self, key: str) -> list[tuple[int, Values]]:
        """Position and values of every template that matches `key`, positions ascending."""
        segments = key.split(".")
        count = len(segments)
        found: list[tuple[int, Values]] = []
        pending: list[tuple[_Node, int, Values]] = []
        node, at = self._root, 0
        held: Values = ()
        while True:
            following: _Node | None = None
            if at == count:
                found += [(position, held) for position in node.ends]
            else:
                if node.tail is not None:
                    _match_tail(node.tail, segments, at, held, found)
                segment = segments[at]
                at += 1
                following = node.literals.get(segment)
                if node.shapes:
                    pending += [(child, at, (*held, value)) for child, value in _inside(node, segment)]
                if node.whole is not None and segment:
                    if following is None:
                        following, held = node.whole, (*held, segment)
                    else:
                        pending.append((node.whole, at, (*held, segment)))
            if following is not None:
                node = following
            elif pending:
                node, at, held = pending.pop()
            else:
                break
        if len(found) > 1:
            found.sort()
        return found


def _inside(node: _Node, segment: str) -> Iterator[tuple[_Node, str]]:
    """The placeholders with text around them that fit a segment; as many look-ups as there are lengths of text."""
    for before, after in node.shapes:
        stop = len(segment) - after
        if before < stop:
            child = node.inside.get((segment[:before], segment[stop:]))
            if child is not None:
                yield child, segment[before:stop]


def _match_tail(root: _Node, segments: list[str], start: int, head: Values, found: list[tuple[int, Values]]) -> None:
    """Matches what follows a `{*rest}` that begins at `start`, from the end backwards."""
    pending: list[tuple[_Node, int, Values]] = [(root, len(segments), ())]
    while pending:
        node, stop, held = pending.pop()
        if node.ends:
            values = (*head, ".".join(segments[start:stop]), *held)
            found += [(position, values) for position in node.ends]
        stop -= 1
        if stop <= start:
            continue
        segment = segments[stop]
        if node.whole is not None and segment:
            pending.append((node.whole, stop, (segment, *held)))
        if node.shapes:
            pending += [(child, stop, (value, *held)) for child, value in _inside(node, segment)]
        following = node.literals.get(segment)
        if following is not None:
            pending.append((following, stop, held))
