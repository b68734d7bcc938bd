"""Findings of a load plan as help: the transform that would fix them, names that are nearly right, and the message."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from itertools import product
from typing import Final, NamedTuple

from funcmodel.core.lowering import leaves
from funcmodel.core.shapes import spec_of
from funcmodel.core.templates import literal
from funcmodel.plan.companions import weight_of
from funcmodel.plan.folding import fold, folder, numbered
from funcmodel.plan.prefixes import aligned, hint
from funcmodel.records.actions import Initialize
from funcmodel.records.expressions import Expr, FileRef, Read
from funcmodel.records.module import ModuleSpec
from funcmodel.records.plans import LoadPlan, StateDictPlan
from funcmodel.records.reports import Mismatch

_COMPARED: Final = 48  # more different names than this are not compared with each other
_LISTED: Final = 6
_LINES: Final = 10
_ALIKE: Final = 0.75  # similarity from which a name counts as nearly right
_CLEAR: Final = 0.1  # by how much the best candidate for a rename must lead
_KNOWN: Final = frozenset({("gamma", "weight"), ("beta", "bias")})  # what TensorFlow called them

_Groups = dict[str, dict[tuple[str, ...], str]]


class Help(NamedTuple):
    """What a report says beyond its findings."""

    hints: tuple[str, ...] = ()
    near_misses: tuple[tuple[str, str], ...] = ()


def companions_in(spec: ModuleSpec, held: Mapping[str, Expr], unexpected: tuple[str, ...]) -> tuple[str, ...]:
    """Those unexpected keys that scale a quantized weight, unless the weight is as unexpected as they are."""
    surplus = frozenset(unexpected)

    def is_needed(key: str) -> bool:
        weight = weight_of(key, held)
        return weight_of(key, spec.params) is not None if weight is None else weight not in surplus

    return tuple(key for key in unexpected if is_needed(key))


def help_for(
    spec: ModuleSpec,
    held: Mapping[str, Expr],
    missing: tuple[str, ...],
    unexpected: tuple[str, ...],
    mismatched: tuple[Mismatch, ...],
) -> Help:
    """Hints as text that can be piped in, and near misses. Linear, except for at most 48 names on each side."""
    hints = []
    prefix = hint(spec, StateDictPlan(held)) if missing and unexpected else None
    if prefix is not None:
        hints.append(prefix)
        held = aligned(spec)(StateDictPlan(held))
        twins = {key: group.keys for group in spec.tied for key in group.keys}
        missing = tuple(key for key in missing if all(name not in held for name in twins.get(key, (key,))))
        unexpected = tuple(key for key in held if key not in spec.params)
    wanted, surplus = _by_pattern(missing), _by_pattern(unexpected)
    renames = _renames(spec, held, wanted, surplus)
    rules = [f"Rename({_quoted(theirs)}, {_quoted(ours)})" for ours, theirs in renames.items()]
    rules += _transposes(held, mismatched)
    if rules:
        hints.append(f"convert({', '.join(rules[:_LISTED])})")
    hints += _resizes(mismatched)
    # Where nothing fits at all, dropping everything is no help.
    if len(unexpected) < len(held):
        renamed = {key for theirs in renames.values() for key in surplus[theirs].values()}
        hints += _drops(held, [key for key in unexpected if key not in renamed])
    return Help(tuple(hints), _near(wanted, surplus, renames))


def _by_pattern(keys: Iterable[str]) -> _Groups:
    """Template -> numbers -> key."""
    groups: _Groups = {}
    for key in keys:
        pattern, numbers = numbered(key)
        groups.setdefault(pattern, {})[numbers] = key
    return groups


def _compared(wanted: _Groups, surplus: _Groups) -> Iterator[tuple[str, str]]:
    return product(list(wanted)[:_COMPARED], list(surplus)[:_COMPARED])


def _renames(spec: ModuleSpec, held: Mapping[str, Expr], wanted: _Groups, surplus: _Groups) -> dict[str, str]:
    """Wanted template -> the one template of the source that is it under another name, beyond doubt."""
    if not wanted or not surplus:
        return {}
    scores: dict[tuple[str, str], float] = {}
    for ours, theirs in _compared(wanted, surplus):
        score = _kinship(ours, theirs)
        if score and wanted[ours].keys() == surplus[theirs].keys():
            pairs = ((spec.params[key].spec, held[surplus[theirs][at]]) for at, key in wanted[ours].items())
            if all(spec_of(expr).shape == found.shape for found, expr in pairs):
                scores[ours, theirs] = score
    taken = {numbered(key)[0] for key in held if key in spec.params} if scores else set()
    chosen = {}
    for (ours, theirs), score in scores.items():
        rivals = (s for pair, s in scores.items() if pair != (ours, theirs) and (pair[0] == ours or pair[1] == theirs))
        if theirs not in taken and all(rival < score - _CLEAR for rival in rivals):
            chosen[ours] = theirs
    return chosen


def _kinship(ours: str, theirs: str) -> float:
    """How much two templates look like one name, 0 where they do not."""
    if ours.endswith("." + theirs) or theirs.endswith("." + ours):
        return 2.0 + _likeness(ours, theirs)
    mine, other = ours.split("."), theirs.split(".")
    if len(mine) != len(other):
        return 0.0
    differing = [(a, b) for a, b in zip(other, mine, strict=True) if a != b]
    if len(differing) != 1 or any("{" in text for text in differing[0]):
        return 0.0
    return 2.0 if differing[0] in _KNOWN else 1.0 + _likeness(*differing[0])


def _likeness(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def _near(wanted: _Groups, surplus: _Groups, renames: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    found: dict[str, tuple[float, str]] = {}
    used = set(renames.values())
    for ours, theirs in _compared(wanted, surplus):
        if ours not in renames and theirs not in used:
            likeness = _likeness(ours, theirs)
            if likeness >= max(_ALIKE, found.get(ours, (0.0, ""))[0]):
                found[ours] = likeness, theirs
    pairs = ((next(iter(wanted[a].values())), next(iter(surplus[b].values()))) for a, (_, b) in found.items())
    return tuple(pairs)[:_LISTED]


def _transposes(held: Mapping[str, Expr], mismatched: tuple[Mismatch, ...]) -> list[str]:
    turned = [m.key for m in mismatched if len(m.found.shape) == 2 and m.found.shape[::-1] == m.expected.shape]
    if not turned:
        return []
    groups = _by_pattern(turned)
    sizes: dict[str, int] = {}
    for key in held:
        pattern = numbered(key)[0]
        if pattern in groups:
            sizes[pattern] = sizes.get(pattern, 0) + 1
    texts = [[p] if sizes[p] == len(keys) else [literal(k) for k in keys.values()] for p, keys in groups.items()]
    return [f"Transpose({_quoted(text)})" for group in texts for text in group][:_LISTED]


def _resizes(mismatched: tuple[Mismatch, ...]) -> list[str]:
    """Vocabulary surgery: matrices that differ in rows, and the vectors that go with them."""
    longer = [m for m in mismatched if m.found.shape[1:] == m.expected.shape[1:] and m.found.ndim == m.expected.ndim]
    rows = {(m.expected.shape[0], m.found.shape[0]) for m in longer if m.found.ndim == 2}
    fitting = [m for m in longer if m.found.ndim in (1, 2) and (m.expected.shape[0], m.found.shape[0]) in rows]
    return [f"resize_rows({_quoted(m.key)}, {m.expected.shape[0]}{_fill(m)})" for m in fitting[:_LISTED]]


def _fill(mismatch: Mismatch) -> str:
    if mismatch.expected.shape[0] < mismatch.found.shape[0]:
        return ""
    return ', fill="mean"' if mismatch.found.dtype.kind == "float" else ", fill=0"


def _drops(held: Mapping[str, Expr], unexpected: list[str]) -> list[str]:
    """One `drop` that takes exactly the unexpected keys, or nothing."""
    surplus = set(unexpected)
    if not surplus:
        return []
    counts = Counter(key.rpartition(".")[2] for key in unexpected)
    needed = {key.rpartition(".")[2] for key in held if key not in surplus or "." not in key}
    templates: dict[str, None] = {}
    rest = []
    for key in unexpected:
        ending = key.rpartition(".")[2]
        if counts[ending] > 1 and ending not in needed:
            templates["{*p}." + literal(ending)] = None
        else:
            rest.append(key)
    groups = _by_pattern(rest)
    kept = {numbered(key)[0] for key in held if key not in surplus} if groups else set()
    for pattern, keys in groups.items():
        for text in [pattern] if pattern not in kept and len(keys) > 1 else map(literal, keys.values()):
            templates[text] = None
    if len(templates) > _LISTED:
        tops = {key.partition(".")[0] for key in unexpected}
        others = {key.partition(".")[0] for key in held if key not in surplus}
        if tops & others or len(tops) > _LISTED or any("." not in key for key in unexpected):
            return []
        templates = dict.fromkeys(literal(top) + ".{*rest}" for top in sorted(tops))
    return [f"drop({', '.join(_quoted(text) for text in templates)})"]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# -- the message -------------------------------------------------------------------------------------------------------


def source_text(held: Mapping[str, Expr]) -> str:
    """The files of a source in a few words: the one file, or the folder they share; "" where it reads none."""
    # One look at each object's identity is quicker than hashing 100,000 references.
    direct = {id(expr.file): expr.file for expr in held.values() if type(expr) is Read}
    refs: Iterable[FileRef] = direct.values()
    if not direct:
        refs = (leaf.file for expr in held.values() for leaf in leaves(expr) if isinstance(leaf, Read))
    paths = list(dict.fromkeys(ref.path for ref in refs))
    if len(paths) <= 1:
        return "".join(paths)
    folders = list(dict.fromkeys("".join(path.rpartition("/")[:2]) or "./" for path in paths))
    return folders[0] if len(folders) == 1 else f"{folders[0]} and {len(folders) - 1} more"


def mismatch_message(plan: LoadPlan, refused: frozenset[str], unused: tuple[str, ...], *, overlap: bool) -> str:
    """Everything that is refused, folded, with what would fix it."""
    report = plan.report
    missing = [key for key in report.missing_keys if key in refused]
    unexpected = [key for key in report.unexpected_keys if key in refused]
    mismatched = [m for m in report.mismatched_keys if m.key in refused]
    counts = (("missing", missing), ("unexpected", unexpected), ("mismatched", mismatched))
    found = ", ".join(f"{len(keys)} {word}" for word, keys in counts if keys)
    lines = [f"{plan.name} does not match {plan.source or 'its source'}" + (f" ({found})" if found else "")]
    if not overlap:
        lines.append("  overlap     none: no key of the source is a key of the module")
    shorten = folder(frozenset(_keys(plan)) | frozenset(report.unexpected_keys))
    for word, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            lines.append(f"  {word:<10}  {listed(shorten(keys))}")
    lines += _mismatch_lines(mismatched, shorten)
    companions = [key for key in report.companion_keys if key in refused]
    if companions:
        lines.append(f"  quantized   {listed(fold(companions))} (without its scale a weight means nothing)")
    if unused:
        lines.append(f"  unused      {listed(unused)} (a waiver that matches nothing)")
    lines += [f"  near        {ours} ~ {theirs}" for ours, theirs in report.near_misses if ours in refused]
    if report.hints:
        lines.append(f"  hint        {'; '.join(report.hints)}")
    return "\n".join(lines)


def _mismatch_lines(mismatched: list[Mismatch], shorten: Callable[[Iterable[str]], tuple[str, ...]]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for m in mismatched:
        groups.setdefault(f"expected {m.expected}, found {m.found}", []).append(m.key)
    lines = [f"  mismatched  {listed(shorten(keys))}   {text}" for text, keys in groups.items()]
    more = len(lines) - _LINES
    return lines if more <= 1 else [*lines[:_LINES], f"  mismatched  and {more} other shapes"]


def listed(texts: Iterable[str], *, at_most: int = 12) -> str:
    """Texts joined by commas, the tail counted."""
    shown = list(texts)
    more = len(shown) - at_most
    return ", ".join(shown if more <= 1 else [*shown[:at_most], f"and {more} more"])


def _keys(plan: LoadPlan) -> Iterator[str]:
    for action in plan.actions:
        if isinstance(action, Initialize):
            yield from action.keys
        else:
            yield action.key
