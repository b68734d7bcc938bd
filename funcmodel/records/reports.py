"""What was found, and what is allowed: `LoadReport`, `LoadPolicy`, `Waiver`, `Cost`, `Origin`, `VerifyReport`."""

from typing import Any, Literal, get_args

from attrs import field, frozen

from funcmodel.records.devices import Device
from funcmodel.records.dtypes import DType
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec

Loss = Literal["exact", "rounding", "range", "kind"]
WaiverKind = Literal["missing", "unexpected", "mismatched"]


@frozen
class Mismatch:
    """A key whose shape in the checkpoint is not the module's."""

    key: str
    expected: TensorSpec
    found: TensorSpec


@frozen
class DtypeChange:
    """A key whose dtype in the plan's source is not the module's.

    Attributes:
        expected: the module's dtype.
        found: the source's dtype.
        loss: what a cast from `found` to `expected` can do: nothing, rounding, leaving the range, or a change of kind.
        cast: whether the plan casts; otherwise the leaf takes the source's dtype.
    """

    key: str
    expected: DType
    found: DType
    loss: Loss
    cast: bool


@frozen(kw_only=True)
class LoadReport:
    """What a load plan found; a view of the plan that is executed, never a by-product. Keys are in module order.

    Attributes:
        missing_keys: wanted by the module, held by nothing in the source (ties resolved).
        unexpected_keys: in the source, wanted by nothing.
        mismatched_keys: shapes differ.
        tied_keys: `(key, key it is tied to)`.
        initialized_keys: drawn afresh or kept from the constructor because missing or mismatched.
        skipped_keys: held by the source and set aside, because a tied twin with the same bytes was taken or the class
            declares them ignorable.
        dtype_changes: dtypes differ.
        meta_keys: non-persistent leaves on meta, for which no value exists anywhere.
        companion_keys: those unexpected keys that scale a quantized weight which is itself expected; no policy ignores
            them.
        hints: transforms, as text, that would fix what was found.
        near_misses: `(wanted key, similar key in the source)`.
    """

    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    mismatched_keys: tuple[Mismatch, ...] = ()
    tied_keys: tuple[tuple[str, str], ...] = ()
    initialized_keys: tuple[str, ...] = ()
    skipped_keys: tuple[str, ...] = ()
    dtype_changes: tuple[DtypeChange, ...] = ()
    meta_keys: tuple[str, ...] = ()
    companion_keys: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    near_misses: tuple[tuple[str, str], ...] = ()


@frozen
class Waiver:
    """Permission for one kind of finding on keys that match a template.

    A waiver that matches nothing is an error.
    """

    kind: WaiverKind
    template: str


def waiver(value: object) -> Waiver:
    """A `Waiver` from one or from text such as "unexpected:embeddings.position_ids".

    Raises:
        ValueError: the text is no waiver.

    Example:
        >>> waiver("unexpected:embeddings.position_ids")
        Waiver(kind='unexpected', template='embeddings.position_ids')
    """
    if isinstance(value, Waiver):
        return value
    kind, colon, template = str(value).partition(":")
    if not colon or not template or kind not in get_args(WaiverKind):
        raise ValueError(f"not a waiver: {value!r}; write 'missing:...', 'unexpected:...' or 'mismatched:...'")
    return Waiver(kind, template)  # type: ignore[arg-type]


def _waivers(value: Any) -> tuple[Waiver, ...]:
    return tuple(map(waiver, value))


def _one_of(*choices: str) -> Any:
    def check(_: object, attribute: Any, value: object) -> None:
        if value not in choices:
            raise ValueError(f"{attribute.name} must be one of {', '.join(map(repr, choices))}, found {value!r}")

    return check


