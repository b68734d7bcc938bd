"""`Device`, `DeviceMap`, `Budget`: where tensors go, and how much fits there."""

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from funcmodel.records.mapping import FrozenMap
from funcmodel.records.tensors import parse_size


@frozen(repr=False, order=True)
class Device:
    """A place for tensors: `cpu`, `cuda:0`, `disk`, `meta`, or any other type torch knows.

    Example:
        >>> device("cuda:1"), device(0), device("cpu")
        (cuda:1, cuda:0, cpu)
    """

    type: str
    index: int | None = None

    def __repr__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


def device(value: object) -> Device:
    """The `Device` that a `torch.device`, a text such as "cuda:0", or a CUDA index names.

    Raises:
        ValueError: the text is no device.
    """
    if isinstance(value, Device):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Device("cuda", value)
    kind, colon, index = str(value).partition(":")
    if isinstance(value, bool) or not kind.isidentifier() or (colon and not index.isdigit()):
        raise ValueError(f"not a device: {value!r}; write for example 'cpu', 'cuda:0', 'disk'")
    return Device(kind, int(index) if colon else None)


CPU = Device("cpu")
META = Device("meta")
DISK = Device("disk")


def _entries(value: Any) -> FrozenMap[str, Device]:
    return FrozenMap({str(k): device(v) for k, v in dict(value).items()})


@frozen
class DeviceMap:
    """Module prefix to device. `""` is the default; the longest prefix on a dot boundary wins.

    Example:
        >>> DeviceMap({"": "cpu", "layers.0": 0}).entries["layers.0"]
        cuda:0
    """

    entries: FrozenMap[str, Device] = field(converter=_entries)


def device_map(value: object) -> DeviceMap:
    """A `DeviceMap` from one, from a mapping, or from a single device for everything."""
    if isinstance(value, DeviceMap):
        return value
    return DeviceMap(value if isinstance(value, Mapping) else {"": value})


def _sizes(value: Any) -> FrozenMap[Device, int]:
    return FrozenMap({device(k): parse_size(v) for k, v in dict(value).items()})


@frozen
class Budget:
    """Bytes available per device, in the order in which devices are to be filled.

    Example:
        >>> Budget({0: "10GB", "cpu": "30GB"}).entries[Device("cuda", 0)]
        10000000000
    """

    entries: FrozenMap[Device, int] = field(converter=_sizes)
