"""What a module is made of, without the module: `ModuleSpec` and its parts."""

from collections.abc import Iterable
from typing import Any, Literal

from attrs import field, frozen

from funcmodel.records.devices import Device
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import TensorSpec

ParamKind = Literal["parameter", "buffer", "extra_state"]


def _texts(value: Iterable[str]) -> tuple[str, ...]:
    return tuple(value)


@frozen(kw_only=True)
class ParamSpec:
    """One leaf of a module.

    Attributes:
        spec: shape and dtype.
        kind: parameter, buffer, or a tensor that the module's `get_extra_state` returns.
        device: where the tensor is; None means meta.
        persistent: False for a buffer that the state dict leaves out; it still has an origin in every plan.
        requires_grad: kept when the leaf is assigned.
        random_seed: the seed of `skeleton` for a buffer whose value was drawn at random, else None.
    """

    spec: TensorSpec
    kind: ParamKind = "parameter"
    device: Device | None = None
    persistent: bool = True
    requires_grad: bool = True
    random_seed: int | None = None


@frozen
class SubmoduleSpec:
    """One submodule.

    Attributes:
        cls: class name.
        init: how its own leaves can be drawn again: its `reset_parameters`, the root's `_init_weights`, or not at all.
    """

    cls: str
    init: Literal["reset_parameters", "_init_weights"] | None = None


@frozen
class TiedGroup:
    """Keys that are one tensor; the first is canonical.

    Attributes:
        keys: in module order, at least two.
        by: "identity" where the leaves are one object, "storage" where different objects cover the same elements.
    """

    keys: tuple[str, ...] = field(converter=_texts)
    by: Literal["identity", "storage"] = "identity"


@frozen
class ViewSpec:
    """A leaf that is a strided view into part of another leaf's storage.

    Attributes:
        of: key of the leaf that holds the elements.
        stride: in elements of that leaf.
        offset: in elements, from the first element of that leaf.
    """

    of: str
    stride: tuple[int, ...]
    offset: int


@frozen(kw_only=True)
class Traits:
    """Facts about a model that its class may declare; arguments of the caller win over class attributes.

    Attributes:
        base_prefix: name of the submodule that holds the base model ("bert", "model"), "" for none.
        no_split: class names of blocks that one device must hold whole.
        ignore_missing: templates of keys whose absence is no finding.
        ignore_unexpected: templates of keys whose presence is no finding.
        keep_in_fp32: parts of names that stay float32 under a cast to half precision.
    """

    base_prefix: str = ""
    no_split: tuple[str, ...] = field(default=(), converter=_texts)
    ignore_missing: tuple[str, ...] = field(default=(), converter=_texts)
    ignore_unexpected: tuple[str, ...] = field(default=(), converter=_texts)
    keep_in_fp32: tuple[str, ...] = field(default=(), converter=_texts)


def _groups(value: Iterable[TiedGroup]) -> tuple[TiedGroup, ...]:
    return tuple(value)


def _frozen(value: Any) -> FrozenMap[str, Any]:
    return value if isinstance(value, FrozenMap) else FrozenMap(value)


@frozen(kw_only=True, repr=False)
class ModuleSpec:
    """A module as data: every leaf under every name it has, in module order.

    Attributes:
        name: class name, for messages.
        params: name to leaf; a tensor with two names stands under both.
        modules: name to submodule, the root under "".
        tied: alias classes.
        views: leaves that are part of another leaf's storage, by name.
        opaque: names of extra state that is no tensor.
        traits: what the class declares.
    """

    name: str
    params: FrozenMap[str, ParamSpec] = field(converter=_frozen)
    modules: FrozenMap[str, SubmoduleSpec] = field(default=FrozenMap(), converter=_frozen)
    tied: tuple[TiedGroup, ...] = field(default=(), converter=_groups)
    views: FrozenMap[str, ViewSpec] = field(default=FrozenMap(), converter=_frozen)
    opaque: tuple[str, ...] = field(default=(), converter=_texts)
    traits: Traits = Traits()

    def __repr__(self) -> str:
        return (
            f"<ModuleSpec {self.name}: {len(self.params)} leaves, {len(self.modules)} modules, {len(self.tied)} tied>"
        )
