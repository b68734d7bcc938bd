"""Who holds a lock, written so that others can judge whether it still lives."""

import os
import re
import socket
from typing import Final
from zlib import crc32

from attrs import frozen

_NAME: Final = re.compile(r"(\d{1,10})-(\d{0,20})-([0-9a-f]{8})-([0-9a-f]{16})-([\w.-]{1,100})", re.ASCII)
_LONGEST: Final = 100  # characters of a host's name; the name of a file has room for 255 bytes


@frozen
class Owner:
    """A process that holds a lock.

    Attributes:
        pid: its number, as it sees it itself.
        host: the name of its machine.
        machine: a mark that tells apart what can have the same name and the same numbers: machines, containers, and
            one machine before and after it was started again.
        started: when it started, in the clock ticks of its machine; "" where the system does not say. Numbers are used
            again, and in containers they are the same each time.
    """

    pid: int
    host: str
    machine: str
    started: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"

    def name(self, token: str) -> str:
        """A file name that says it all; the token, 16 hexadecimal digits, makes it unlike every other."""
        return f"{self.pid}-{self.started}-{self.machine}-{token}-{self.host}"

    def alive(self) -> bool | None:
        """Whether it still runs; None where that cannot be seen from here, as on another machine."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:
            pass  # another user's
        ended, started = _stat(self.pid)
        return not ended and (not (self.started and started) or started == self.started)


def current() -> Owner:
    """This process."""
    host = re.sub(r"[^\w.-]", "_", socket.gethostname(), flags=re.ASCII)[:_LONGEST]
    return Owner(os.getpid(), host or "_", _machine(), _stat(os.getpid())[1])


def named(name: str) -> Owner | None:
    """The owner that has this name; None for a name that `Owner.name` did not make."""
    match = _NAME.fullmatch(name)
    return Owner(int(match[1]), match[5], match[3], match[2]) if match else None


def holders(fd: int) -> tuple[int, ...]:
    """The other processes that have this file open, as far as this one may look."""
    wanted, own = os.fstat(fd), str(os.getpid())
    pids = [name for name in _names("/proc") if name.isdecimal() and name != own]
    return tuple(sorted(int(pid) for pid in pids if any(_leads_to(path, wanted) for path in _paths(f"/proc/{pid}/fd"))))


def _paths(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in _names(folder)]


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _leads_to(path: str, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), wanted)
    except OSError:
        return False


def _machine() -> str:
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    boot = _text("/proc/sys/kernel/random/boot_id")
    return f"{crc32(repr((socket.gethostname(), boot, space)).encode()):08x}"


def _stat(pid: int) -> tuple[bool, str]:
    """Whether a process has ended and only waits to be asked for its result, and when it started."""
    # The second field is a name in parentheses, which may hold anything. A state of "Z" is also that of a process whose
    # first thread has ended before the others.
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0] in "ZX" and int(fields[17]) <= 1, fields[19]) if len(fields) > 19 else (False, "")


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
