"""The dispatch mode that writes initializers down instead of running them.

Nothing here is global: a mode lives on the calling thread's stack, random operations get generators of their own.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from inspect import signature
from math import prod
from threading import Lock
from typing import Any, Final

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from funcmodel.bind.pending import (
    Log,
    Pending,
    UnrecordableError,
    is_expired,
    is_odd,
    place_of,
    replay,
    step,
    tensors_in,
    weak_reference,
)

PENDING_FROM: Final = 1 << 20  # bytes; smaller tensors are computed at once, writing them down would cost more

# Creations: position of the size among the arguments, and the in-place operation that fills the memory.
_CREATED: Final[dict[str, str | None]] = {
    **{"empty": None, "empty_strided": None, "zeros": "zero_", "ones": "fill_", "full": "fill_"},
    **{"rand": "uniform_", "randn": "normal_"},
}
_COPIES: Final = {"clone", "_to_copy"}
_WRITERS: Final = {"copy_", "fill_", "zero_", "tril_", "triu_"}
_UNDECLARED_VIEWS: Final = {"_unsafe_view", "lift", "lift_fresh"}
_REALLOCATING: Final = {"resize_", "resize_as_"}
_GLOBAL_GENERATOR: Final = Lock()


def derived_seed(seed: int, label: str) -> int:
    """A 63-bit seed for `label` under the seed of a plan: BLAKE2b of both."""
    digest = blake2b(f"{seed}:{label}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class FrozenWriteError(Exception):
    """A write to a storage that must not be written; `key` names its tensor."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The dispatch mode. What it cannot write down exactly it performs, after replaying what that would read.

    Attributes:
        pending: storage (`_cdata`) to what is written down for it.
    """

    def __init__(self, seed: int, labels: Mapping[int, str], frozen: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pending: dict[int, Pending] = {}
        self._seed, self._labels, self._frozen = seed, labels, frozen
        self._drawn: dict[int, StorageWeakRef] = {}
        self._draws: dict[str, int] = {}

    # TorchDispatchMode keeps process-wide flags about modes, which threads would leave wrong; only the stack is ours.
    def __enter__(self) -> "Recorder":
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        _pop_mode()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def adopt(self, tensor: torch.Tensor, filling: int) -> None:
        """Fill a tensor with a byte; written down where the tensor is large."""
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        pending = Pending.of(tensor)
        if pending.nbytes < PENDING_FROM:
            flat.fill_(filling)
            return
        fill = torch.Tensor.fill_
        pending.log = Log(None, fill, (place_of(flat), filling), {}, None, None, 1, 0, False)
        self.pending[pending.weak.cdata] = pending

    def realize(self, values: Any) -> None:
        """Replay whatever is pending among the tensors in `values`."""
        if self.pending:
            for tensor in tensors_in(values):
                found = self._find(tensor)
                if found is not None:
                    self._realize(found)

    def realize_all(self) -> None:
        """Replay everything that is pending and still has an owner."""
        for pending in list(self.pending.values()):
            self._realize(pending)

    def is_random(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's value goes back to a draw."""
        if tensor.layout is not torch.strided or tensor.is_meta:
            return False
        found = tensor.untyped_storage()._cdata
        pending = self.pending.get(found)
        return found in self._drawn or (pending is not None and pending.log is not None and pending.log.random)

    def _find(self, tensor: torch.Tensor) -> Pending | None:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return None
        return self.pending.get(tensor.untyped_storage()._cdata)

    def _realize(self, pending: Pending) -> None:
        del self.pending[pending.weak.cdata]
        storage = None if is_expired(pending.weak) else torch.UntypedStorage._new_with_weak_ptr(pending.weak.cdata)
        if storage is not None and pending.log is not None:
            with torch.no_grad():
                replay(pending.log, storage)
            if pending.log.random:
                self._drawn[pending.weak.cdata] = pending.weak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Write `func` down, or perform it."""
        kwargs = kwargs or {}
        schema = func._schema
        name, writes = schema.name.partition("::")[2], schema.is_mutable
        if name in _UNDECLARED_VIEWS or (not writes and _returns_alias(schema)):
            return func(*args, **kwargs)
        if self._frozen and writes:
            self._refuse_frozen(schema, args)
        if torch.Tag.inplace_view in func.tags and name not in _REALLOCATING:
            return func(*args, **kwargs)
        seed = self._seed_of(func, args, kwargs)
        like = name.endswith("_like") or name.startswith("new_")
        if not writes and (made := self._created(func, name, args, kwargs, seed)) is not None:
            return made
        if self.pending and not like:
            try:
                if writes:
                    return self._written(func, name, args, kwargs, seed)
                if seed is None and (name in _COPIES or torch.Tag.pointwise in func.tags):
                    return self._derived(func, args, kwargs)
            except UnrecordableError:
                pass
            self.realize((*args, *kwargs.values()))
        random = seed is not None or (not like and self._reads_draw(args, kwargs))
        result = func(*args, **kwargs) if seed is None else _draw(func, args, kwargs, seed)
        if random:
            self._mark(result if isinstance(result, (list, tuple)) else (result,))
            self._mark(_written_by(schema, args, kwargs))
        return result

    # -- random values ---------------------------------------------------------------------------------------------

    def _seed_of(self, func: Any, args: Any, kwargs: Any) -> int | None:
        """The seed of a random operation; None for others and for those that bring a generator."""
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return None
        return self._next_seed(args[0] if args else None)

    def _next_seed(self, target: Any) -> int:
        label = ""
        if self._labels and isinstance(target, torch.Tensor) and target.layout is torch.strided:
            label = self._labels.get(target.untyped_storage()._cdata, "")
        count = self._draws[label] = self._draws.get(label, 0) + 1
        return derived_seed(self._seed, f"{label}#{count}")

    def _reads_draw(self, args: Any, kwargs: Any) -> bool:
        return bool(self._drawn) and any(map(self.is_random, tensors_in((*args, *kwargs.values()))))

    def _mark(self, values: Any) -> None:
        for tensor in tensors_in(values):
            if tensor.layout is torch.strided and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._drawn:
                    self._drawn[storage._cdata] = weak_reference(storage)

    def _refuse_frozen(self, schema: Any, args: Any) -> None:
        for tensor in _written_by(schema, args, {}):
            key = None if tensor.layout is not torch.strided else self._frozen.get(tensor.untyped_storage()._cdata)
            if key is not None:
                raise FrozenWriteError(key)

    # -- writing down ----------------------------------------------------------------------------------------------

    def _created(self, func: Any, name: str, args: Any, kwargs: Any, seed: int | None) -> torch.Tensor | None:
        """A large new tensor, its filling written down; None where this is no such creation."""
        base = name.removesuffix("_like").removeprefix("new_")
        if base not in _CREATED or kwargs.get("generator") is not None or "names" in kwargs:
            return None
        model: torch.Tensor | None = None if base == name else args[0]
        size = args[0] if model is None else model.shape if name.endswith("_like") else args[1]
        kind = kwargs.get("dtype") or (torch.get_default_dtype() if model is None else model.dtype)
        device = torch.device(kwargs.get("device") or ("cpu" if model is None else model.device))
        if prod(size) * kind.itemsize < PENDING_FROM or device.type != "cpu" or kwargs.get("pin_memory"):
            return None
        if kwargs.get("layout") not in (None, torch.strided) or (model is not None and is_odd(model)):
            return None
        made: torch.Tensor
        fill = _CREATED[base]
        if fill is None:
            made = func(*args, **kwargs)
        elif model is not None and name.endswith("_like"):
            made = torch.empty_like(model, dtype=kind, memory_format=kwargs.get("memory_format"))
        else:
            guessed = base == "full" and model is None and kwargs.get("dtype") is None
            made = torch.empty(size, dtype=torch.full((), args[-1]).dtype if guessed else kind, device="cpu")
        pending = self.pending[made.untyped_storage()._cdata] = Pending.of(made)
        if fill is not None:
            value = (args[-1],) if base == "full" else (1,) if base == "ones" else ()
            op = getattr(torch.Tensor, fill)
            pending.log = Log(None, op, (place_of(made), *value), {}, None, seed, 1, 0, seed is not None)
        return made

    def _written(self, func: Any, name: str, args: Any, kwargs: Any, seed: int | None) -> torch.Tensor:
        """An in-place operation on a pending tensor, as one more step of its log."""
        written = list(_written_by(func._schema, args, kwargs))
        if len(written) != 1 or not args or written[0] is not args[0]:
            raise UnrecordableError
        target: torch.Tensor = written[0]
        found = self._find(target)
        known = name in _WRITERS or seed is not None or torch.Tag.pointwise in func.tags
        if found is None or is_odd(target) or not known or len(func._schema.returns) != 1:
            raise UnrecordableError
        _rehearse(func, args, kwargs, target, seed)
        found.log = step(found, func, args, kwargs, find=self._find, is_random=self.is_random, seed=seed)
        return target

    def composed(self, tensor: torch.Tensor, op: Callable[..., Any], given: Mapping[str, Any]) -> bool:
        """Write a whole initializer down that draws until it likes what it reads; whether that was possible."""
        found = self._find(tensor)
        if found is None or is_odd(tensor) or given["tensor"] is not tensor or given["generator"] is not None:
            return False
        more = {name: given[name] for name in signature(op).parameters if name not in ("tensor", "generator")}
        seed = self._next_seed(tensor)
        try:
            op(torch.empty((0,) * tensor.ndim, dtype=tensor.dtype), **more, generator=torch.Generator())
            found.log = step(found, op, (tensor,), more, find=self._find, is_random=self.is_random, seed=seed)
        except UnrecordableError:
            return False
        return True

    def _derived(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """A large element-wise result of one pending tensor, itself pending."""
        inputs = list(tensors_in((*args, *kwargs.values())))
        sources = [t for t in inputs if self._find(t) is not None]
        if len(sources) != 1 or len(func._schema.returns) != 1 or any(map(is_odd, inputs)):
            raise UnrecordableError
        if torch.device(kwargs.get("device") or "cpu").type != "cpu" or kwargs.get("pin_memory"):
            raise UnrecordableError
        source, layout = sources[0], kwargs.get("memory_format") or torch.preserve_format
        kind = _rehearse(func, args, kwargs, source, None).dtype
        if source.numel() * kind.itemsize < PENDING_FROM:
            raise UnrecordableError
        made: torch.Tensor = torch.empty_like(source, dtype=kind, memory_format=layout)
        pending = Pending.of(made)
        pending.log = step(pending, func, args, kwargs, find=self._find, is_random=self.is_random, into=place_of(made))
        self.pending[pending.weak.cdata] = pending
        return made


def _returns_alias(schema: Any) -> bool:
    return bool(schema.returns) and schema.returns[0].alias_info is not None


def _written_by(schema: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors that a call writes."""
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from tensors_in((value,))


