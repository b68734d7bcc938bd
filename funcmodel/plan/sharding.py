"""Which key goes to which file, and how the files of a checkpoint are called."""

from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias

from funcmodel.errors import PlanError
from funcmodel.plan.routing import MANY
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.plans import ShardPlan
from funcmodel.records.tensors import parse_size

SUFFIX: Final = ".safetensors"
Shards: TypeAlias = int | Literal["auto"] | None
Outbound: TypeAlias = Literal["near", "far", "computed"]
WRITERS: Final = 8  # so many files at once, at most
_PARALLEL: Final = 2 << 30  # less than this is written as fast into one file
_APART: Final = 64 << 20  # files of fewer bytes together are written one after the other


def plan_shards(
    sizes: Mapping[str, int],
    max_shard_size: int | str | None,
    *,
    name: str = "model",
    variant: str | None = None,
    suffix: str = SUFFIX,
    tag: str | None = None,
    shards: Shards = None,
) -> ShardPlan:
    """Cut keys into files: greedily, in the order given, every key exactly once.

    A file holds at most `max_shard_size` bytes of tensor data, or one tensor that is larger; and no file could also
    have held the first tensor of the next. A larger limit never gives more files.

    Args:
        sizes: key to bytes, in the order in which the keys are to be laid out. No key at all makes one empty file.
        max_shard_size: the limit in bytes, as an int or as text such as "5GB"; None for no limit.
        name: stem of the file names.
        variant: as in `model.fp16.safetensors`.
        suffix: of the file names.
        tag: a mark in the names of shards, for where the plain names are taken.
        shards: at most so many files, about equally large, unless `max_shard_size` makes more; "auto" takes 4 to 8 from
            2 GiB on, which several threads write and read at once, and below leaves it to the limit. None leaves it
            to the limit.

    Returns:
        File names to keys, and to bytes of tensor data.

    Raises:
        ValueError: the limit is not a size, or `shards` no number of files.
        PlanError: `name` or `variant` would make a path.

    Source: huggingface_hub's `split_state_dict_into_shards_factory`, which sets a tensor over the limit aside and goes
    on filling the file before it; here the files keep the order of the keys.

    Example:
        >>> plan_shards({"a": 4, "b": 4, "c": 9, "d": 1}, 8).files["model-00001-of-00003.safetensors"]
        ('a', 'b')
        >>> list(plan_shards({"a": 4, "b": 4}, "1KB").files)
        ['model.safetensors']
        >>> dict(plan_shards({"a": 4, "b": 1, "c": 3}, None, shards=2).sizes)
        {'model-00001-of-00002.safetensors': 4, 'model-00002-of-00002.safetensors': 4}
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    if shards is not None:
        even = _even_limit(list(sizes.values()), shards)
        limit = even if limit is None or (even is not None and even < limit) else limit
    cuts: list[tuple[list[str], int]] = []
    keys: list[str] = []
    filled = 0
    for key, nbytes in sizes.items():
        if keys and limit is not None and filled + nbytes > limit:
            cuts.append((keys, filled))
            keys, filled = [], 0
        keys.append(key)
        filled += nbytes
    cuts.append((keys, filled))
    if len(cuts) == 1:
        names = [single_name(name, variant=variant, suffix=suffix)]
    else:
        options = {"name": name, "variant": variant, "suffix": suffix, "tag": tag}
        names = [shard_name(i, len(cuts), **options) for i in range(len(cuts))]  # type: ignore[arg-type]
    return ShardPlan(
        FrozenMap({file: tuple(members) for file, (members, _) in zip(names, cuts, strict=True)}),
        FrozenMap({file: nbytes for file, (_, nbytes) in zip(names, cuts, strict=True)}),
    )


def writers(sizes: Sequence[int], of: Outbound) -> int:
    """How many files may be written at once. Two threads on one file would gain nothing: it has one lock.

    Args:
        sizes: of the files, in bytes.
        of: "near", tensors that are stored or lie on the CPU, as they are wanted; "far", where some lie on a GPU, out
            of which each thread has two pinned buffers, which must be worth pinning; "computed", where some are
            changed, for which torch has threads of its own.

    Example:
        >>> writers([1 << 30] * 4, "near"), writers([1 << 28] * 4, "far"), writers([1 << 30] * 4, "computed")
        (4, 1, 1)
    """
    enough = sum(sizes) >= (MANY if of == "far" else _APART)
    return min(WRITERS, len(sizes)) if enough and sizes and of != "computed" else 1


def _even_limit(sizes: Sequence[int], shards: int | Literal["auto"]) -> int | None:
    """The smallest limit that makes at most so many files; None where one file is as good."""
    total = sum(sizes)
    if shards == "auto":
        if total < _PARALLEL:
            return None
        shards = max(4, min(8, total // _PARALLEL))
    if type(shards) is not int or shards < 1:
        raise ValueError(f"shards={shards!r}: expected a number of files or 'auto'")
    low, high = -(-total // shards), total  # the files of the second are few enough, those of less than the first not
    while low < high:
        middle = (low + high) // 2
        if _count(sizes, middle) <= shards:
            high = middle
        else:
            low = middle + 1
    return low


def _count(sizes: Sequence[int], limit: int) -> int:
    count, filled, held = 1, 0, False
    for nbytes in sizes:
        if held and filled + nbytes > limit:
            count, filled = count + 1, 0
        filled, held = filled + nbytes, True
    return count


def single_name(name: str = "model", *, variant: str | None = None, suffix: str = SUFFIX) -> str:
    """The name of a checkpoint's only file of weights.

    Raises:
        PlanError: `name` or `variant` would make a path.

    Example:
        >>> single_name(), single_name(variant="fp16")
        ('model.safetensors', 'model.fp16.safetensors')
    """
    return f"{_stem(name, variant)}{suffix}"


def shard_name(
    position: int,
    count: int,
    *,
    name: str = "model",
    variant: str | None = None,
    suffix: str = SUFFIX,
    tag: str | None = None,
) -> str:
    """The name of one shard of `count`; `position` counts from 0, the name from 1.

    Raises:
        PlanError: `name` or `variant` would make a path.

    Example:
        >>> shard_name(0, 3), shard_name(2, 3, variant="fp16")
        ('model-00001-of-00003.safetensors', 'model.fp16-00003-of-00003.safetensors')
        >>> shard_name(0, 2, tag="9f3c01ab")
        'model-9f3c01ab-00001-of-00002.safetensors'
    """
    mark = "" if tag is None else f"-{tag}"
    return f"{_stem(name, variant)}{mark}-{position + 1:05d}-of-{count:05d}{suffix}"


def index_name(name: str = "model", *, variant: str | None = None, suffix: str = SUFFIX) -> str:
    """The name of the index beside shards.

    Raises:
        PlanError: `name` or `variant` would make a path.

    Source: transformers and diffusers put the variant before `.json`; huggingface_hub puts it elsewhere, and what it
    writes so is not found again.

    Example:
        >>> index_name(), index_name(variant="fp16")
        ('model.safetensors.index.json', 'model.safetensors.index.fp16.json')
    """
    _stem(name, variant)
    return f"{name}{suffix}.index.json" if variant is None else f"{name}{suffix}.index.{variant}.json"


def rivals(file: str, *, suffix: str = SUFFIX) -> tuple[str, ...]:
    """The names that must not lie beside a single file or an index: readers would take either for the checkpoint.

    Example:
        >>> rivals("model.safetensors"), rivals("model.safetensors.index.json")
        (('model.safetensors.index.json',), ('model.safetensors',))
        >>> rivals("model.fp16.safetensors")
        ('model.fp16.safetensors.index.json', 'model.safetensors.index.fp16.json')
    """
    stem, variant = _split(file, suffix)
    whole = stem if variant is None else f"{stem}.{variant}"
    dots = [at for at, c in enumerate(whole) if c == "." and 0 < at < len(whole) - 1]
    found = (
        f"{whole}{suffix}",
        f"{whole}{suffix}.index.json",
        *(f"{whole[:at]}{suffix}.index.{whole[at + 1 :]}.json" for at in reversed(dots)),
    )
    return tuple(other for other in dict.fromkeys(found) if other != file)


def variant_of(file: str, *, suffix: str = SUFFIX) -> str | None:
    """The variant in the name of a single file or an index, None where there is none.

    Example:
        >>> variant_of("model.fp16.safetensors"), variant_of("model.safetensors.index.json")
        ('fp16', None)
    """
    return _split(file, suffix)[1]


def _split(file: str, suffix: str) -> tuple[str, str | None]:
    head, marker, tail = file.rpartition(f"{suffix}.index.")
    if marker and tail != "json":
        return head, tail.removesuffix(".json")
    name, dot, variant = (head if marker else file.removesuffix(suffix)).rpartition(".")
    return (name, variant) if dot else (variant, None)


def _stem(name: str, variant: str | None) -> str:
    for text in (name, variant):
        if text is not None and (not text or text.startswith(".") or any(c in "/\\:\0" or c < " " for c in text)):
            raise PlanError(f"not usable in a file name: {text!r}; a name and a variant are plain words")
    _, numbered, count = (variant or "").rpartition("-of-")
    if variant is not None and (SUFFIX in f".{variant}." or (numbered and count.isdecimal())):
        raise PlanError(f"the variant {variant!r} would be read as a part of other names; choose a plain word")
    return name if variant is None else f"{name}.{variant}"
