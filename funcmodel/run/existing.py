"""What a folder holds already, as far as a save must know it."""

import os

from funcmodel.core.folder import leftovers
from funcmodel.core.index import parse_index
from funcmodel.errors import CheckpointError
from funcmodel.plan.sharding import rivals, single_name
from funcmodel.records.checkpoint import CheckpointSpec, FileSpec, IndexSpec
from funcmodel.records.mapping import FrozenMap
from funcmodel.run.files import open_regular


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
    where = os.fspath(folder)
    try:
        names = set(os.listdir(where))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be listed ({error.strerror})", code="OPEN", path=where) from error
    single = single_name(name, variant=variant)
    indexes = [rival for rival in rivals(single) if rival in names]
    held = {file for index in indexes for file in listed(os.path.join(where, index))}
    files = ({single} | held) & names
    if not files and not indexes:
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
    )


def listed(path: str) -> frozenset[str]:
    """The files that an index names; none if it cannot be read, for then nobody finds them through it."""
    try:
        with open_regular(path) as file:
            return frozenset(parse_index(file.read(0, file.nbytes), path=path).weight_map.values())
    except CheckpointError:
        return frozenset()
