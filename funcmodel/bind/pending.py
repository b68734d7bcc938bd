"""Values that are written down instead of computed: logs of steps on a storage, and their replay.

A tensor whose value is only written down is *pending*: its storage has addresses and, until its log is replayed, no
memory behind them. A log is a chain, so that a copy of a pending tensor shares what came before. Every random step
carries a seed of its own: a value does not depend on when, or whether, other steps are replayed.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from attrs import define, frozen
from torch.multiprocessing.reductions import StorageWeakRef

_CAPTURED_MOST: Final = 1 << 20  # bytes of other tensors' values that the log of one pending tensor may hold
_STEPS_MOST: Final = 256  # steps that one replay may take, those of copied logs included


class UnrecordableError(Exception):
    """This step is to be performed, not written down."""


@frozen(eq=False)
class Place:
    """A strided view of a storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def over(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The view, over `storage`."""
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


@frozen(eq=False)
class Copied:
    """The value that another pending storage had when the step was written down."""

    log: "Log | None"
    nbytes: int
    place: Place


@frozen(eq=False)
class Log:
    """One step, after `before`: call `op`; `into` receives its result, None where it writes itself.

    Attributes:
        steps: how many steps a replay takes.
        captured: bytes of tensors that the steps hold.
        random: whether a step draws.
    """

    before: "Log | None"
    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    into: Place | None
    seed: int | None
    steps: int
    captured: int
    random: bool


@define(eq=False)
class Pending:
    """A storage and what has been written down for it; the reference is weak, an unused storage is freed as ever."""

    weak: StorageWeakRef
    nbytes: int
    log: Log | None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Pending":
        """Nothing written down yet for the storage of `tensor`."""
        storage = tensor.untyped_storage()
        return cls(weak_reference(storage), storage.nbytes(), None)


def weak_reference(storage: torch.UntypedStorage) -> StorageWeakRef:
    """A reference that keeps the identity of a storage, so that none takes its address, and not its memory."""
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def is_expired(reference: StorageWeakRef) -> bool:
    """Whether nothing uses the storage any more."""
    return bool(reference.expired())  # type: ignore[no-untyped-call]


def place_of(tensor: torch.Tensor) -> Place:
    """Where a tensor lies in its storage."""
    return Place(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments and in lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def is_odd(tensor: torch.Tensor) -> bool:
    """Whether a strided view of the storage does not say all about the tensor."""
    return (
        tensor.layout is not torch.strided
        or tensor.is_quantized
        or tensor.is_conj()
        or tensor.is_neg()
        or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    )


def step(
    target: Pending,
    op: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    find: Callable[[torch.Tensor], Pending | None],
    is_random: Callable[[torch.Tensor], bool],
    seed: int | None = None,
    into: Place | None = None,
) -> Log:
    """The log of `target` with one more step.

    Args:
        target: the storage that the step writes.
        op: what the step calls.
        args: its arguments; tensors are replaced by places, by copies of logs, or by copies of their values.
        kwargs: likewise.
        find: what is pending of a tensor.
        is_random: whether a tensor's value goes back to a draw.
        seed: of the generator that the step receives.
        into: where the result goes.

    Raises:
        UnrecordableError: the step would hold too much, take too long, or uses what cannot be kept.
    """
    before = target.log
    steps, captured = (before.steps, before.captured) if before else (0, 0)
    random = seed is not None or (before is not None and before.random)

    def kept(value: Any) -> Any:
        nonlocal steps, captured, random
        if isinstance(value, torch.Generator) or (isinstance(value, (list, tuple)) and any(map(_is_tensor, value))):
            raise UnrecordableError
        if not isinstance(value, torch.Tensor):
            return value
        other = find(value)
        random = random or is_random(value)
        if other is target:
            return place_of(value)
        if other is not None:
            steps += other.log.steps if other.log else 0
            captured += other.log.captured if other.log else 0
            return Copied(other.log, other.nbytes, place_of(value))
        captured += value.numel() * value.dtype.itemsize
        if is_odd(value) or value.device.type != "cpu" or captured > _CAPTURED_MOST:
            raise UnrecordableError
        return value.clone()

    positional = tuple(map(kept, args))
    named = {k: kept(v) for k, v in kwargs.items() if k != "generator" or v is not None}
    if steps >= _STEPS_MOST or captured > _CAPTURED_MOST:
        raise UnrecordableError
    return Log(before, op, positional, named, into, seed, steps + 1, captured, random)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def replay(log: Log | None, storage: torch.UntypedStorage) -> None:
    """Carry the steps of `log` out on `storage`, oldest first."""
    chain: list[Log] = []
    while log is not None:
        chain.append(log)
        log = log.before
    for link in reversed(chain):
        args = [_revived(value, storage) for value in link.args]
        kwargs = {k: _revived(value, storage) for k, value in link.kwargs.items()}
        if link.seed is not None:
            kwargs["generator"] = torch.Generator().manual_seed(link.seed)
        result = link.op(*args, **kwargs)
        if link.into is not None:
            link.into.over(storage).copy_(result)


def _revived(value: Any, storage: torch.UntypedStorage) -> Any:
    if isinstance(value, Place):
        return value.over(storage)
    if isinstance(value, Copied):
        other = torch.UntypedStorage(value.nbytes)  # type: ignore[no-untyped-call]
        replay(value.log, other)
        return value.place.over(other)
    return value
