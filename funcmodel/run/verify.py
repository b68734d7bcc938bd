"""`verify`: every byte of a checkpoint against what is recorded of it. `record_digests`: what later can be compared."""

import os
from collections.abc import Sequence
from typing import TypeAlias

from funcmodel.core.digests import Recorded, render_sidecar
from funcmodel.core.folder import SIDECAR
from funcmodel.core.limits import LIMITS, Limits
from funcmodel.records.actions import Publish
from funcmodel.records.checkpoint import FileSpec, StoredTensor
from funcmodel.records.expressions import FileRef
from funcmodel.records.reports import Damage, VerifyReport
from funcmodel.run.digests import Span, differing, failure, hashes, known, own_check, span, whole_span
from funcmodel.run.engine import source
from funcmodel.run.files import SourceFile
from funcmodel.run.filesystem import REAL, FileSystem
from funcmodel.run.formats import FORMATS, Format, format_named, open_source
from funcmodel.run.scan import Symlinks, Which, scan_checkpoint
from funcmodel.run.staging import Transaction

Path: TypeAlias = str | os.PathLike[str]


def verify(
    path: Path,
    *,
    variant: str | None = None,
    subfolder: str | None = None,
    formats: tuple[Format, ...] = FORMATS,
    which: Which | None = None,
    key: str | Sequence[str] | None = None,
    limits: Limits = LIMITS,
    symlinks: Symlinks = "contained",
) -> VerifyReport:
    """Compare every stored tensor of a checkpoint with what is recorded of it; the arguments are those of `scan`.

    Digests are found in the file's own header (`save(..., digests="sha256")`), which then has one too, or else beside
    the file (`record_digests`). A file of the Hugging Face cache that is named by its SHA-256 is compared with its
    name, and a format that holds checksums with those. At most 32 MiB are held at a time.

    Returns:
        What was compared, and what could not be because nothing is recorded of it.

    Raises:
        DigestError: bytes differ, after everything was compared; `.findings` has all, `.file` and `.tensor` name the
            first. Code "DIGEST"; or "DIGEST_STALE", where the digests beside a file are those of another.
        CheckpointError: the checkpoint cannot be read.
        StalePlanError, ChangedError: a file was replaced or changed meanwhile; verify again.

    Example:
        >>> import funcmodel as fm, tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = fm.save(torch.nn.Linear(3, 2), folder, digests="sha256")
        ...     fm.verify(folder).verified
        ('bias', 'weight')
    """
    checkpoint = scan_checkpoint(
        path,
        variant=variant,
        subfolder=subfolder,
        formats=formats,
        which=which,
        key=key,
        limits=limits,
        symlinks=symlinks,
    )
    damage: list[Damage] = []
    verified: list[str] = []
    unrecorded: list[str] = []
    whole: list[str] = []
    nbytes = 0
    for spec in checkpoint.files:
        format_ = format_named(spec.format, formats, path=spec.path)
        with open_source(_ref(spec), formats=formats, limits=limits) as file:
            spans, found, entire = _compared(file, spec, format_, limits)
            damage += [*found, *differing(spans)]
            file.verify_unchanged()
        names = {one.expected.tensor for one in spans}
        for name in spec.tensors:
            (verified if entire or name in names else unrecorded).append(name)
        whole += [spec.path] if entire else []
        nbytes += spec.nbytes if entire else sum(one.stop - one.start for one in spans)
    if damage:
        raise failure(damage)
    return VerifyReport(
        path=checkpoint.path,
        verified=tuple(verified),
        unrecorded=tuple(unrecorded),
        whole=tuple(whole),
        nbytes=nbytes,
    )


def record_digests(
    path: Path,
    *,
    variant: str | None = None,
    formats: tuple[Format, ...] = FORMATS,
    key: str | Sequence[str] | None = None,
    limits: Limits = LIMITS,
    filesystem: FileSystem = REAL,
) -> tuple[str, ...]:
    """Record the digests of a checkpoint that somebody else wrote: in `<file>.digests.json`, beside each file.

    Files that record digests themselves, or that are named by theirs, are left alone. Saving with funcmodel over a file
    removes what was recorded beside it.

    Args:
        path: a file of weights, an index, or a folder.
        variant: as in `model.fp16.safetensors`.
        formats: the formats to choose from.
        key: what leads to the state dict in each file, as in `scan`.
        limits: what is accepted.
        filesystem: the calls that write, so that tests can make each of them fail.

    Returns:
        The files written. Each appears whole or not at all, and replaces one of the same name.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        StalePlanError, ChangedError: a file was replaced or changed meanwhile; nothing was written.
        BusyError: a writer has the folder.
        SaveError: the system refused to write.
    """
    checkpoint = scan_checkpoint(path, variant=variant, formats=formats, key=key, limits=limits)
    texts: dict[str, str] = {}
    for spec in checkpoint.files:
        format_ = format_named(spec.format, formats, path=spec.path)
        with open_source(_ref(spec), formats=formats, limits=limits) as file:
            found = known(file, _ref(spec), spec, limits)
            if found.inside or found.whole:
                continue
            places = {name: Recorded(at.start, at.stop, "") for name, at in spec.tensors.items()}
            read = source(format_, file).readv_into
            values = hashes([span(file, read, name, at) for name, at in places.items()])
            file.verify_unchanged()
        digests = {name: at._replace(sha256=value) for (name, at), value in zip(places.items(), values, strict=True)}
        texts[spec.path + SIDECAR] = render_sidecar(digests, nbytes=spec.nbytes, fingerprint=spec.fingerprint)
    for name, text in texts.items():
        _publish(name, text.encode("utf-8"), filesystem)
    return tuple(texts)


def _ref(spec: FileSpec) -> FileRef:
    return FileRef(spec.path, spec.format, spec.nbytes, spec.fingerprint)


def _compared(
    file: SourceFile, spec: FileSpec, format_: Format, limits: Limits
) -> tuple[list[Span], list[Damage], bool]:
    """What of a file must be hashed, what is wrong with it already, and whether all of its bytes are covered."""
    found = known(file, _ref(spec), spec, limits)
    damage = list(found.damage)
    same = ((n, at) for n, at in found.tensors.items() if n in spec.tensors and _place(spec.tensors[n]) == at[:2])
    read = source(format_, file).readv_into if found.tensors else file.readv_into
    spans = [span(file, read, name, at) for name, at in same]
    if found.whole is not None:
        spans.append(whole_span(file, found.whole))
    damage += own_check(file, format_)
    return spans, damage, found.whole is not None or format_.verify is not None


def _place(stored: StoredTensor) -> tuple[int, int]:
    return stored.start, stored.stop


def _publish(path: str, text: bytes, filesystem: FileSystem) -> None:
    folder, name = os.path.split(os.path.abspath(path))
    sizes = {name: len(text)}
    with Transaction(os.path.realpath(folder), Publish((), name), filesystem=filesystem, sizes=sizes) as transaction:
        transaction.reserve()
        transaction.stage(name).write([memoryview(text)], 0)
        transaction.seal(name, len(text))
        transaction.commit()
