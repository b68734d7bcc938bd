"""What no source holds: leaves drawn afresh, leaves that keep their constructor's value, leaves without a value."""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple, TypeAlias

from funcmodel.core.templates import Matcher
from funcmodel.errors import PlanError
from funcmodel.records.actions import Initialize, Move
from funcmodel.records.devices import Device
from funcmodel.records.module import ModuleSpec, ParamSpec

Initializer: TypeAlias = Callable[..., object] | str
Choice: TypeAlias = Callable[[str], str | None]
_KNOWN: Final = ("reset_parameters", "_init_weights", "constructor")


class Chosen(NamedTuple):
    """What the caller's `init` says about a key.

    Attributes:
        missing: about a leaf that the source lacks.
        unsaved: about a leaf that no state dict holds; only a template can mean such a one.
    """

    missing: Choice
    unsaved: Choice


class Fresh(NamedTuple):
    """What happens to leaves that no source holds.

    Attributes:
        draws: one initialization per submodule, initializer and device.
        moves: buffers outside the state dict.
        keys: leaves that are initialized, in module order.
        meta: leaves outside the state dict that have no value anywhere.
        kept: leaves that keep the tensor they have.
    """

    draws: tuple[Initialize, ...]
    moves: tuple[Move, ...]
    keys: tuple[str, ...]
    meta: tuple[str, ...]
    kept: frozenset[str]


def drawn(spec: ModuleSpec, keys: Iterable[str], homes: Mapping[str, Device], chosen: Chosen, seed: int) -> Fresh:
    """What happens to `keys`, leaves of the module that no source holds; of tied ones the first stands for all.

    Example:
        >>> from funcmodel.records.mapping import FrozenMap
        >>> from funcmodel.records.module import SubmoduleSpec
        >>> from funcmodel.records.tensors import TensorSpec
        >>> leaf = ParamSpec(spec=TensorSpec([2], "float32"))
        >>> net = ModuleSpec(name="Net", params={"w": leaf}, modules=FrozenMap({"": SubmoduleSpec("Net")}))
        >>> drawn(net, ["w"], {"w": Device("cpu")}, chosen("pkg.mod:ones"), 0).draws
        (Initialize(module='', keys=('w',), how='pkg.mod:ones', seed=0, device=cpu, nbytes=8),)
    """
    tied = {group.keys[0]: group.keys for group in spec.tied}
    groups: dict[tuple[str, str | None, Device], list[str]] = {}
    moves: list[Move] = []
    fresh: list[str] = []
    meta: list[str] = []
    kept: set[str] = set()
    for key in keys:
        leaf = spec.params[key]
        names = tied.get(key, (key,))
        how: str | None
        if leaf.persistent or any(spec.params[name].persistent for name in names):
            how = _how(spec, key, leaf, next(filter(None, map(chosen.missing, names)), None))
        elif leaf.device is not None:
            moves.append(Move(key, homes[key], leaf.spec.nbytes))
            kept.add(key)
            continue
        else:
            # A function meant for missing weights says nothing about a buffer that no checkpoint ever holds.
            how = next(filter(None, map(chosen.unsaved, names)), None)
            if how is None or how == "constructor":
                meta.append(key)
                continue
        if how == "constructor":
            kept.add(key)
        fresh.append(key)
        groups.setdefault((key.rpartition(".")[0], how, homes[key]), []).append(key)
    draws = tuple(
        Initialize(module, tuple(group), how, seed, home, sum(spec.params[key].spec.nbytes for key in group))
        for (module, how, home), group in groups.items()
    )
    return Fresh(draws, tuple(moves), tuple(fresh), tuple(meta), frozenset(kept))


def _how(spec: ModuleSpec, key: str, leaf: ParamSpec, told: str | None) -> str | None:
    real = leaf.device is not None
    if told is not None:
        return None if told == "constructor" and not real else told
    # Initializers rarely touch buffers, while the constructor gave them a value; drawing one would leave it undefined.
    if leaf.kind != "parameter" and real:
        return "constructor"
    home = spec.modules.get(key.rpartition(".")[0])
    return home.init if home is not None and leaf.kind != "extra_state" else None


def chosen(init: Initializer | Mapping[str, Initializer] | None) -> Chosen:
    """`init` as functions of the key.

    Args:
        init: one initializer for everything missing, or template -> initializer, of which the first that matches wins.

    Raises:
        PlanError: an initializer that has no name a plan could hold.
        TemplateError: a template that cannot be parsed.

    Example:
        >>> chosen({"head.{*p}": "reset_parameters"}).missing("head.weight")
        'reset_parameters'
    """
    if init is None:
        return Chosen(_nothing, _nothing)
    if not isinstance(init, Mapping):
        one = _initializer(init)
        return Chosen(lambda _: one, _nothing)
    find = Matcher(init).first
    hows = tuple(map(_initializer, init.values()))

    def choose(key: str) -> str | None:
        at = find(key)
        return None if at is None else hows[at]

    return Chosen(choose, choose)


def _nothing(_: str) -> str | None:
    return None


def _initializer(value: Initializer) -> str:
    if isinstance(value, str):
        module, colon, name = value.partition(":")
        if value in _KNOWN or (colon and module and name.isidentifier()):
            return value
        raise PlanError(f"init: {value!r} is no initializer; write 'pkg.mod:function' or one of {_KNOWN}", found=value)
    name = getattr(value, "__qualname__", "")
    if not callable(value) or not name.isidentifier():
        raise PlanError(
            f"init: {value!r} cannot be named in a plan; pass a module-level function (key, spec, generator) -> tensor",
            found=value,
        )
    return f"{value.__module__}:{name}"
