"""What differs between two plans, or between two checkpoints."""

from typing import Literal, TypeAlias

from attrs import frozen

from funcmodel.core.shapes import spec_of
from funcmodel.records.checkpoint import CheckpointSpec
from funcmodel.records.expressions import Expr, FileRef, Read
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec

What: TypeAlias = Literal["shape", "dtype", "expression"]


@frozen
class Change:
    """A key that both sides have, as different tensors.

    Attributes:
        key: the key.
        what: the first of shape, dtype and expression that differs.
        before: what it was.
        after: what it is.
    """

    key: str
    what: What
    before: TensorSpec
    after: TensorSpec


@frozen(kw_only=True)
class Diff:
    """What differs between a first and a second state dict. Keys are in the order of the side that has them.

    Attributes:
        added: keys of the second alone.
        removed: keys of the first alone.
        changed: keys of both whose shape, dtype or expression differs.
        moved: keys of both that are plainly stored tensors of one spec, in different places; whether their bytes are
            equal, nobody has read.
        unchanged: how many keys are the same.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[Change, ...] = ()
    moved: tuple[str, ...] = ()
    unchanged: int = 0


def diff(before: StateDictPlan | CheckpointSpec, after: StateDictPlan | CheckpointSpec) -> Diff:
    """What differs between two plans, or between two checkpoints.

    Two checkpoints are compared by their headers: the place of a tensor is the name of its file, so that two folders
    compare equal where each file holds the same tensors in the same order.

    Args:
        before: the first.
        after: the second.

    Returns:
        data; `describe` makes text of it.

    Example:
        >>> from funcmodel.records.expressions import Live
        >>> one, two = (Live("w", TensorSpec([2, n], "float32")) for n in (3, 4))
        >>> found = diff(StateDictPlan({"w": one, "a": one}), StateDictPlan({"w": two, "b": one}))
        >>> found.added, found.removed, found.changed
        (('b',), ('a',), (Change(key='w', what='shape', before=[2, 3] float32, after=[2, 4] float32),))
    """
    old, new = _entries(before), _entries(after)
    changed: list[Change] = []
    moved: list[str] = []
    unchanged = 0
    for key, expr in new.items():
        if key not in old:
            continue
        was = old[key]
        # Identity first: a plan made from another one shares most of its nodes.
        if was is expr or was == expr:
            unchanged += 1
            continue
        spec, earlier = spec_of(expr), spec_of(was)
        if spec == earlier and isinstance(was, Read) and isinstance(expr, Read):
            moved.append(key)
            continue
        what: What = "shape" if spec.shape != earlier.shape else "dtype" if spec != earlier else "expression"
        changed.append(Change(key, what, earlier, spec))
    return Diff(
        added=tuple(key for key in new if key not in old),
        removed=tuple(key for key in old if key not in new),
        changed=tuple(changed),
        moved=tuple(moved),
        unchanged=unchanged,
    )


def _entries(side: StateDictPlan | CheckpointSpec) -> dict[str, Expr]:
    if isinstance(side, StateDictPlan):
        return dict(side.items())
    entries: dict[str, Expr] = {}
    for file in side.files:
        ref = FileRef(file.path.rpartition("/")[2], file.format, 0, "")
        # Where the data begins depends on the length of the header, which metadata alone can change.
        base = min((stored.start for stored in file.tensors.values()), default=0)
        entries |= {name: Read(ref, name, stored.spec, stored.start - base) for name, stored in file.tensors.items()}
    return entries
