"""The plans: `StateDictPlan`, `ShardPlan`, `LoadPlan`, `SavePlan`. A plan is a value; `apply` is what happens."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from attrs import field, frozen

from funcmodel.records.actions import LoadAction, SaveAction
from funcmodel.records.devices import Device
from funcmodel.records.expressions import Expr
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.reports import LoadReport
from funcmodel.records.routes import Routing


def _entries(value: Any) -> FrozenMap[str, Expr]:
    return value if isinstance(value, FrozenMap) else FrozenMap(value)


def _tuple(value: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(value)


@frozen(repr=False)
class StateDictPlan(Mapping[str, Expr]):
    """A state dict whose values are expressions instead of tensors: key -> what the tensor will be.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> from funcmodel.records.tensors import TensorSpec
        >>> plan = StateDictPlan({"w": Live("w", TensorSpec([2], "float32"))})
        >>> plan, list(plan)
        (<StateDictPlan: 1 key>, ['w'])
    """

    entries: FrozenMap[str, Expr] = field(default=FrozenMap(), converter=_entries)

    def __getitem__(self, key: str) -> Expr:
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def keys(self) -> Any:
        """The keys, in order."""
        return self.entries.keys()

    def values(self) -> Any:
        """The expressions, in order."""
        return self.entries.values()

    def items(self) -> Any:
        """Pairs of key and expression, in order."""
        return self.entries.items()

    def __repr__(self) -> str:
        return f"<StateDictPlan: {len(self)} key{'s' * (len(self) != 1)}>"


@frozen
class ShardPlan:
    """Which key goes to which file.

    Attributes:
        files: file name to its keys, both in order.
        sizes: bytes of tensor data per file name.
    """

    files: FrozenMap[str, tuple[str, ...]]
    sizes: FrozenMap[str, int]


@frozen(repr=False)
class LoadPlan:
    """What loading a module will do, action by action, and what was found while planning it.

    Attributes:
        actions: in the order in which they happen.
        report: what was found.
        name: the module's class name, for messages.
        source: the files read, as short text, for messages; empty unless something was found.
        replaced: bytes per device of the module's present tensors, which stay until the new ones take their place.
        routing: which way every tensor takes; None leaves the choice to the moment when the plan is applied.
    """

    actions: tuple[LoadAction, ...] = field(default=(), converter=_tuple)
    report: LoadReport = LoadReport()
    name: str = ""
    source: str = ""
    replaced: FrozenMap[Device, int] = FrozenMap()
    routing: Routing | None = None

    def __repr__(self) -> str:
        r = self.report
        found = (("missing", r.missing_keys), ("unexpected", r.unexpected_keys), ("mismatched", r.mismatched_keys))
        notes = "".join(f", {len(keys)} {word}" for word, keys in found if keys)
        return f"<LoadPlan: {len(self.actions)} actions{notes}>"


@frozen(repr=False)
class SavePlan:
    """What saving a checkpoint will do, action by action."""

    actions: tuple[SaveAction, ...] = field(default=(), converter=_tuple)

    def __repr__(self) -> str:
        return f"<SavePlan: {len(self.actions)} actions>"
