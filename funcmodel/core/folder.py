"""Which files of a folder are a checkpoint, decided by their names alone: `choose`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from attrs import frozen

from funcmodel.errors import AmbiguousCheckpointError, IndexMismatchError

# Names that transformers, diffusers, peft and open_clip give to weights. The first one present is the checkpoint.
STEMS: Final = ("model", "diffusion_pytorch_model", "adapter_model", "open_clip_model")
# The names that they, and torch, gave to weights before safetensors.
TORCH_STEMS: Final = (
    *("pytorch_model", "diffusion_pytorch_model", "adapter_model", "open_clip_pytorch_model"),
    *("model", "checkpoint", "state_dict"),
)
TORCH: Final = (".bin", ".pt", ".pth")
# Files of a training run that lie beside weights, have their suffixes, and are none.
COMPANIONS: Final = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "trainer_state")
# Follows the name of a file whose digests were recorded beside it. No reader takes such a name for weights.
SIDECAR: Final = ".digests.json"
WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".npz", ".index.json")


@frozen
class Choice:
    """Files that are one checkpoint by their names: a single file, an index, or both (then one is a leftover)."""

    single: str | None = None
    indexes: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()


def choose(
    names: Iterable[str], *, folder: str = "", variant: str | None = None, suffix: str = ".safetensors"
) -> Choice | None:
    """The checkpoint in a folder.

    Well-known names (`model`, `diffusion_pytorch_model`, ...) come first, in that order. Else the folder's only index
    is the checkpoint, else its only file of weights.

    Args:
        names: the names in the folder.
        folder: for messages.
        variant: as in `model.fp16.safetensors`, whose index is `model.safetensors.index.fp16.json`.
        suffix: how file names of the format end.

    Returns:
        The checkpoint's files; None where there are none of that variant, nor of any other.

    Raises:
        AmbiguousCheckpointError: several could be meant (code "AMBIGUOUS"), or there are only other variants (code
            "VARIANT", with the variants in the field `variants`).
        IndexMismatchError: there are shards without an index; code "INDEX_MISSING".

    Example:
        >>> choose(["config.json", "model.safetensors", "model.fp16.safetensors"])
        Choice(single='model.safetensors', indexes=(), shards=())
        >>> choose(["model.safetensors.index.fp16.json"], variant="fp16").indexes
        ('model.safetensors.index.fp16.json',)
    """
    stems = TORCH_STEMS if suffix in TORCH else STEMS
    found = _grouped([n for n in names if not is_companion(n)], variant, suffix)
    wanted = {stem: choice for (stem, v), choice in found.items() if v == variant}
    whole = {stem: choice for stem, choice in wanted.items() if choice.single or choice.indexes}
    for stem in stems:
        if stem in whole:
            return whole[stem]
    variants = tuple(sorted({v or "" for stem, v in found if stem in stems and v != variant}))
    if variants:
        files = tuple(n for (stem, _), c in found.items() if stem in stems for n in _files(c))
        raise _other_variants(folder, variant, variants, files)
    rest = {stem: choice for stem, choice in whole.items() if choice.indexes} or whole
    if len(rest) > 1:
        raise _several(folder, tuple(n for choice in rest.values() for n in _files(choice)), len(rest))
    if not rest and wanted:
        raise _no_index(folder, tuple(n for choice in wanted.values() for n in choice.shards))
    return next(iter(rest.values()), None)


def leftovers(names: Iterable[str], used: Iterable[str]) -> tuple[str, ...]:
    """Names of weights and indexes, of any format, that are not `used`, sorted.

    Example:
        >>> leftovers(["model.safetensors", "pytorch_model.bin", "config.json"], ["model.safetensors"])
        ('pytorch_model.bin',)
    """
    taken = set(used)
    return tuple(sorted(n for n in names if n not in taken and (n.endswith(WEIGHTS) or is_index(n))))


def is_index(name: str) -> bool:
    """Whether a name is that of an index, such as `model.safetensors.index.fp16.json`.

    Example:
        >>> is_index("pytorch_model.bin.index.json"), is_index("config.json")
        (True, False)
    """
    return ".index." in name and name.endswith(".json")


def is_companion(name: str) -> bool:
    """Whether a name is that of a file which a training run writes beside its weights, such as `optimizer.pt`.

    Example:
        >>> is_companion("training_args.bin"), is_companion("rng_state_0.pth"), is_companion("optimizer.safetensors")
        (True, True, False)
    """
    stem = name.partition(".")[0].rstrip("0123456789").rstrip("_")
    return stem in COMPANIONS and name.endswith(TORCH)


def is_known(name: str) -> bool:
    """Whether a name says that the file holds weights, whatever else lies beside it.

    Example:
        >>> is_known("pytorch_model.fp16.bin"), is_known("mine.bin")
        (True, False)
    """
    stem = name.partition(".")[0]
    return stem in STEMS or stem in TORCH_STEMS


def sidecars(names: Iterable[str], files: Iterable[str]) -> tuple[str, ...]:
    """Names of the digests that were recorded beside `files`, sorted.

    Example:
        >>> sidecars(["m.safetensors", "m.safetensors.digests.json", "n.bin.digests.json"], ["m.safetensors"])
        ('m.safetensors.digests.json',)
    """
    return tuple(sorted({file + SIDECAR for file in files}.intersection(names)))


def _grouped(names: Iterable[str], variant: str | None, suffix: str) -> Mapping[tuple[str, str | None], Choice]:
    """Stem and variant to the files that bear them."""
    groups: dict[tuple[str, str | None], tuple[list[str], list[str], list[str]]] = {}
    for name in sorted(names):
        body, infix, tail = name.rpartition(f"{suffix}.index")
        if infix and tail.endswith(".json"):
            stem, kind = _split(body, variant)
            place, kind = 1, tail.removesuffix(".json")[1:] or kind
        elif name.endswith(suffix) and name != suffix and not name.startswith("."):
            body = name.removesuffix(suffix)
            whole = _before_numbers(body)
            place = 0 if whole is None else 2
            stem, kind = _split(whole or body, variant)
        else:
            continue
        groups.setdefault((stem, kind), ([], [], []))[place].append(name)
    return {
        of: Choice(singles[-1] if singles else None, tuple(indexes), tuple(shards))
        for of, (singles, indexes, shards) in groups.items()
    }


def _split(body: str, variant: str | None) -> tuple[str, str | None]:
    """Stem and variant. Whether a dot in an unknown name starts a variant, only the caller's wish can tell."""
    stem, dot, kind = body.partition(".")
    if dot and (stem in STEMS or stem in TORCH_STEMS):
        return stem, kind
    if variant and body.endswith(f".{variant}"):
        return body.removesuffix(f".{variant}"), variant
    return body, None


