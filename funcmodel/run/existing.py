"""What a folder holds already, as far as a save must know it."""

import os
from collections.abc import Container
from typing import TYPE_CHECKING

from funcmodel.core.folder import leftovers, sidecars
from funcmodel.core.index import parse_index
from funcmodel.core.journal import JOURNAL
from funcmodel.core.limits import LIMITS
from funcmodel.errors import ChangedError, CheckpointError
from funcmodel.plan.sharding import SUFFIX, rivals, single_name
from funcmodel.records.checkpoint import CheckpointSpec, FileSpec, IndexSpec
from funcmodel.records.mapping import FrozenMap
from funcmodel.run.files import open_regular

if TYPE_CHECKING:
    from funcmodel.run.journal import Standing


def existing_checkpoint(
    folder: str | os.PathLike[str], *, name: str = "model", variant: str | None = None
) -> CheckpointSpec | None:
    """What a save into a folder would replace, for `plan_save(..., existing=...)`; None where there is nothing.

    Only names and the index are read, no header: a checkpoint that is damaged, or that a dead writer left between two
    states, can be replaced. Its files have no tensors and no fingerprint here; `scan_checkpoint` reads those.

    Args:
        folder: it need not exist.
        name: stem of the file names.
        variant: as in `model.fp16.safetensors`.

    Raises:
        CheckpointError: the folder cannot be listed; code "OPEN".
    """
    from funcmodel.run.journal import is_foreign  # who only loads needs none of it

    where = os.fspath(folder)
    try:
        names = set(os.listdir(where))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be listed ({error.strerror})", code="OPEN", path=where) from error
    names -= stands_in(where, names).hidden
    single = single_name(name, variant=variant)
    indexes = [rival for rival in rivals(single) if rival in names]
    held = {file for index in indexes for file in listed(os.path.join(where, index)) if not is_foreign(file, single)}
    files = ({single} | held) & names
    used = f"{single.removesuffix(SUFFIX)}-"
    if not files and not indexes and not any(name.startswith(used) and name.endswith(SUFFIX) for name in names):
        return None
    index = None
    if indexes:
        weight_map = FrozenMap({file: file for file in sorted(held)})
        index = IndexSpec(path=os.path.join(where, indexes[0]), weight_map=weight_map)
    return CheckpointSpec(
        path=where,
        files=tuple(
            FileSpec(path=os.path.join(where, file), nbytes=0, tensors=FrozenMap(), fingerprint="")
            for file in sorted(files)
        ),
        index=index,
        variant=variant,
        ignored=leftovers(names, (*files, *indexes)),
        digests=sidecars(names, files),
    )


def stands_in(folder: str, names: Container[str]) -> "Standing":
    """What the journal in a folder says of it, where its `names` include one.

    Raises:
        CheckpointError: the system cannot read the folder; code "OPEN".
    """
    from funcmodel.run.journal import Standing, standing  # few folders have one

    if JOURNAL not in names:
        return Standing()
    try:
        return standing(folder)
    except OSError as error:
        raise _unlisted(folder, f"has a journal that cannot be followed ({error}); check the disk") from error


def listing(where: str) -> dict[str, tuple[int, ...]] | None:
    """The names in a folder, but for those of unfinished files, with what tells a file from the next of its name.

    Returns:
        None where the path is no folder.
    """
    try:
        with os.scandir(where) as entries:
            names: dict[str, tuple[int, ...]] = {
                e.name: (e.inode(),) for e in entries if e.name == JOURNAL or not e.name.startswith(".")
            }
    except NotADirectoryError:
        return None
    except FileNotFoundError as error:
        raise _unlisted(where, "does not exist; check the path") from error
    except (OSError, ValueError) as error:
        raise _unlisted(where, f"cannot be opened ({error}); check the path") from error
    for name in names:
        if name.endswith(".json"):
            try:
                found = os.stat(os.path.join(where, name), follow_symlinks=False)
            except OSError:
                continue
            names[name] = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return names


def _unlisted(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: {what}", code="OPEN", path=where)


def listed(path: str) -> frozenset[str]:
    """The files that an index names; none if it cannot be read, for then nobody finds them through it."""
    try:
        with open_regular(path) as file:
            if file.nbytes > LIMITS.index_bytes:
                return frozenset()
            return frozenset(parse_index(file.read(0, file.nbytes), path=path).weight_map.values())
    except (ChangedError, CheckpointError):
        return frozenset()
