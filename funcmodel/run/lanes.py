"""What the ring asks of a device: streams, marks in them, and host memory that the device can read by itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from attrs import frozen

from funcmodel.run.memory import PAGE, memory, tensor_at

Stream: TypeAlias = Any
Mark: TypeAlias = Any

# Torch computes on less than 32768 elements in the thread that asks, on more in a team of threads. A multiple of 64, so
# that the vectors of a loop over blocks of this size are those of a loop over everything.
CELLS: Final = 32704
_EVENT: Final[Any] = torch.cuda.Event
_STREAM: Final[Any] = torch.cuda.Stream


@frozen(kw_only=True, eq=False)
class Lane:
    """A way to one device, as functions.

    Attributes:
        device: where it leads.
        host: so many bytes of host memory, flat; pinned, if that is asked for and the device knows it.
        stream: a new order of work, beside the one that the caller uses.
        using: a context; what this thread gives the device within it belongs to that stream.
        copy: gives the device a copy of flat bytes, `copy(to, source)`. The host's side must not be touched before a
            mark behind it is reached.
        give: calls a function that gives the device work by torch.
        record: a mark behind everything that the stream in use was given.
        after: what the stream in use is given from now on comes after a mark, of whichever stream.
        wait: this thread goes on when a mark is reached.
        cells: of how many elements a thread may ask torch at once without starting others; 0 where it starts none.
    """

    device: torch.device
    host: Callable[[int, bool], torch.Tensor]
    stream: Callable[[], Stream]
    using: Callable[[Stream], AbstractContextManager[Any]]
    copy: Callable[[torch.Tensor, torch.Tensor], None]
    give: Callable[[Callable[[], None]], None]
    record: Callable[[], Mark]
    after: Callable[[Mark], None]
    wait: Callable[[Mark], None]
    cells: int = 0


def lane_to(device: torch.device) -> Lane:
    """The way to a device."""
    return _cuda(device) if device.type == "cuda" else _synchronous(device)


def _cuda(device: torch.device) -> Lane:
    # Worker threads start with a current device of their own.
    home = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())

    def record() -> Mark:
        # Waiting for it sleeps. By default it would spin, on a processor that another thread needs to read files.
        mark: Mark = _EVENT(blocking=True)
        mark.record(torch.cuda.current_stream(home))
        return mark

    def after(mark: Mark) -> None:
        torch.cuda.current_stream(home).wait_event(mark)

    def host(nbytes: int, pinned: bool) -> torch.Tensor:
        # torch keeps pinned memory for the process, so it is paid for once.
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True) if pinned else _plain(nbytes)

    def copy(to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source, non_blocking=True)

    return Lane(
        device=home,
        host=host,
        stream=lambda: _STREAM(home),
        using=torch.cuda.stream,
        copy=copy,
        give=_call,
        record=record,
        after=after,
        wait=lambda mark: mark.synchronize(),
    )


def _synchronous(device: torch.device) -> Lane:
    """A device whose every copy is done when it was asked for."""
    near = device.type == "cpu"

    def nothing(_: object = None) -> None:
        pass

    return Lane(
        device=device,
        host=lambda nbytes, _: _plain(nbytes),
        stream=nothing,
        using=nullcontext,
        copy=_copy_near if near else _copy_far,
        give=_call,
        record=nothing,
        after=nothing,
        wait=nothing,
        cells=CELLS if near else 0,
    )


def _plain(nbytes: int) -> torch.Tensor:
    return tensor_at(memory(nbytes, PAGE), 0, torch.uint8, (nbytes,))


def _call(action: Callable[[], None]) -> None:
    action()


def _copy_near(to: torch.Tensor, source: torch.Tensor) -> None:
    np.copyto(to.numpy(), source.numpy())  # torch would start a team of threads in each thread that copies


def _copy_far(to: torch.Tensor, source: torch.Tensor) -> None:
    to.copy_(source)
