"""From a state dict plan to the files that hold it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import chain, count
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, get_args

from funcmodel.core.index import render_config
from funcmodel.core.limits import Limits, check_choice, name_error
from funcmodel.core.lowering import leaves
from funcmodel.core.shapes import spec_of
from funcmodel.core.wire import DIGEST
from funcmodel.errors import PlanError, TieConflictError
from funcmodel.plan.sharding import SUFFIX, Shards, index_name, plan_shards, rivals, single_name
from funcmodel.records.actions import Publish, SaveAction, WriteIndex, WriteShard, WriteText
from funcmodel.records.checkpoint import CheckpointSpec
from funcmodel.records.config import Config
from funcmodel.records.dtypes import FROM_SAFETENSORS
from funcmodel.records.expressions import Expr, Live, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import ModuleSpec, TiedGroup
from funcmodel.records.plans import SavePlan, ShardPlan, StateDictPlan
from funcmodel.records.tensors import TensorSpec

Aliases: TypeAlias = Literal["alias", "copy", "raise"]
Digests: TypeAlias = Literal["none", "sha256"]

# The order in which safetensors 0.8 lays tensors out: wide types first, so that every tensor is aligned to its own
# width, then by name. Keeping to it makes the data of a file the same bytes, whoever wrote it.
LAYOUT: Final = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL"),
)
_LONGEST_NAME: Final = Limits().name_chars
_RANK: Final = MappingProxyType({FROM_SAFETENSORS[name]: rank for rank, name in enumerate(LAYOUT)})


def live_plan(spec: ModuleSpec) -> StateDictPlan:
    """The plan that saves a module: every persistent leaf, from memory, under every name it has.

    Tied names share one leaf, that of the first persistent name of their group.

    Args:
        spec: the module.

    Returns:
        Keys in module order.

    Example:
        >>> from funcmodel.records.module import ModuleSpec, ParamSpec, TiedGroup
        >>> w = ParamSpec(spec=TensorSpec([2], "float32"))
        >>> plan = live_plan(ModuleSpec(name="Net", params={"a.w": w, "b.w": w}, tied=(TiedGroup(("a.w", "b.w")),)))
        >>> plan["b.w"].key
        'a.w'
    """
    owner: dict[str, str] = {}
    for group in spec.tied:
        names = [key for key in group.keys if key in spec.params and spec.params[key].persistent]
        owner.update((key, names[0]) for key in names)
    return StateDictPlan(
        {key: Live(owner.get(key, key), leaf.spec) for key, leaf in spec.params.items() if leaf.persistent}
    )


def plan_save(
    source: Mapping[str, Expr],
    *,
    max_shard_size: int | str | None = "5GB",
    shards: Shards = None,
    tied: Iterable[TiedGroup] = (),
    aliases: Aliases = "alias",
    existing: CheckpointSpec | None = None,
    config: Config | None = None,
    texts: Mapping[str, str] | None = None,
    variant: str | None = None,
    name: str = "model",
    metadata: Mapping[str, str] | None = None,
    digests: Digests = "none",
) -> SavePlan:
    """Plan the files of a checkpoint: shards, index, config, and the one rename that makes them visible.

    The plan depends on what `source` says, not on the order in which it says it: keys are laid out in natural order of
    their names ("layers.9" before "layers.10") and, inside a file, as safetensors does. Plans that are equal save the
    same bytes.

    Args:
        source: what to save.
        max_shard_size: most bytes of tensor data per file; None for one file whatever its size.
        shards: at most so many files, about equally large; "auto" for speed. See `plan_shards`.
        tied: keys that are one tensor; the first one that `source` holds keeps the tensor.
        aliases: what to do with keys that are one tensor, declared or seen from equal expressions over stored or live
            tensors: "alias" writes the first and records the other names in the metadata, "copy" writes each, "raise"
            refuses.
        existing: the checkpoint that the folder holds already. Its names are not reused before the commit, and what it
            lists is removed after it, where it is of the same name and variant.
        config: written as `config.json`.
        texts: more text files beside it, name to content.
        variant: as in `model.fp16.safetensors`.
        name: stem of the file names. With `max_shard_size=None`, `name="weights"` plans exactly `weights.safetensors`.
        metadata: more entries for the header of every file of weights, beside `format`, which is "pt" by default.
        digests: "sha256" records the SHA-256 of every tensor, and of the header, in the metadata of its file, under
            "sha256:" and the tensor's name; `verify` and `digest="check"` compare them.

    Returns:
        The plan, for `apply` or `run.write.write`.

    Raises:
        PlanError: a key or a dtype that the format cannot hold, or aliases under "raise"; `.keys` names them.
        TieConflictError: tied keys with different expressions.
        ValueError: `max_shard_size` is no size, `shards` no number of files, or `digests` no choice.

    Example:
        >>> spec = TensorSpec([4], "float32")
        >>> plan = StateDictPlan({"w": Live("w", spec), "b": Live("b", spec)})
        >>> [type(a).__name__ for a in plan_save(plan, max_shard_size=16).actions]
        ['WriteShard', 'WriteShard', 'WriteIndex', 'Publish']
        >>> plan_save(plan).actions[-1].commit
        'model.safetensors'
    """
    check_choice("digests", digests, get_args(Digests))
    check_choice("aliases", aliases, get_args(Aliases))
    source = dict(source.items())
    specs = {key: spec_of(expr) for key, expr in source.items()}
    _check_storable(specs)
    extra = {"format": "pt", **_text(metadata or {})}
    dropped = _dropped(source, tuple(tied), aliases, reserved={*extra, "total_size", "total_parameters"})
    kept = sorted((key for key in source if key not in dropped), key=_natural)
    sizes = {key: specs[key].nbytes for key in kept}
    cut = _free(
        lambda tag: plan_shards(sizes, max_shard_size, name=name, variant=variant, tag=tag, shards=shards),
        taken=set() if existing is None else {*_listed_by(existing), *existing.ignored},
        tags=_tags([(key, source[key]) for key in kept], extra),
    )
    files = tuple(cut.files)
    actions: list[SaveAction] = list(_write_shards(cut, specs, source, extra, dropped, digests))
    commit = files[0]
    companions = _texts(config, texts or {})
    actions.extend(companions)
    if len(files) > 1:
        commit = index_name(name, variant=variant)
        totals = {"total_parameters": sum(specs[key].numel for key in kept), "total_size": sum(sizes.values())}
        home = FrozenMap({key: file for file, keys in cut.files.items() for key in keys})
        actions.append(WriteIndex(commit, home, FrozenMap({**totals, **dict(sorted(dropped.items()))})))
    renames = tuple(file for file in (*files, *(text.file for text in companions)) if file != commit)
    replaced = _replaced(existing, name, variant)
    removes = tuple(file for file in replaced if file not in {commit, *files})
    # What was recorded about a file that is replaced would be held against the file that replaces it.
    removes += () if existing is None or not replaced else existing.digests
    return SavePlan((*actions, Publish(renames, commit, removes)))


def _texts(config: Config | None, texts: Mapping[str, str]) -> tuple[WriteText, ...]:
    bad = tuple(name for name in texts if name.startswith(".") or SUFFIX in name or (config and name == "config.json"))
    if bad:
        raise PlanError(
            f"not written as texts: {_listed(bad)}; weights and their index are planned from the source, hidden files "
            "are the library's, and config.json is given once"
        )
    own = {} if config is None else {"config.json": render_config(config)}
    return tuple(WriteText(name, text) for name, text in {**own, **texts}.items())


def _write_shards(
    shards: ShardPlan,
    specs: Mapping[str, TensorSpec],
    source: Mapping[str, Expr],
    metadata: Mapping[str, str],
    dropped: Mapping[str, str],
    digests: Digests,
) -> Iterator[WriteShard]:
    """Each file with its entries in the order of their bytes, and with the other names of the tensors it holds."""
    others: dict[str, list[str]] = {}
    for key, canonical in dropped.items():
        others.setdefault(canonical, []).append(key)
    for file, keys in shards.files.items():
        laid_out = sorted(keys, key=lambda key: (_RANK[specs[key].dtype], key))
        records = {other: key for key in keys if key in others for other in others[key]} if others else {}
        entries = FrozenMap({key: source[key] for key in laid_out})
        yield WriteShard(file, entries, FrozenMap(sorted({**metadata, **records}.items())), digests)


def _check_storable(specs: Mapping[str, TensorSpec]) -> None:
    """Everything that would make a file which a strict reader refuses."""
    bad = tuple(key for key in specs if not _storable_name(key))
    if bad:
        raise PlanError(
            f"safetensors cannot hold these names: {_listed(bad)}; a name has 1 to {_LONGEST_NAME} characters, "
            "no control characters, and is not '__metadata__'; rename them with convert(Rename(...)) or drop them",
            keys=bad,
        )
    bad = tuple(key for key, spec in specs.items() if spec.dtype not in _RANK)
    if bad:
        kinds = sorted({specs[key].dtype.name for key in bad})
        raise PlanError(
            f"safetensors has no element type for {', '.join(kinds)}: {_listed(bad)}; cast or drop them", keys=bad
        )
    bad = tuple(key for key, spec in specs.items() if spec.dtype.bits % 8 and spec.numel * spec.dtype.bits % 8)
    if bad:
        raise PlanError(f"these tensors do not fill whole bytes: {_listed(bad)}; {specs[bad[0]]!r} for one", keys=bad)


def _storable_name(key: str) -> bool:
    if key.isascii() and key.isprintable():
        return 0 < len(key) <= _LONGEST_NAME and key != "__metadata__"
    return name_error(key) is None


def _text(metadata: Mapping[str, str]) -> Mapping[str, str]:
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise PlanError(f"the metadata of a safetensors file is text to text, found {key!r}: {value!r}")
        if key.startswith(DIGEST):
            raise PlanError(f"metadata entries that start with {DIGEST!r} are digests, found {key!r}; leave it out")
    return metadata


def _listed(keys: tuple[str, ...]) -> str:
    return ", ".join(map(repr, keys[:8])) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


# -- aliases ---------------------------------------------------------------------------------------------------------


def _dropped(
    source: Mapping[str, Expr], tied: tuple[TiedGroup, ...], aliases: Aliases, *, reserved: set[str]
) -> dict[str, str]:
    """Keys that are not written, to the key that is written for them."""
    leader: dict[str, str] = {}
    firsts = []
    for group in tied:
        members = [key for key in group.keys if key in source]
        firsts += members[:1]
        for key in members[1:]:
            if source[key] != source[members[0]]:
                raise TieConflictError(
                    f"{members[0]!r} and {key!r} are one tensor, and the plan holds two different expressions for "
                    "them; say which one counts with dedupe(tied, prefer=...)",
                    keys=tuple(members),
                    tied=group,
                )
            leader[key] = members[0]
    seen: dict[object, str] = {}
    for key in chain(firsts, source):
        if key in leader or (token := _identity(source[key])) is None:
            continue
        first = seen.setdefault(token, key)
        if first != key and source[first] == source[key]:
            leader[key] = first
    if leader and aliases == "raise":
        raise PlanError(
            f"these keys are other names of tensors already in the plan: {_listed(tuple(leader))}; "
            "pass aliases='alias' to record them or 'copy' to write each",
            keys=tuple(leader),
        )
    if aliases != "alias":
        return {}
    # A name that the metadata needs for itself cannot record an alias; such a key is written as a copy.
    return {key: _end(leader, key) for key in leader if key not in reserved and not key.startswith(DIGEST)}


def _end(leader: Mapping[str, str], key: str) -> str:
    while key in leader:
        key = leader[key]
    return key


def _identity(expr: Expr) -> object:
    """What two keys have in common if they are one tensor; None where equal expressions are no sign of it."""
    match expr:
        case Live(key):
            return key
        case Read(file, name, _, offset):
            return file.path, name, offset
    # Two biases that are both all zeros are not one tensor.
    return expr if any(isinstance(leaf, Read | Live) for leaf in leaves(expr)) else None


# -- files -----------------------------------------------------------------------------------------------------------


def _natural(key: str) -> tuple[list[str], str]:
    """Sorts names as a reader would: numbers by value."""
    return [part.zfill(20) if part.isdigit() else part for part in key.split(".")], key


def _free(cut: Callable[[str | None], ShardPlan], *, taken: set[str], tags: Iterator[str]) -> ShardPlan:
    """Shards under names that nothing in the folder uses: the conventional ones where those are free."""
    shards = cut(None)
    while len(shards.files) > 1 and not taken.isdisjoint(shards.files):
        shards = cut(next(tags))
    return shards


def _tags(entries: list[tuple[str, Expr]], metadata: Mapping[str, str]) -> Iterator[str]:
    """Short marks that are the same whenever the plan is."""
    for attempt in count():
        digest = blake2b(repr((attempt, sorted(metadata.items()))).encode(), digest_size=4)
        for key, expr in entries:
            what = (expr.file.fingerprint, expr.offset, expr.spec) if isinstance(expr, Read) else expr
            digest.update(repr((key, what)).encode())
        yield digest.hexdigest()


def _listed_by(existing: CheckpointSpec) -> tuple[str, ...]:
    """The names that a checkpoint uses, its index first."""
    files = [_basename(file.path) for file in existing.files]
    if existing.index is not None:
        files = [_basename(existing.index.path), *sorted(set(existing.index.weight_map.values())), *files]
    return tuple(dict.fromkeys(files))


def _replaced(existing: CheckpointSpec | None, name: str, variant: str | None) -> tuple[str, ...]:
    """What the save supersedes, in the order of removal: an index goes before the shards that it names."""
    if existing is None or any(file.format != "safetensors" for file in existing.files):
        return ()
    listed = _listed_by(existing)
    single = single_name(name, variant=variant)
    return listed if listed and listed[0] in (single, *rivals(single)) else ()


def _basename(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]
