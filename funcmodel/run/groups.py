"""Control groups: what a container or a job may use of the machine, in both versions of them."""

from collections.abc import Iterator
from typing import Final

_VERSION_2: Final = "/sys/fs/cgroup"  # where it is unless the table of mounts says otherwise
_MEMORY: Final = {
    "": ("memory.max", "memory.current", "memory.stat"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
}
_FILE_PAGES: Final = ("active_file", "inactive_file")
_UNLIMITED: Final = 1 << 60  # bytes; version 1 has a number for it


def quotas() -> list[int]:
    """Processors that each group with a quota may use."""
    folders = _folders()
    found = [text_of(f"{folder}/cpu.max") for folder in folders.get("", ())]
    for folder in folders.get("cpu", ()):
        time, period = (text_of(f"{folder}/cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        found.append(f"{time} {period}")
    return [size for size in map(quota, found) if size]


def memory_left() -> list[int]:
    """Bytes that each group with a limit may still have."""
    found = (group_memory(*texts) for texts in _memory())
    return [size for size in found if size is not None and size < _UNLIMITED]


def memory_limits() -> list[int]:
    """Bytes that each group with a limit may have at all."""
    found = (most.strip() for most, _, _ in _memory())
    return [int(most) for most in found if most.isdigit() and int(most) < _UNLIMITED]


def _memory() -> Iterator[tuple[str, str, str]]:
    folders = _folders()
    for controller, (most, used, stat) in _MEMORY.items():
        for folder in folders.get(controller, ()):
            yield text_of(f"{folder}/{most}"), text_of(f"{folder}/{used}"), text_of(f"{folder}/{stat}")


def _folders() -> dict[str, list[str]]:
    return group_folders(text_of("/proc/self/cgroup"), text_of("/proc/self/mountinfo"))


def text_of(path: str) -> str:
    """What the kernel says; nothing where it does not."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


# -- what the kernel's files say: pure ---------------------------------------------------------------------------------


def quota(text: str) -> int | None:
    """Processors that a group may use, from its quota and period; None for all of them.

    Example:
        >>> quota("150000 100000"), quota("max 100000"), quota("")
        (2, None, None)
    """
    time, _, period = text.partition(" ")
    if not time.isdigit() or not period.strip().isdigit() or not int(period):
        return None
    return max(1, -(-int(time) // int(period)))


def group_memory(most: str, used: str, stat: str) -> int | None:
    r"""Bytes that a group may still have, from its limit, what it uses and its statistics; None for any number.

    Pages of files count as free: the kernel lets go of them first.

    Example:
        >>> group_memory("1000", "700", "anon 500\nactive_file 100\ninactive_file 50\n"), group_memory("max", "7", "")
        (450, None)
    """
    if not most.strip().isdigit() or not used.strip().isdigit():
        return None
    rows = (line.split() for line in stat.splitlines())
    found = {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
    # Version 1 counts the groups below on lines of their own.
    files = sum(found.get(f"total_{name}", found.get(name, 0)) for name in _FILE_PAGES)
    return max(0, int(most) - int(used) + files)


def group_folders(groups: str, mounts: str) -> dict[str, list[str]]:
    r"""The folders of a process's groups, innermost first, by controller; under "" those of version 2.

    Limits of every group above hold, too.

    Args:
        groups: `/proc/self/cgroup`.
        mounts: `/proc/self/mountinfo`.

    Example:
        >>> mounts = "41 31 0:38 /box /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        >>> group_folders("4:memory:/box/job\n0::/a\n", mounts)["memory"]
        ['/sys/fs/cgroup/memory/job', '/sys/fs/cgroup/memory']
        >>> group_folders("0::/a\n", "")
        {'': ['/sys/fs/cgroup/a', '/sys/fs/cgroup']}
    """
    places = {"": ("/", _VERSION_2)}
    for line in mounts.splitlines():
        where, _, what = line.partition(" - ")
        fields, kind = where.split(" "), what.split(" ")
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        for controller in [""] if kind[0] == "cgroup2" else kind[2].split(","):
            places[controller] = (fields[3], fields[4])
    found: dict[str, list[str]] = {}
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/") or (not controllers and number != "0"):
            continue
        for controller in controllers.split(","):
            if controller in places:
                root, place = places[controller]
                top = root.rstrip("/")
                below = path.removeprefix(top) if f"{path}/".startswith(f"{top}/") else path
                parts = [] if ".." in below else below.rstrip("/").split("/")[1:]
                found[controller] = ["/".join([place, *parts[:count]]) for count in range(len(parts), -1, -1)]
    return found