def _before_numbers(body: str) -> str | None:
    """The name before `-00001-of-00003`; None where it does not end so."""
    parts = body.rsplit("-", 3)
    if len(parts) == 4 and parts[2] == "of" and parts[1].isdecimal() and parts[3].isdecimal():
        return parts[0]
    return None


def _other_variants(
    folder: str, variant: str | None, variants: tuple[str, ...], files: tuple[str, ...]
) -> AmbiguousCheckpointError:
    asked = "without a variant" if variant is None else f"of the variant {variant!r}"
    return AmbiguousCheckpointError(
        f"{folder}: has no weights {asked}, only of {', '.join(map(repr, variants))} ('' is none); "
        "pass variant=... to say which",
        code="VARIANT",
        path=folder,
        variants=variants,
        candidates=files,
    )


def _several(folder: str, files: tuple[str, ...], count: int) -> AmbiguousCheckpointError:
    return AmbiguousCheckpointError(
        f"{folder}: {count} checkpoints ({_some(files)}); pass the file, or several, instead of the folder",
        code="AMBIGUOUS",
        path=folder,
        candidates=files,
    )


def _no_index(folder: str, shards: tuple[str, ...]) -> IndexMismatchError:
    return IndexMismatchError(
        f"{folder}: shards without an index ({_some(shards)}), so nothing says whether all are there; "
        "restore the index, or pass the files themselves",
        code="INDEX_MISSING",
        path=folder,
        files=shards,
    )


def _files(choice: Choice) -> tuple[str, ...]:
    return (*([choice.single] if choice.single else ()), *choice.indexes, *choice.shards)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