@frozen(kw_only=True)
class LoadPolicy:
    """What a load may do about findings; the default is to refuse every one.

    Attributes:
        missing: "init" draws what is missing afresh.
        unexpected: "ignore" passes over keys that nothing wants (never over the scale of a quantized weight).
        mismatched: "init" draws leaves of another shape afresh.
        dtype: "file" keeps the source's dtype, "module" casts to the module's, "error" refuses a difference.
        allow: waivers, as records or text; one that matches nothing is itself an error.
    """

    missing: Literal["error", "init"] = field(default="error", validator=_one_of("error", "init"))
    unexpected: Literal["error", "ignore"] = field(default="error", validator=_one_of("error", "ignore"))
    mismatched: Literal["error", "init"] = field(default="error", validator=_one_of("error", "init"))
    dtype: Literal["file", "module", "error"] = field(default="file", validator=_one_of("file", "module", "error"))
    allow: tuple[Waiver, ...] = field(default=(), converter=_waivers)


@frozen(kw_only=True)
class Cost:
    """What applying a plan takes, in bytes.

    Attributes:
        read: bytes read per file path. Up to 4 KiB between two small tensors that are read into shared memory are read
            with them, and are in it, but for files that are decoded. What goes to several places through the ring
            ("stage") is read once, but for what a `Call` computes or a part of a `Reshape`, and counted once where all
            tensors are fresh. What is not in it: of a tensor of which many runs are wanted at most a tenth more is
            read, of runs under 64 bytes what lies between them; past the page cache whole blocks are; tensors that
            exist, or come one by one, are read without what is between them; whoever checks digests reads all twice.
        held: bytes that stay allocated per device.
        peak: highest bytes allocated at once per device, `held` included.
        written: bytes written per file name (save plans).
        buffers: bytes of ordinary memory through which passes what cannot be read in place, on top of `peak`; 8 MiB
            more where an existing tensor, whose strides no plan knows, is not contiguous.
        pinned: bytes of pinned memory, likewise.
        borrowed: bytes of tensors that are pages of files: in the page cache, for as long as they live, and in no
            memory of this process.
        cached: bytes that lie in the system's page cache afterwards, if there is room: of files that are read or
            borrowed, but for those read past it, and of files that are written. No process owns them.
    """

    read: FrozenMap[str, int] = FrozenMap()
    held: FrozenMap[Device, int] = FrozenMap()
    peak: FrozenMap[Device, int] = FrozenMap()
    written: FrozenMap[str, int] = FrozenMap()
    buffers: int = 0
    pinned: int = 0
    borrowed: int = 0
    cached: int = 0


OriginKind = Literal[
    "file", "live", "computed", "constant", "noise", "init", "constructor", "random", "alias", "extra_state"
]


@frozen
class Origin:
    """Where one leaf comes from.

    Attributes:
        kind: "file" (stored bytes, whole or in part), "live" (caller's tensor), "computed" (a `Call`), "constant",
            "noise", "init" (drawn by an initializer), "constructor" (the value the constructor gave), "random" (a
            constructor's value that `skeleton` drew), "alias" (of another leaf), "extra_state" (no tensor).
        sources: for "file" the stored names as "path:name", for "alias" the other key, for "init" the initializer.
    """

    kind: OriginKind
    sources: tuple[str, ...] = ()


@frozen
class Damage:
    """Bytes of a file that are not what is recorded of them.

    Attributes:
        file: the file.
        tensor: the tensor; None where it is the header, or the file as a whole.
        code: "DIGEST" (other bytes), "DIGEST_MISSING" (nothing recorded that they could be compared with),
            "DIGEST_STALE" (what is recorded is of another file), or what else the format's own check found.
        expected: what is recorded.
        found: what the bytes have.
    """

    file: str
    tensor: str | None
    code: str = "DIGEST"
    expected: str | None = None
    found: str | None = None


@frozen(kw_only=True)
class VerifyReport:
    """What `verify` compared, and what it could not; differences are an error and stand in no report.

    Attributes:
        path: what was verified.
        verified: tensors whose bytes are those that were recorded, in the order of the files.
        unrecorded: tensors that nothing is recorded of.
        whole: files that were compared as a whole: blobs of the Hugging Face cache with their name, archives with the
            checksums they hold.
        nbytes: bytes that were compared: of those files all, of the others those of the verified tensors.
    """

    path: str
    verified: tuple[str, ...] = ()
    unrecorded: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    nbytes: int = 0
