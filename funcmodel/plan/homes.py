"""The device of every leaf, from a device map."""

from funcmodel.core.names import longest_prefix
from funcmodel.errors import PlacementError
from funcmodel.records.devices import CPU, Device
from funcmodel.records.devices import device_map as to_device_map
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import ModuleSpec


def homes(spec: ModuleSpec, where: object | None) -> dict[str, Device]:
    """The device of every leaf.

    Args:
        spec: the module.
        where: a `DeviceMap`, a mapping of prefixes, one device, or None for where each leaf is (meta: the CPU).

    Raises:
        PlacementError: an entry names nothing in the module, a leaf has no entry, or ties are separated.

    Example:
        >>> from funcmodel.records.module import ParamSpec
        >>> from funcmodel.records.tensors import TensorSpec
        >>> leaf = ParamSpec(spec=TensorSpec([2], "float32"))
        >>> homes(ModuleSpec(name="Net", params={"a.w": leaf, "ab.w": leaf}), {"": "cpu", "a": 0})
        {'a.w': cuda:0, 'ab.w': cpu}
    """
    if where is None:
        places = {key: leaf.device or CPU for key, leaf in spec.params.items()}
    else:
        try:
            entries = to_device_map(where).entries
        except ValueError as error:
            raise PlacementError(f"device map: {error}", found=where) from error
        if any(device.type == "meta" for device in entries.values()):
            raise PlacementError(
                "device map: a tensor on meta has no value; leave the key out of the source", found=where
            )
        _require_known(spec, entries)
        places = _placed(spec, entries)
    for group in spec.tied:
        if len({places[key] for key in group.keys}) > 1:
            found = ", ".join(f"{key} on {places[key]}" for key in group.keys)
            raise PlacementError(f"tied leaves must share a device: {found}; map them to one", keys=group.keys)
    return places


def _placed(spec: ModuleSpec, entries: FrozenMap[str, Device]) -> dict[str, Device]:
    table = dict(entries)
    places: dict[str, Device] = {}
    lost: list[str] = []
    for key in spec.params:
        home = longest_prefix(table, key)
        if home is None:
            lost.append(key)
        else:
            places[key] = home
    if lost:
        raise PlacementError(
            f"device map gives no device to {len(lost)} leaves, the first is {lost[0]!r}; "
            "add an entry, or '' for the rest",
            keys=tuple(lost),
        )
    return places


def _require_known(spec: ModuleSpec, entries: FrozenMap[str, Device]) -> None:
    unknown = [name for name in entries if name and name not in spec.modules and name not in spec.params]
    if not unknown:
        return
    above: set[str] = set()
    for key in spec.params:
        prefix = key.rpartition(".")[0]
        while prefix and prefix not in above:
            above.add(prefix)
            prefix = prefix.rpartition(".")[0]
    lost = tuple(name for name in unknown if name not in above)
    if lost:
        raise PlacementError(
            f"device map names {', '.join(map(repr, lost))}, which {spec.name} does not have", keys=lost
        )
