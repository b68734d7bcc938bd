"""Ties: keys that are one tensor in the module, one name each or all names, and what to do where they disagree."""

from collections.abc import Callable, Iterable

from funcmodel._toolz import groupby
from funcmodel.core.templates import match, template
from funcmodel.core.wire import is_digest
from funcmodel.errors import PlanError, TieConflictError
from funcmodel.records.checkpoint import CheckpointSpec
from funcmodel.records.expressions import Expr
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import TiedGroup
from funcmodel.records.plans import StateDictPlan

Choice = Callable[[StateDictPlan, TiedGroup], str | None]


def canonical(tied: Iterable[TiedGroup]) -> FrozenMap[str, str]:
    """Every tied key -> the canonical key of its group.

    Args:
        tied: alias classes, as in `ModuleSpec.tied`; no key stands in two of them.

    Raises:
        PlanError: a key stands in two groups.

    Example:
        >>> dict(canonical([TiedGroup(("embed.weight", "head.weight"))]))
        {'embed.weight': 'embed.weight', 'head.weight': 'embed.weight'}
    """
    names: dict[str, str] = {}
    for group in tied:
        for key in group.keys:
            if names.setdefault(key, group.keys[0]) != group.keys[0]:
                raise PlanError(
                    f"{key!r} stands in two tied groups, those of {names[key]!r} and {group.keys[0]!r}; join them",
                    keys=(key, names[key], group.keys[0]),
                )
    return FrozenMap(names)


def _choice(tied: tuple[TiedGroup, ...], prefer: str | None) -> Choice:
    """Which member of a group speaks for it: `None` where the plan holds no member."""
    names = canonical(tied)
    if prefer in ("first", "last", None):
        at = -1 if prefer == "last" else 0
        wanted: frozenset[str] = frozenset()
    else:
        at, pattern = 0, template(prefer)
        wanted = frozenset(key for key in names if match(pattern, key) is not None)
        if not wanted:
            raise PlanError(f"prefer={prefer!r} matches no tied key; there are {list(names)}", keys=(prefer,))

    def choose(plan: StateDictPlan, group: TiedGroup) -> str | None:
        held = [key for key in group.keys if key in plan]
        named = [key for key in held if key in wanted]
        if _distinct(plan, named) > 1 or ((prefer is None or (wanted and not named)) and _distinct(plan, held) > 1):
            raise TieConflictError(
                f"{' and '.join(held)} are one tensor in the module and have different values in the plan; "
                f"drop one, or say which with prefer='first', 'last' or a template that matches one of them",
                keys=tuple(held),
                tied=group,
                prefer=prefer,
            )
        return (named or held)[at] if held else None

    return choose


def _distinct(plan: StateDictPlan, keys: list[str]) -> int:
    return 1 + any(plan[key] != plan[keys[0]] for key in keys[1:]) if keys else 0


def dedupe(tied: Iterable[TiedGroup], *, prefer: str | None = None) -> Callable[[StateDictPlan], StateDictPlan]:
    """Leaves one key of every tied group: the first that the plan holds, in the order of the group.

    Args:
        tied: alias classes, as in `ModuleSpec.tied`.
        prefer: which member stays, and whose value counts where members disagree: "first" or "last" in the order of
            the group, or a template of its key. None takes the first and refuses a disagreement.

    Returns:
        A transform; it is idempotent.

    Raises:
        PlanError: a key stands in two groups, or `prefer` matches no tied key.
        TieConflictError: (by the transform) two members have different expressions and `prefer` does not say which;
            fields `keys` and `tied`.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> from funcmodel.records.tensors import TensorSpec
        >>> weight = Live("embed.weight", TensorSpec([8, 4], "float32"))
        >>> plan = StateDictPlan({"embed.weight": weight, "head.weight": weight})
        >>> tied = [TiedGroup(("embed.weight", "head.weight"))]
        >>> list(dedupe(tied)(plan)), list(dedupe(tied, prefer="last")(plan))
        (['embed.weight'], ['head.weight'])
    """
    groups = tuple(tied)
    choose = _choice(groups, prefer)

    def transform(plan: StateDictPlan) -> StateDictPlan:
        leave: set[str] = set()
        for group in groups:
            chosen = choose(plan, group)
            leave.update(key for key in group.keys if key != chosen)
        return StateDictPlan({key: expr for key, expr in plan.items() if key not in leave})

    return transform


def spread(tied: Iterable[TiedGroup], *, prefer: str | None = None) -> Callable[[StateDictPlan], StateDictPlan]:
    """Gives every name of a tied group of which the plan holds any; missing names follow the first that is held.

    Args:
        tied: alias classes, as in `ModuleSpec.tied`.
        prefer: whose value counts where members disagree, as in `dedupe`.

    Returns:
        A transform; it is idempotent.

    Raises:
        PlanError: a key stands in two groups, or `prefer` matches no tied key.
        TieConflictError: (by the transform) two members have different expressions and `prefer` does not say which.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> from funcmodel.records.tensors import TensorSpec
        >>> plan = StateDictPlan({"head.weight": Live("w", TensorSpec([8, 4], "float32"))})
        >>> list(spread([TiedGroup(("embed.weight", "head.weight"))])(plan))
        ['head.weight', 'embed.weight']
    """
    groups = tuple(tied)
    choose = _choice(groups, prefer)
    home = {key: group for group in groups for key in group.keys}

    def transform(plan: StateDictPlan) -> StateDictPlan:
        values = {group.keys[0]: plan[chosen] for group in groups if (chosen := choose(plan, group)) is not None}
        entries: dict[str, Expr] = {}
        for key, expr in plan.items():
            group = home.get(key)
            if group is None:
                entries[key] = expr
                continue
            value = values[group.keys[0]]
            entries[key] = value
            for other in group.keys:
                if other not in plan:
                    entries.setdefault(other, value)
        return StateDictPlan(entries)

    return transform


def recorded(checkpoint: CheckpointSpec) -> tuple[TiedGroup, ...]:
    """The ties that a writer recorded: names it left out because another key holds the same tensor.

    funcmodel, safetensors and huggingface_hub note a name that they leave out in the metadata of the file or the index,
    as name to key. `spread(recorded(checkpoint))` gives the plan those names again; nothing does so unasked, because
    metadata may hold any text.

    Args:
        checkpoint: what `scan_checkpoint` found.

    Returns:
        One group per key that has other names, that key first.

    Example:
        >>> from funcmodel.records.checkpoint import FileSpec, StoredTensor
        >>> from funcmodel.records.tensors import TensorSpec
        >>> stored = StoredTensor(TensorSpec([2], "float32"), 4096, 4104)
        >>> metadata = FrozenMap({"format": "pt", "head.weight": "embed.weight"})
        >>> tensors = FrozenMap({"embed.weight": stored})
        >>> file = FileSpec(path="m", nbytes=4104, tensors=tensors, metadata=metadata, fingerprint="")
        >>> recorded(CheckpointSpec(path="m", files=(file,)))
        (TiedGroup(keys=('embed.weight', 'head.weight'), by='identity'),)
    """
    held = {name for file in checkpoint.files for name in file.tensors}
    notes = {
        name: key
        for metadata in (*(file.metadata for file in checkpoint.files), checkpoint.index and checkpoint.index.metadata)
        for name, key in (metadata or {}).items()
        if name != "format" and isinstance(key, str) and key in held and name not in held and not is_digest(name, key)
    }
    others = groupby(lambda name: notes[name], notes)
    return tuple(TiedGroup((key, *names)) for key, names in others.items())