def _rehearse(func: Any, args: Any, kwargs: Any, whole: torch.Tensor, seed: int | None) -> Any:
    """Make the call on single elements: what is only written down must still raise what it would raise.

    Raises:
        UnrecordableError: another tensor has more elements than `whole`.
    """

    def single(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        pairs = zip(reversed(value.shape), reversed(whole.shape), strict=False)
        if value.ndim > whole.ndim or any(n not in (1, m) for n, m in pairs):
            raise UnrecordableError
        return torch.ones((1,) * value.ndim, dtype=value.dtype)

    args, kwargs = [single(value) for value in args], {k: single(value) for k, value in kwargs.items()}
    return func(*args, **kwargs) if seed is None else _draw(func, args, kwargs, seed)


@lru_cache
def _with_generator(func: Any) -> Any:
    """The overload of a random operation that takes a generator; None where there is none."""
    names = {argument.name for argument in func._schema.arguments}
    if "generator" in names:
        return func
    packet = func.overloadpacket
    for overload in map(packet.__getattr__, packet.overloads()):
        if {argument.name for argument in overload._schema.arguments} == names | {"generator"}:
            return overload
    return None


def _draw(func: Any, args: Any, kwargs: Any, seed: int) -> Any:
    """A random operation with a generator of its own."""
    inputs = tensors_in((*args, *kwargs.values()))
    device = torch.device(kwargs.get("device") or next((t.device for t in inputs), "cpu"))
    if device.type == "meta":
        return func(*args, **kwargs)
    overload = _with_generator(func)
    if overload is not None:
        return overload(*args, **{**kwargs, "generator": torch.Generator(device).manual_seed(seed)})
    # A few operations take no generator at all; they borrow the global one, and it is put back.
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return func(*args, **kwargs)
