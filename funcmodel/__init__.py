"""funcmodel: the weights of any `nn.Module`, as pure functions on frozen records.

Plans are values. Planning is arithmetic. Applying is the only thing that happens.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0"

if TYPE_CHECKING:
    from funcmodel._toolz import compose_left as compose_left
    from funcmodel._toolz import pipe as pipe
    from funcmodel.api import apply as apply
    from funcmodel.api import load as load
    from funcmodel.api import save as save
    from funcmodel.bind.assign import assign as assign
    from funcmodel.bind.assign import probed as probed
    from funcmodel.bind.initialize import initialize as initialize
    from funcmodel.bind.inspect import live_tensors as live_tensors
    from funcmodel.bind.inspect import module_spec as module_spec
    from funcmodel.bind.skeleton import skeleton as skeleton
    from funcmodel.core import build as expr
    from funcmodel.core.shapes import spec_of as spec_of
    from funcmodel.core.wire import Limits as Limits
    from funcmodel.core.wire import parse_config as parse_config
    from funcmodel.core.wire import render_config as render_config
    from funcmodel.errors import ActionError as ActionError
    from funcmodel.errors import AmbiguousCheckpointError as AmbiguousCheckpointError
    from funcmodel.errors import ApplyError as ApplyError
    from funcmodel.errors import BusyError as BusyError
    from funcmodel.errors import ChangedError as ChangedError
    from funcmodel.errors import CheckpointError as CheckpointError
    from funcmodel.errors import DigestError as DigestError
    from funcmodel.errors import FuncmodelError as FuncmodelError
    from funcmodel.errors import HeaderError as HeaderError
    from funcmodel.errors import IndexMismatchError as IndexMismatchError
    from funcmodel.errors import KeyMismatchError as KeyMismatchError
    from funcmodel.errors import NoMemoryError as NoMemoryError
    from funcmodel.errors import NoSpaceError as NoSpaceError
    from funcmodel.errors import PlacementError as PlacementError
    from funcmodel.errors import PlanError as PlanError
    from funcmodel.errors import RuleError as RuleError
    from funcmodel.errors import SaveError as SaveError
    from funcmodel.errors import ShapeError as ShapeError
    from funcmodel.errors import StalePlanError as StalePlanError
    from funcmodel.errors import TemplateError as TemplateError
    from funcmodel.errors import TieConflictError as TieConflictError
    from funcmodel.errors import TruncatedError as TruncatedError
    from funcmodel.errors import UnknownFormatError as UnknownFormatError
    from funcmodel.errors import UnsafePathError as UnsafePathError
    from funcmodel.plan.casting import cast as cast
    from funcmodel.plan.casting import casts as casts
    from funcmodel.plan.casting import like as like
    from funcmodel.plan.codec import from_json as from_json
    from funcmodel.plan.codec import to_json as to_json
    from funcmodel.plan.convert import convert as convert
    from funcmodel.plan.convert import inverse as inverse
    from funcmodel.plan.convert import invert as invert
    from funcmodel.plan.convert import unmatched as unmatched
    from funcmodel.plan.describe import describe as describe
    from funcmodel.plan.describe import fold as fold
    from funcmodel.plan.diff import Diff as Diff
    from funcmodel.plan.diff import diff as diff
    from funcmodel.plan.loading import checked as checked
    from funcmodel.plan.loading import plan_load as plan_load
    from funcmodel.plan.origins import origins as origins
    from funcmodel.plan.parallel import chunk as chunk
    from funcmodel.plan.parallel import tp_slice as tp_slice
    from funcmodel.plan.prefixes import Alignment as Alignment
    from funcmodel.plan.prefixes import aligned as aligned
    from funcmodel.plan.prefixes import alignment as alignment
    from funcmodel.plan.queries import cost as cost
    from funcmodel.plan.queries import footprint as footprint
    from funcmodel.plan.queries import nbytes as nbytes
    from funcmodel.plan.queries import num_parameters as num_parameters
    from funcmodel.plan.resize import Normal as Normal
    from funcmodel.plan.resize import resize_rows as resize_rows
    from funcmodel.plan.resize import resized as resized
    from funcmodel.plan.restored import restored as restored
    from funcmodel.plan.routing import routed as routed
    from funcmodel.plan.routing import routing as routing
    from funcmodel.plan.saving import live_plan as live_plan
    from funcmodel.plan.saving import plan_save as plan_save
    from funcmodel.plan.sharding import plan_shards as plan_shards
    from funcmodel.plan.ties import canonical as canonical
    from funcmodel.plan.ties import dedupe as dedupe
    from funcmodel.plan.ties import recorded as recorded
    from funcmodel.plan.ties import spread as spread
    from funcmodel.plan.transforms import Transform as Transform
    from funcmodel.plan.transforms import at as at
    from funcmodel.plan.transforms import combine as combine
    from funcmodel.plan.transforms import drop as drop
    from funcmodel.plan.transforms import keep as keep
    from funcmodel.plan.transforms import overlay as overlay
    from funcmodel.plan.transforms import take as take
    from funcmodel.records.actions import Assign as Assign
    from funcmodel.records.actions import Initialize as Initialize
    from funcmodel.records.actions import LoadAction as LoadAction
    from funcmodel.records.actions import Move as Move
    from funcmodel.records.actions import Offload as Offload
    from funcmodel.records.actions import Publish as Publish
    from funcmodel.records.actions import SaveAction as SaveAction
    from funcmodel.records.actions import Tie as Tie
    from funcmodel.records.actions import WriteIndex as WriteIndex
    from funcmodel.records.actions import WriteShard as WriteShard
    from funcmodel.records.actions import WriteText as WriteText
    from funcmodel.records.checkpoint import CheckpointSpec as CheckpointSpec
    from funcmodel.records.checkpoint import FileSpec as FileSpec
    from funcmodel.records.checkpoint import IndexSpec as IndexSpec
    from funcmodel.records.checkpoint import StoredTensor as StoredTensor
    from funcmodel.records.checkpoint import StoredView as StoredView
    from funcmodel.records.config import Config as Config
    from funcmodel.records.devices import Budget as Budget
    from funcmodel.records.devices import Device as Device
    from funcmodel.records.devices import DeviceMap as DeviceMap
    from funcmodel.records.devices import device as device
    from funcmodel.records.devices import device_map as device_map
    from funcmodel.records.dtypes import DType as DType
    from funcmodel.records.dtypes import dtype as dtype
    from funcmodel.records.expressions import Call as Call
    from funcmodel.records.expressions import Cast as Cast
    from funcmodel.records.expressions import Concat as Concat
    from funcmodel.records.expressions import Expr as Expr
    from funcmodel.records.expressions import FileRef as FileRef
    from funcmodel.records.expressions import Full as Full
    from funcmodel.records.expressions import Index as Index
    from funcmodel.records.expressions import Live as Live
    from funcmodel.records.expressions import Noise as Noise
    from funcmodel.records.expressions import Permute as Permute
    from funcmodel.records.expressions import Read as Read
    from funcmodel.records.expressions import Reshape as Reshape
    from funcmodel.records.expressions import Stack as Stack
    from funcmodel.records.expressions import Take as Take
    from funcmodel.records.mapping import FrozenMap as FrozenMap
    from funcmodel.records.mesh import Flat as Flat
    from funcmodel.records.mesh import Layout as Layout
    from funcmodel.records.mesh import LayoutMap as LayoutMap
    from funcmodel.records.mesh import Mesh as Mesh
    from funcmodel.records.mesh import Only as Only
    from funcmodel.records.mesh import Shard as Shard
    from funcmodel.records.module import ModuleSpec as ModuleSpec
    from funcmodel.records.module import ParamSpec as ParamSpec
    from funcmodel.records.module import SubmoduleSpec as SubmoduleSpec
    from funcmodel.records.module import TiedGroup as TiedGroup
    from funcmodel.records.module import Traits as Traits
    from funcmodel.records.module import ViewSpec as ViewSpec
    from funcmodel.records.plans import LoadPlan as LoadPlan
    from funcmodel.records.plans import SavePlan as SavePlan
    from funcmodel.records.plans import ShardPlan as ShardPlan
    from funcmodel.records.plans import StateDictPlan as StateDictPlan
    from funcmodel.records.reports import Cost as Cost
    from funcmodel.records.reports import Damage as Damage
    from funcmodel.records.reports import DtypeChange as DtypeChange
    from funcmodel.records.reports import LoadPolicy as LoadPolicy
    from funcmodel.records.reports import LoadReport as LoadReport
    from funcmodel.records.reports import Mismatch as Mismatch
    from funcmodel.records.reports import Origin as Origin
    from funcmodel.records.reports import VerifyReport as VerifyReport
    from funcmodel.records.reports import Waiver as Waiver
    from funcmodel.records.routes import Machine as Machine
    from funcmodel.records.routes import Routing as Routing
    from funcmodel.records.routes import Storage as Storage
    from funcmodel.records.rules import Merge as Merge
    from funcmodel.records.rules import Rename as Rename
    from funcmodel.records.rules import Rule as Rule
    from funcmodel.records.rules import Split as Split
    from funcmodel.records.rules import Stacked as Stacked
    from funcmodel.records.rules import Transpose as Transpose
    from funcmodel.records.rules import Unstacked as Unstacked
    from funcmodel.records.tensors import TensorSpec as TensorSpec
    from funcmodel.records.tensors import format_size as format_size
    from funcmodel.records.tensors import parse_size as parse_size
    from funcmodel.run.evaluate import fill as fill
    from funcmodel.run.evaluate import materialize as materialize
    from funcmodel.run.evaluate import stream as stream
    from funcmodel.run.existing import existing_checkpoint as existing_checkpoint
    from funcmodel.run.formats import FORMATS as FORMATS
    from funcmodel.run.formats import SAFETENSORS as SAFETENSORS
    from funcmodel.run.formats import TORCH_BIN as TORCH_BIN
    from funcmodel.run.formats import TORCH_PT as TORCH_PT
    from funcmodel.run.formats import TORCH_PTH as TORCH_PTH
    from funcmodel.run.formats import Format as Format
    from funcmodel.run.formats import torch_zip as torch_zip
    from funcmodel.run.legacy_torch import legacy_torch as legacy_torch
    from funcmodel.run.machine import machine as machine
    from funcmodel.run.scan import plan_of as plan_of
    from funcmodel.run.scan import scan as scan
    from funcmodel.run.scan import scan_checkpoint as scan_checkpoint
    from funcmodel.run.verify import record_digests as record_digests
    from funcmodel.run.verify import verify as verify
    from funcmodel.run.write import write as write

# Names are imported on first use, so that `import funcmodel` costs little and L0 to L2 work without torch.
_HOMES: Final = MappingProxyType(
    {
        "funcmodel._toolz": ("compose_left", "pipe"),
        "funcmodel.api": ("apply", "load", "save"),
        "funcmodel.bind.assign": ("assign", "probed"),
        "funcmodel.bind.initialize": ("initialize",),
        "funcmodel.bind.inspect": ("live_tensors", "module_spec"),
        "funcmodel.bind.skeleton": ("skeleton",),
        "funcmodel.core.shapes": ("spec_of",),
        "funcmodel.core.wire": ("Limits", "parse_config", "render_config"),
        "funcmodel.errors": (
            "ActionError",
            "AmbiguousCheckpointError",
            "ApplyError",
            "BusyError",
            "ChangedError",
            "CheckpointError",
            "DigestError",
            "FuncmodelError",
            "HeaderError",
            "IndexMismatchError",
            "KeyMismatchError",
            "NoMemoryError",
            "NoSpaceError",
            "PlacementError",
            "PlanError",
            "RuleError",
            "SaveError",
            "ShapeError",
            "StalePlanError",
            "TemplateError",
            "TieConflictError",
            "TruncatedError",
            "UnknownFormatError",
            "UnsafePathError",
        ),
        "funcmodel.plan.casting": ("cast", "casts", "like"),
        "funcmodel.plan.codec": ("from_json", "to_json"),
        "funcmodel.plan.convert": ("convert", "inverse", "invert", "unmatched"),
        "funcmodel.plan.describe": ("describe", "fold"),
        "funcmodel.plan.diff": ("Diff", "diff"),
        "funcmodel.plan.loading": ("checked", "plan_load"),
        "funcmodel.plan.origins": ("origins",),
        "funcmodel.plan.parallel": ("chunk", "tp_slice"),
        "funcmodel.plan.prefixes": ("Alignment", "aligned", "alignment"),
        "funcmodel.plan.queries": ("cost", "footprint", "nbytes", "num_parameters"),
        "funcmodel.plan.resize": ("Normal", "resize_rows", "resized"),
        "funcmodel.plan.restored": ("restored",),
        "funcmodel.plan.routing": ("routed", "routing"),
        "funcmodel.plan.saving": ("live_plan", "plan_save"),
        "funcmodel.plan.sharding": ("plan_shards",),
        "funcmodel.plan.ties": ("canonical", "dedupe", "recorded", "spread"),
        "funcmodel.plan.transforms": ("Transform", "at", "combine", "drop", "keep", "overlay", "take"),
        "funcmodel.records.actions": (
            "Assign",
            "Initialize",
            "LoadAction",
            "Move",
            "Offload",
            "Publish",
            "SaveAction",
            "Tie",
            "WriteIndex",
            "WriteShard",
            "WriteText",
        ),
        "funcmodel.records.checkpoint": ("CheckpointSpec", "FileSpec", "IndexSpec", "StoredTensor", "StoredView"),
        "funcmodel.records.config": ("Config",),
        "funcmodel.records.devices": ("Budget", "Device", "DeviceMap", "device", "device_map"),
        "funcmodel.records.dtypes": ("DType", "dtype"),
        "funcmodel.records.expressions": (
            "Call",
            "Cast",
            "Concat",
            "Expr",
            "FileRef",
            "Full",
            "Index",
            "Live",
            "Noise",
            "Permute",
            "Read",
            "Reshape",
            "Stack",
            "Take",
        ),
        "funcmodel.records.mapping": ("FrozenMap",),
        "funcmodel.records.mesh": ("Flat", "Layout", "LayoutMap", "Mesh", "Only", "Shard"),
        "funcmodel.records.module": ("ModuleSpec", "ParamSpec", "SubmoduleSpec", "TiedGroup", "Traits", "ViewSpec"),
        "funcmodel.records.plans": ("LoadPlan", "SavePlan", "ShardPlan", "StateDictPlan"),
        "funcmodel.records.reports": (
            "Cost",
            "Damage",
            "DtypeChange",
            "LoadPolicy",
            "LoadReport",
            "Mismatch",
            "Origin",
            "VerifyReport",
            "Waiver",
        ),
        "funcmodel.records.routes": ("Machine", "Routing", "Storage"),
        "funcmodel.records.rules": ("Merge", "Rename", "Rule", "Split", "Stacked", "Transpose", "Unstacked"),
        "funcmodel.records.tensors": ("TensorSpec", "format_size", "parse_size"),
        "funcmodel.run.evaluate": ("fill", "materialize", "stream"),
        "funcmodel.run.existing": ("existing_checkpoint",),
        "funcmodel.run.formats": (
            "FORMATS",
            "Format",
            "SAFETENSORS",
            "TORCH_BIN",
            "TORCH_PT",
            "TORCH_PTH",
            "torch_zip",
        ),
        "funcmodel.run.legacy_torch": ("legacy_torch",),
        "funcmodel.run.machine": ("machine",),
        "funcmodel.run.scan": ("plan_of", "scan", "scan_checkpoint"),
        "funcmodel.run.verify": ("record_digests", "verify"),
        "funcmodel.run.write": ("write",),
    }
)
_HOME_OF: Final = MappingProxyType({name: home for home, names in _HOMES.items() for name in names})
__all__ = ["__version__", "expr", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name == "expr":
        value: Any = import_module("funcmodel.core.build")
    elif name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module 'funcmodel' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
