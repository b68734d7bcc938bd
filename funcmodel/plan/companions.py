"""Companions: a quantized weight and the scales, zero points and tables without which its numbers mean nothing.

They are known by the names that writers give them (GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8 and MXFP4
checkpoints, ModelOpt, torchao, MLX). A key counts as a companion only where its weight is there as well.
"""

from collections.abc import Container, Iterable, Iterator
from types import MappingProxyType
from typing import Final

from funcmodel.errors import RuleError
from funcmodel.records.mapping import FrozenMap

# <weight><suffix>: `q.weight` has `q.weight_scale_inv`, a stack `experts.up` has `experts.up_scale`.
_APPENDED: Final = (
    *("_scale", "_scale_inv", "_scale_2", "_scales", "_scale_inv_2", "_global_scale", "_input_scale"),
    *("_zero_point", "_zero_points", "_zeros", "_g_idx", "_shape"),
)
# How the weight itself may be called once such a suffix is off: compressed-tensors, MXFP4 and torchao rename it.
_RENAMED: Final = ("", "_packed", "_blocks", "_qdata")
# <weight>.<name>: bitsandbytes hangs its tables below the weight.
_BELOW: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")
_STATE: Final = ".quant_state."
# <module>.<name>, beside the module's weight.
_WEIGHTS: Final = ("weight", "weight_packed", "_weight_qdata", "qweight", "W_q")
_QUANTIZED: Final = ("weight_packed", "_weight_qdata", "qweight", "W_q")
_BESIDE: Final = MappingProxyType(
    {
        **dict.fromkeys(("input_scale", "input_zero_point", "input_global_scale", "input_g_idx"), _WEIGHTS),
        **dict.fromkeys(("output_scale", "output_zero_point", "pre_quant_scale"), _WEIGHTS),
        **dict.fromkeys(("k_scale", "v_scale", "scale_weight", "scale_input", "SCB", "weight_format"), _WEIGHTS),
        **dict.fromkeys(("scales", "biases", "qzeros", "g_idx"), _WEIGHTS),
        # A plain `weight` beside a `scale` or `zero` is as often a layer of its own kind as a quantized one.
        **dict.fromkeys(("scale", "zero", "zeros", "zero_point", "meta"), _QUANTIZED),
    }
)
COMPANION_SUFFIXES: Final = (*_APPENDED, *(f".{name}" for name in (*_BELOW, *_BESIDE)))


def is_companion(key: str) -> bool:
    """Whether `key` is named like a companion, whatever else there is.

    Example:
        >>> is_companion("layers.0.up.weight_scale_inv"), is_companion("layers.0.up.weight.absmax")
        (True, True)
        >>> is_companion("layers.0.up.weight"), is_companion("logit_scale.weight")
        (False, False)
    """
    return key.endswith(COMPANION_SUFFIXES) or _STATE in key or key in _BESIDE


def _candidates(key: str) -> Iterator[str]:
    """Names that the weight of a companion may have, most likely first."""
    if _STATE in key:
        yield key.partition(_STATE)[0]
    above, _, last = key.rpartition(".")
    if last in _BELOW:
        yield above
    for name in _BESIDE.get(last, ()):
        yield f"{above}.{name}" if above else name
    for suffix in _APPENDED:
        if key.endswith(suffix):
            stem = key[: -len(suffix)]
            for renamed in _RENAMED:
                yield stem + renamed


def weight_of(key: str, keys: Container[str]) -> str | None:
    """The weight among `keys` whose companion `key` is, or None.

    Example:
        >>> weight_of("up.weight_scale", {"up.weight", "up.bias"}), weight_of("logit_scale", {"up.weight"})
        ('up.weight', None)
    """
    return next((weight for weight in _candidates(key) if weight in keys), None)


def companions(keys: Iterable[str]) -> FrozenMap[str, tuple[str, ...]]:
    """The groups of quantized weights: weight -> its companions, both in the order of `keys`.

    Where no key is named like a companion this is one look at each key's end.

    Args:
        keys: keys of one state dict, for example a plan.

    Example:
        >>> dict(companions(["up.weight", "up.weight_scale", "up.bias", "down.qweight", "down.scales", "down.qzeros"]))
        {'up.weight': ('up.weight_scale',), 'down.qweight': ('down.scales', 'down.qzeros')}
    """
    known = keys if isinstance(keys, dict | FrozenMap) else dict.fromkeys(keys)
    groups: dict[str, list[str]] = {}
    for key in known:
        # As is_companion, without a call per key.
        if key.endswith(COMPANION_SUFFIXES) or _STATE in key or key in _BESIDE:
            weight = weight_of(key, known)
            if weight is not None:
                groups.setdefault(_first(weight, known), []).append(key)
    return FrozenMap({weight: tuple(others) for weight, others in groups.items()})


def _first(weight: str, keys: Container[str]) -> str:
    """The weight at the start of a chain: `w_scale_inv` may be the weight of `w_scale_inv_scale`."""
    while is_companion(weight):
        above = weight_of(weight, keys)
        if above is None:
            break
        weight = above
    return weight


def check_whole(before: Iterable[str], part: Container[str], *, what: str = "this") -> None:
    """Refuses a choice of keys that parts a quantized weight from a companion.

    Args:
        before: keys of the plan.
        part: those that are kept, or dropped, or cast, or touched by rules: each group lies in it as a whole or not
            at all.
        what: who chose, for the message.

    Raises:
        RuleError: a group is parted; `keys` are its members outside of `part`, `touched` those inside.

    Example:
        >>> check_whole(["up.weight", "up.weight_scale", "norm.weight"], {"norm.weight"})
    """
    for weight, others in companions(before).items():
        inside = tuple(key for key in (weight, *others) if key in part)
        if 0 < len(inside) <= len(others):
            outside = tuple(key for key in (weight, *others) if key not in part)
            raise RuleError(
                f"{what} takes {', '.join(inside)} and leaves {', '.join(outside)}; a quantized weight means nothing "
                f"without its scales: treat all of them or none",
                keys=outside,
                touched=inside,
            )
