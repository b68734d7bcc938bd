"""Both modes together: what dispatches is written down or performed, what reads without dispatching is seen too."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from types import FunctionType
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext, _device_constructors

from funcmodel.bind.recording import Recorder

_UNDISPATCHED: Final = {
    *("numpy", "tolist", "data_ptr", "const_data_ptr", "__dlpack__", "__array__", "__repr__", "__format__"),
    *("__reduce_ex__", "__deepcopy__", "storage", "untyped_storage", "_typed_storage"),
    *("apply_", "map_", "map2_", "share_memory_"),
}
# Initializers that look at what they drew and draw again. They leave tensors on meta alone, and ask before they begin:
# to one that is pending the answer is yes, and the call is written down whole.
_REJECTING: Final = {
    function.__code__: function
    for function in (getattr(torch.nn.init, name, None) for name in ("_no_grad_trunc_normal_", "orthogonal_"))
    if isinstance(function, FunctionType) and {"tensor", "generator"} <= set(signature(function).parameters)
}


@contextmanager
def recording(
    seed: int, *, labels: Mapping[int, str] | None = None, frozen: Mapping[int, str] | None = None
) -> Iterator[Recorder]:
    """Run a block under both modes, with new tensors on the CPU.

    Args:
        seed: of every random operation that brings no generator of its own.
        labels: storage (`_cdata`) to the label that seeds draws into it, instead of a count over all draws.
        frozen: storage (`_cdata`) to the name of a tensor that the block must not write.

    Raises:
        FrozenWriteError: the block wrote to one of `frozen`; nothing was written.
    """
    recorder = Recorder(seed, labels or {}, frozen or {})
    with recorder, _Undispatched(recorder):
        yield recorder


class _Undispatched(TorchFunctionMode):
    """The function mode: reads that never reach the dispatcher, and the device of new tensors."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._outer = _device_context()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replay what `func` would read behind the dispatcher's back."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._recorder.pending and name in _UNDISPATCHED:
            self._recorder.realize(args)
        elif name == "__get__" and func.__self__ is torch.Tensor.is_meta and self._recorder.pending:
            frame = sys._getframe(1)
            found = _REJECTING.get(frame.f_code)
            if found is not None and self._recorder.composed(args[0], found, frame.f_locals):
                return True
        elif (
            self._outer is not None
            and kwargs.get("device") is None
            and func in _device_constructors()
            and _device_context() is self._outer
        ):
            # A default device set outside does not reach the constructor; one that it sets itself does.
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)


def _device_context() -> DeviceContext | None:
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return next((mode for mode in stack if isinstance(mode, DeviceContext)), None)
