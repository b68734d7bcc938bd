"""Prefixes: a base model's keys for a model with a head, and back, decided once for the whole set of keys.

A decision per key can exchange two tensors (`layernorm.*` and `base.layernorm.*`) without a word. Here a candidate is
one function of all keys, candidates are compared by how many keys then name a leaf of the module with its shape, and
anything but one best candidate is refused.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, TypeAlias

from attrs import evolve, frozen

from funcmodel.core.shapes import shape_of
from funcmodel.core.templates import literal
from funcmodel.errors import PlanError
from funcmodel.records.module import ModuleSpec
from funcmodel.records.plans import StateDictPlan

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape | None]  # None: any shape will do

_SHOWN: Final = 8


@frozen(kw_only=True)
class Alignment:
    """How the keys of a plan become names of a module.

    Attributes:
        strip: prefix that the keys that have it lose; "" for none. Other keys stay as they are.
        add: prefix that the keys then get; "" for none.
        kept: first segments whose keys get no prefix: the module has them beside `add` and not below it (heads).
        hits: how many keys then name a leaf of the module with its shape.
        keys: how many keys there are.
    """

    strip: str = ""
    add: str = ""
    kept: tuple[str, ...] = ()
    hits: int
    keys: int


def aligned(spec: ModuleSpec) -> Callable[[StateDictPlan], StateDictPlan]:
    """Renames the keys of a plan to fit a module that has one prefix more or less; `alignment` says how.

    Args:
        spec: the module.

    Returns:
        A transform: a plain renaming of the whole set of keys, in the same order. A plan that fits is left alone; keys
        that fit nothing stay in the plan for `plan_load` to report.

    Raises:
        PlanError: (by the transform) as `alignment`.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> from funcmodel.records.module import ParamSpec
        >>> from funcmodel.records.tensors import TensorSpec
        >>> leaf = ParamSpec(spec=TensorSpec([2], "float32"))
        >>> net = ModuleSpec(name="Net", params={"base.enc.w": leaf, "base.norm.w": leaf, "head.w": leaf})
        >>> plan = StateDictPlan({key: Live(key, leaf.spec) for key in ("enc.w", "norm.w")})
        >>> list(aligned(net)(plan))
        ['base.enc.w', 'base.norm.w']
    """

    def transform(plan: StateDictPlan) -> StateDictPlan:
        found = alignment(spec, plan)
        if not found.strip and not found.add:
            return plan
        return StateDictPlan(dict(zip(_names(plan, found), plan.values(), strict=True)))

    return transform


def alignment(spec: ModuleSpec, plan: StateDictPlan) -> Alignment:
    """The one renaming by prefix under which most keys of a plan name a leaf of the module with its shape.

    Candidates: no change; a first segment (or the segments that all keys share) taken off; a first segment of the
    module's names (or the segments that they share, or the declared base prefix) put on; shared segments of the keys
    replaced by such. Of equally good ones a replacement yields to a single step; where everything fits as it is, only
    a prefix that could be put on as well is a rival.

    Args:
        spec: the module; only persistent leaves count.
        plan: the state dict.

    Returns:
        The best candidate; one that changes nothing where nothing needs to be changed.

    Raises:
        PlanError: nothing fits under any candidate; different candidates are equally good; or the best one would give
            two keys one name. `candidates` holds those in question, `keys` the keys that would collide.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> from funcmodel.records.module import ParamSpec
        >>> from funcmodel.records.tensors import TensorSpec
        >>> leaf = ParamSpec(spec=TensorSpec([2], "float32"))
        >>> net = ModuleSpec(name="Base", params={"enc.w": leaf, "norm.w": leaf})
        >>> plan = StateDictPlan({key: Live(key, leaf.spec) for key in ("base.enc.w", "base.norm.w", "head.w")})
        >>> alignment(net, plan)
        Alignment(strip='base', add='', kept=(), hits=2, keys=3)
    """
    if not plan:
        return Alignment(hits=0, keys=0)
    leaves = {
        name: None if leaf.kind == "extra_state" else leaf.spec.shape
        for name, leaf in spec.params.items()
        if leaf.persistent
    }
    shapes = {key: shape_of(expr) for key, expr in plan.items()}
    scores = _scores(leaves, shapes, spec.traits.base_prefix)
    best = max(scores.values())
    if best == 0:
        raise PlanError(
            f"no key of the plan ({next(iter(plan))}, ...) names a leaf of {spec.name} with its shape, whatever prefix "
            f"it loses or gets; rename the keys with convert(...)",
            keys=tuple(plan)[:_SHOWN],
            candidates=(),
        )
    tied = _rivals([pair for pair, hits in scores.items() if hits == best], complete=scores["", ""] == len(plan))
    distinct: dict[tuple[str, ...], Alignment] = {}
    for strip, add in tied:
        candidate = _with_kept(Alignment(strip=strip, add=add, hits=best, keys=len(plan)), leaves, plan)
        distinct.setdefault(tuple(_names(plan, candidate)), candidate)
        if len(distinct) == _SHOWN:
            break
    # Two keys under one name count twice in a score, so such a candidate is no match for one without.
    candidates = tuple(found for names, found in distinct.items() if len(set(names)) == len(names))
    candidates = candidates or tuple(distinct.values())
    if len(candidates) > 1:
        raise PlanError(
            f"{len(candidates)} ways to fit the plan to {spec.name} are equally good, {best} of {len(plan)} keys each: "
            f"{'; '.join(map(_text, candidates))}; choose one with convert(Rename(...))",
            candidates=candidates,
        )
    _refuse_collision(spec, plan, candidates[0])
    return candidates[0]


def _rivals(tied: list[tuple[str, str]], *, complete: bool) -> list[tuple[str, str]]:
    """Of equally good (strip, add) those that a decision must tell apart."""
    if complete:
        return [(strip, add) for strip, add in tied if not strip]
    return [(strip, add) for strip, add in tied if not (strip and add)] or tied


def _refuse_collision(spec: ModuleSpec, plan: StateDictPlan, found: Alignment) -> None:
    names = _names(plan, found)
    if len(set(names)) == len(names):
        return
    counts = Counter(names)
    keys = tuple(key for key, name in zip(plan, names, strict=True) if counts[name] > 1)
    raise PlanError(
        f"to {_text(found)} fits the plan to {spec.name} best, but gives two keys one name ({', '.join(keys[:4])}); "
        f"drop the one that does not belong to the module first",
        keys=keys,
        candidates=(found,),
    )


def hint(spec: ModuleSpec, plan: StateDictPlan) -> str | None:
    """The transform, as text, that would make more keys fit, or None where no prefix does.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> from funcmodel.records.module import ParamSpec
        >>> from funcmodel.records.tensors import TensorSpec
        >>> leaf = ParamSpec(spec=TensorSpec([2], "float32"))
        >>> net = ModuleSpec(name="Net", params={"base.enc.w": leaf, "head.w": leaf})
        >>> hint(net, StateDictPlan({"enc.w": Live("enc.w", leaf.spec)}))
        'convert(Rename("{*key}", "base.{*key}"))'
    """
    try:
        found = alignment(spec, plan)
    except PlanError:
        return None
    if not found.strip and not found.add:
        return None
    if found.kept:
        return "aligned(spec)"
    return f'convert(Rename("{_template(found.strip)}", "{_template(found.add)}"))'


def _template(prefix: str) -> str:
    return f"{literal(prefix)}.{{*key}}" if prefix else "{*key}"


def _text(candidate: Alignment) -> str:
    steps = [f"strip {candidate.strip!r}"] * bool(candidate.strip) + [f"add {candidate.add!r}"] * bool(candidate.add)
    return " and ".join(steps or ["leave the keys as they are"])


def _names(keys: Iterable[str], candidate: Alignment) -> list[str]:
    """The keys under a candidate, in order."""
    names = list(keys)
    if candidate.strip:
        start = candidate.strip + "."
        names = [name.removeprefix(start) for name in names]
    if candidate.add:
        kept = frozenset(candidate.kept)
        names = [name if name.partition(".")[0] in kept else f"{candidate.add}.{name}" for name in names]
    return names


def _with_kept(candidate: Alignment, leaves: Shapes, keys: Iterable[str]) -> Alignment:
    """The candidate with the first segments that get no prefix filled in."""
    if not candidate.add:
        return candidate
    start = candidate.add + "."
    below = {name[len(start) :].partition(".")[0] for name in leaves if name.startswith(start)}
    beside = {name.partition(".")[0] for name in leaves if not name.startswith(start)} - below
    segments = dict.fromkeys(name.partition(".")[0] for name in _names(keys, evolve(candidate, add="")))
    return evolve(candidate, kept=tuple(segment for segment in segments if segment in beside))


def _shared(names: Collection[str]) -> tuple[str, ...]:
    """The prefixes that all names have, shortest first: ("a", "a.b") of "a.b.x" and "a.b.y"."""
    low, high = min(names).split(".")[:-1], max(names).split(".")[:-1]
    # Between the least and the greatest name, character by character, every other name begins the same way.
    count = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return tuple(prefix for i in range(count) if (prefix := ".".join(low[: i + 1])))


def _below(names: Shapes, declared: str) -> dict[str, dict[str, Shape | None]]:
    """Candidate prefix -> what is below it, by the rest of the name.

    Candidates are the segments that all names share, those and one segment more, and the declared prefix.
    """
    shared = _shared(names) if names else ()
    start = len(shared[-1]) + 1 if shared else 0
    below: dict[str, dict[str, Shape | None]] = {}
    for name, shape in names.items():
        end = name.find(".", start)
        if end > 0:
            below.setdefault(name[:end], {})[name[end + 1 :]] = shape
    for prefix in (*shared, declared) if declared and declared not in below else shared:
        dotted = prefix + "."
        found = {name[len(dotted) :]: shape for name, shape in names.items() if name.startswith(dotted)}
        below |= {prefix: found} if found else {}
    return below


def _fitting(leaves: Shapes, shapes: Shapes) -> set[str]:
    return {key for key, shape in shapes.items() if key in leaves and leaves[key] in (shape, None)}


def _hits(some: Shapes, others: Shapes) -> int:
    """How many names are on both sides with one shape."""
    few, many = (some, others) if len(some) < len(others) else (others, some)
    count = 0
    for name, shape in few.items():
        if name in many:
            other = many[name]
            count += shape == other or shape is None or other is None
    return count


def _scores(leaves: Shapes, shapes: Shapes, declared: str) -> dict[tuple[str, str], int]:
    """(strip, add) -> how many keys then fit; a change under which no changed key fits is no candidate.

    Linear: each key counts for its own prefixes only.
    """
    fits = _fitting(leaves, shapes)
    scores = {("", ""): len(fits)}
    for prefix, rests in _below(shapes, declared).items():
        moved = _hits(rests, leaves)
        if moved:
            scores[prefix, ""] = len(fits) + moved - sum(f"{prefix}.{rest}" in fits for rest in rests)
    below = _below(leaves, declared)
    for strip in ("", *_shared(shapes)):
        bare: Shapes = {key[len(strip) + 1 :]: shape for key, shape in shapes.items()} if strip else shapes
        scores |= {(strip, add): hits for add, hits in _added(leaves, below, bare).items()}
    return scores


def _added(leaves: Shapes, below: Mapping[str, Shapes], shapes: Shapes) -> dict[str, int]:
    """Prefix -> how many keys fit once they have it, heads excepted."""
    first = Counter([name.partition(".")[0] for name in leaves])
    heads = Counter(
        [key.partition(".")[0] for key, shape in shapes.items() if key in leaves and leaves[key] in (shape, None)]
    )
    added: dict[str, int] = {}
    for prefix, wanted in below.items():
        moved = _hits(wanted, shapes)
        if not moved:
            continue
        prefixed = {rest.partition(".")[0] for rest in wanted} if heads else set()
        owner = prefix.partition(".")[0]
        if first[owner] == len(wanted):
            prefixed.add(owner)
        added[prefix] = moved + heads.total() - sum(heads[segment] for segment in prefixed)
    return added
