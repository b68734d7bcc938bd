"""Plans and specs as text: a header, then one row per kind of thing, keys folded."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, NamedTuple, TypeAlias, assert_never

from funcmodel._toolz import groupby
from funcmodel.core.shapes import spec_of
from funcmodel.plan.casting import casts
from funcmodel.plan.diff import Change, Diff
from funcmodel.plan.findings import listed
from funcmodel.plan.folding import fold as fold
from funcmodel.plan.folding import fold_paths, folder
from funcmodel.plan.queries import cost, footprint, nbytes
from funcmodel.records.actions import Assign, Initialize, Move, Offload, Publish, Tie, WriteIndex, WriteShard, WriteText
from funcmodel.records.checkpoint import CheckpointSpec
from funcmodel.records.devices import Device
from funcmodel.records.expressions import Expr
from funcmodel.records.module import ModuleSpec
from funcmodel.records.plans import LoadPlan, SavePlan, StateDictPlan
from funcmodel.records.reports import Cost, LoadReport, VerifyReport
from funcmodel.records.routes import Routing
from funcmodel.records.tensors import TensorSpec, format_size

Described: TypeAlias = LoadPlan | SavePlan | StateDictPlan | Routing | CheckpointSpec | ModuleSpec | Diff | VerifyReport
Shorten: TypeAlias = Callable[[Iterable[str]], tuple[str, ...]]
_HEADER: Final = 56  # column of the counts in the first line
_SHARDS: Final = 8
_WIDTH: Final = 110


class _Row(NamedTuple):
    """One line: a label, a count of keys or a size in bytes as text, and the rest."""

    label: str
    amount: int | str
    text: str


def describe(of: Described) -> str:
    """A plan or a spec as text, for people: complete, except that long lists are counted at their end.

    Args:
        of: a plan, the routes of one, a checkpoint's or a module's spec, a `Diff`, or what `verify` found.

    Example:
        >>> from funcmodel.records.expressions import FileRef, Read
        >>> ref = FileRef("ckpt/model.safetensors", "safetensors", 4200, "")
        >>> weight = TensorSpec([2, 4], "bfloat16")
        >>> plan = StateDictPlan({f"layers.{i}.w": Read(ref, f"layers.{i}.w", weight, 4096 + 16 * i) for i in range(4)})
        >>> print(describe(plan))
        state dict                                              4 keys, 64 B
          read   4   layers.{0...3}.w
          dtype  4   bfloat16
          bytes  64 B   ckpt/model.safetensors
    """
    match of:
        case LoadPlan():
            return _load(of)
        case SavePlan():
            return _save(of)
        case StateDictPlan():
            return _state_dict(of)
        case Routing():
            return _routing(of)
        case CheckpointSpec():
            return _checkpoint(of)
        case ModuleSpec():
            return _module(of)
        case Diff():
            return _diff(of)
        case VerifyReport():
            return _verified(of)
        case _:
            assert_never(of)


def _table(title: str, keys: int, size: int | None, rows: Iterable[_Row]) -> str:
    shown = list(rows)
    label = max((len(row.label) for row in shown), default=0)
    width = max((len(str(row.amount)) for row in shown if isinstance(row.amount, int)), default=0)
    long = max((len(row.amount) for row in shown if isinstance(row.amount, str)), default=0)
    facts = f"{keys} key{'s' * (keys != 1)}" + ("" if size is None else f", {format_size(size)}")
    lines = [f"{title:<{_HEADER - 1}} {facts}"]
    for row in shown:
        count = f"{row.amount:>{width}}" if isinstance(row.amount, int) else row.amount.ljust(long)
        start = f"  {row.label:<{label}}  {count}   "
        lines += _wrapped(start, row.text)
    return "\n".join(lines)


def _wrapped(start: str, text: str) -> list[str]:
    """A row, broken behind commas where it grows too long; a name is never broken, nor what stands in braces."""
    lines, item = [start], ""
    for part in text.split(", "):
        item = f"{item}, {part}" if item else part
        if item.count("{") > item.count("}"):
            continue
        if lines[-1] == start:
            lines[-1] += item
        elif len(lines[-1]) + len(item) + 2 <= _WIDTH:
            lines[-1] += f", {item}"
        else:
            lines[-1] += ","
            lines.append(" " * len(start) + item)
        item = ""
    return [line.rstrip() for line in (*lines, *([item] if item else []))]


def _keys(label: str, keys: Collection[str], note: str = "", shorten: Shorten = fold) -> list[_Row]:
    """A row of folded keys, or none."""
    return [_Row(label, len(keys), listed(shorten(keys)) + note)] if keys else []


def _grouped(label: str, entries: Iterable[tuple[str, str]], shorten: Shorten = fold) -> list[_Row]:
    """One row per note of `(key, note)`, the note behind the keys."""
    groups = groupby(_second, entries)
    return [row for note, pairs in groups.items() for row in _keys(label, [k for k, _ in pairs], note, shorten)]


def _second(pair: tuple[str, str]) -> str:
    return pair[1]


def _dtypes(specs: Iterable[TensorSpec]) -> list[_Row]:
    groups = groupby(lambda spec: spec.dtype.name, specs)
    return [_Row("dtype", len(members), name) for name, members in groups.items()]


def _files(label: str, read: Mapping[str, int]) -> list[_Row]:
    """One row per folder, its file names folded."""
    folders = groupby(lambda path: path.rpartition("/")[0], read)
    return [
        _Row(label, format_size(sum(read[p] for p in paths)), listed(fold_paths(paths))) for paths in folders.values()
    ]


def _memory(found: Cost) -> list[_Row]:
    devices = dict.fromkeys((*found.held, *found.peak))
    beside = (("borrow", found.borrowed, "pages of files"), ("buffer", found.buffers, ""), ("pin", found.pinned, ""))

    def text(device: Device) -> str:
        peak = found.peak.get(device, 0)
        return f"{device!r:<13}" + (f"  peak {format_size(peak)}" if peak else "")

    held = [_Row("hold", format_size(found.held.get(device, 0)), text(device)) for device in devices]
    return held + [_Row(label, format_size(size), note) for label, size, note in beside if size]


# -- one function per record -------------------------------------------------------------------------------------------


def _load(plan: LoadPlan) -> str:
    assigned: dict[str, Expr] = {}
    offloaded: dict[str, Expr] = {}
    ties: dict[str, str] = {}
    drawn: list[tuple[str, str]] = []
    moved: list[str] = []
    for action in plan.actions:
        match action:
            case Assign(key, expr):
                assigned[key] = expr
            case Offload(key, expr):
                offloaded[key] = expr
            case Tie(key, to, rival):
                ties[key] = to if rival is None else f"{to} (must equal what the source holds for both)"
            case Initialize(_, keys, how):
                drawn += ((key, f"   {how or 'by nothing known'}") for key in keys)
            case Move(key):
                moved.append(key)
            case _:
                assert_never(action)
    everything = [*assigned, *offloaded, *ties, *(key for key, _ in drawn), *moved]
    shorten = folder(everything)
    found = cost(plan)
    copied = {action.key for action in plan.actions if isinstance(action, Offload) and action.copy}
    rows = [
        *_keys("assign", assigned, shorten=shorten),
        *_grouped("offload", ((k, "   copied to disk" if k in copied else "   in place") for k in offloaded), shorten),
        *([_Row("tie", len(ties), listed(f"{key} = {to}" for key, to in ties.items()))] if ties else []),
        *_grouped("init", drawn, shorten),
        *_keys("keep", moved, "   not in the state dict", shorten),
        *_grouped("cast", _casts({**assigned, **offloaded}), shorten),
        *_report(plan.report, folder({*everything, *plan.report.unexpected_keys, *plan.report.skipped_keys})),
        *([] if plan.routing is None else _routes(plan.routing, shorten)),
        *_files("read", found.read),
        *_memory(found),
    ]
    size = sum(found.held.values()) + found.borrowed + nbytes({k: e for k, e in offloaded.items() if k not in copied})
    return _table(f"load {plan.name}".rstrip(), len(everything), size, rows)


def _routes(found: Routing, shorten: Shorten) -> list[_Row]:
    """One row per route, and one per group of files that are read in another way than by calls through the cache."""
    ways = (
        ("mapped", found.mapped, "what is computed comes out of a mapping"),
        ("sliced", found.sliced, "slices of small runs come out of a mapping"),
        ("direct", found.direct, "past the page cache"),
    )
    return [
        *_grouped("route", ((key, f"   {route}") for key, route in found.routes.items()), shorten),
        *(_Row(name, len(paths), f"{listed(fold_paths(paths))}   {how}") for name, paths, how in ways if paths),
    ]


def _routing(found: Routing) -> str:
    kind = "pinned buffers" if found.pinned else "buffers"
    buffers = [_Row(kind, found.buffers, f"{format_size(found.buffer)} each")] if found.buffers else []
    rows = [*_routes(found, folder(found.routes)), _Row("threads", found.threads, "that read"), *buffers]
    return _table(f"routes into {found.into} memory", len(found.routes), None, rows)


def _casts(plan: Mapping[str, Expr]) -> Iterable[tuple[str, str]]:
    return ((key, f"   to {spec_of(plan[key]).dtype}, {loss}") for key, loss in casts(plan).items())


def _report(report: LoadReport, shorten: Shorten) -> list[_Row]:
    kept = ((c.key, f"   {c.found}, the module has {c.expected}") for c in report.dtype_changes if not c.cast)
    shapes = ((m.key, f"   expected {m.expected}, found {m.found}") for m in report.mismatched_keys)
    return [
        *_grouped("dtype", kept, shorten),
        *_keys("missing", report.missing_keys, shorten=shorten),
        *_keys("unexpected", report.unexpected_keys, shorten=shorten),
        *_grouped("mismatched", shapes, shorten),
        *_keys("skipped", report.skipped_keys, shorten=shorten),
        *_keys("no value", report.meta_keys, shorten=shorten),
    ]


def _save(plan: SavePlan) -> str:
    found = cost(plan)
    shards = [action for action in plan.actions if isinstance(action, WriteShard)]
    rows = []
    everything = [key for shard in shards for key in shard.entries]
    shorten = folder(everything)
    for shard in shards:
        text = f"{shard.file}   {format_size(found.written[shard.file])}   {listed(shorten(shard.entries), at_most=4)}"
        rows.append(_Row("shard", len(shard.entries), text))
    if len(rows) > _SHARDS:
        more = rows[_SHARDS:]
        rows = [*rows[:_SHARDS], _Row("shard", sum(int(row.amount) for row in more), f"in {len(more)} more files")]
    hashed = [shard for shard in shards if shard.digests != "none"]
    rows += [_Row("digest", sum(len(s.entries) for s in hashed), "sha256, in the metadata")] if hashed else []
    for action in plan.actions:
        match action:
            case WriteIndex(file, weight_map):
                rows.append(_Row("index", len(weight_map), file))
            case WriteText(file, text):
                rows.append(_Row("text", format_size(found.written[file]), file))
            case Publish(_, commit, removes):
                rows.append(_Row("commit", "", commit))
                rows += [_Row("remove", len(removes), listed(fold_paths(removes)))] if removes else []
            case WriteShard():
                pass
            case _:
                assert_never(action)
    rows += _grouped("cast", (pair for shard in shards for pair in _casts(shard.entries)), shorten)
    rows += _files("read", found.read)
    rows += [_Row("peak", format_size(size), repr(device)) for device, size in found.peak.items()]
    count = len(found.written)
    size = sum(nbytes(shard.entries) for shard in shards)
    return _table(f"save {count} file{'s' * (count != 1)}", len(everything), size, rows)


def _state_dict(plan: StateDictPlan) -> str:
    shorten = folder(plan)
    forms: dict[str, list[str]] = groupby(lambda key: type(plan[key]).__name__.lower(), plan)
    rows = [
        *(row for form, keys in forms.items() for row in _keys(form, keys, shorten=shorten)),
        *_grouped("casts", _casts(plan), shorten),
        *_dtypes(map(spec_of, plan.values())),
        *_files("bytes", cost(plan).read),
    ]
    return _table("state dict", len(plan), nbytes(plan), rows)


def _checkpoint(spec: CheckpointSpec) -> str:
    rows = []
    specs = []
    shorten = folder([key for file in spec.files for key in file.tensors])
    for file in spec.files:
        stored = [tensor.spec for tensor in file.tensors.values()]
        specs += stored
        size = sum(tensor.nbytes for tensor in stored)
        rows.append(
            _Row("file", len(stored), f"{file.path}   {format_size(size)}   {listed(shorten(file.tensors), at_most=4)}")
        )
    if len(rows) > _SHARDS:
        more = rows[_SHARDS:]
        rows = [*rows[:_SHARDS], _Row("file", sum(int(row.amount) for row in more), f"in {len(more)} more files")]
    if spec.index is not None:
        rows.append(_Row("index", len(spec.index.weight_map), spec.index.path))
    rows += _dtypes(specs)
    if spec.variant is not None:
        rows.append(_Row("variant", "", spec.variant))
    if spec.config is not None:
        rows.append(_Row("config", "", spec.config.model_type or "of no named type"))
    if spec.ignored:
        rows.append(_Row("ignored", len(spec.ignored), listed(fold_paths(spec.ignored))))
    if spec.digests:
        rows.append(_Row("digests", len(spec.digests), listed(fold_paths(spec.digests))))
    return _table(f"checkpoint {spec.path}", len(specs), sum(s.nbytes for s in specs), rows)


def _module(spec: ModuleSpec) -> str:
    ties = {key: group.keys[0] for group in spec.tied for key in group.keys[1:]}
    leaf = spec.params
    shorten = folder(leaf)
    kinds = groupby(lambda key: leaf[key].kind.replace("_", " "), leaf)
    places: dict[str, list[str]] = groupby(lambda key: repr(leaf[key].device or Device("meta")), leaf)
    rows = [
        *(row for kind, keys in kinds.items() for row in _keys(kind, keys, shorten=shorten)),
        *_keys("unsaved", [k for k, p in leaf.items() if not p.persistent], "   not in the state dict", shorten),
        *_keys(
            "frozen", [k for k, p in leaf.items() if p.kind == "parameter" and not p.requires_grad], shorten=shorten
        ),
        *_keys("extra state", spec.opaque, "   no tensor"),
        *([_Row("tie", len(ties), listed(f"{key} = {to}" for key, to in ties.items()))] if ties else []),
        *_grouped("view", ((key, f"   into {view.of}") for key, view in spec.views.items())),
        *_dtypes(p.spec for p in leaf.values()),
        *(_Row("on", len(keys), place) for place, keys in places.items()),
    ]
    return _table(f"module {spec.name}", len(leaf) + len(spec.opaque), footprint(spec), rows)


def _diff(found: Diff) -> str:
    def change(of: Change) -> str:
        if of.what == "expression":
            return f"   {of.after}, another expression"
        return f"   {of.before} became {of.after}"

    rows = [
        *_keys("added", found.added),
        *_keys("removed", found.removed),
        *_grouped("changed", ((c.key, change(c)) for c in found.changed)),
        *_keys("moved", found.moved),
        *([_Row("same", found.unchanged, "")] if found.unchanged else []),
    ]
    return _table(
        "difference", len(found.added) + len(found.removed) + len(found.changed) + len(found.moved), None, rows
    )


def _verified(found: VerifyReport) -> str:
    shorten = folder([*found.verified, *found.unrecorded])
    rows = [
        *_keys("as recorded", found.verified, shorten=shorten),
        *_keys("unrecorded", found.unrecorded, "   no digest to compare with", shorten),
        *([_Row("whole file", len(found.whole), listed(fold_paths(found.whole)))] if found.whole else []),
    ]
    return _table(f"verify {found.path}", len(found.verified) + len(found.unrecorded), found.nbytes, rows)
