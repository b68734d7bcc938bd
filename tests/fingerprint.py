"""What a process is, as far as a library could change it without saying so."""

import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


def fingerprint(*arguments: Any) -> dict[str, Any]:
    """Equal before and after a call that leaves the process, and these arguments, alone."""
    names = (("torch", torch), ("nn.Module", nn.Module), ("nn.Parameter", nn.Parameter), ("nn.Linear", nn.Linear))
    names += (("Tensor", torch.Tensor), ("nn.init", nn.init), ("functional", nn.functional), ("os", os))  # type: ignore[assignment]
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is not None:
        names += (("PreTrainedModel", transformers.PreTrainedModel),)  # type: ignore[assignment]
    umask = os.umask(0)
    os.umask(umask)
    return {
        **{f"attributes of {name}": {key: id(value) for key, value in vars(of).items()} for name, of in names},
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "dispatch modes": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "generator of torch": torch.get_rng_state().numpy().tobytes(),
        "generators of cuda": [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else None,
        "generator of numpy": repr(np.random.get_state()),
        "generator of Python": random.getstate(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "umask": umask,
        "warning filters": list(warnings.filters),
        "showwarning": id(warnings.showwarning),
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "logging": {
            name: (log.level, log.propagate, log.disabled, [id(h) for h in log.handlers])
            for name, log in [("", logging.getLogger()), *logging.root.manager.loggerDict.items()]
            if isinstance(log, logging.Logger)
        },
        "path": list(sys.path),
        "hooks": (sys.excepthook, threading.excepthook, sys.displayhook, sys.gettrace(), sys.getprofile()),
        "locale": locale.setlocale(locale.LC_ALL),
        "collector": (gc.isenabled(), gc.get_threshold(), gc.get_debug(), len(gc.callbacks), gc.get_freeze_count()),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.enumerate(),
        "arguments": [_state(argument) for argument in arguments],
    }


def _state(argument: Any) -> Any:
    if isinstance(argument, nn.Module):
        leaves = [*argument.named_parameters(remove_duplicate=False), *argument.named_buffers(remove_duplicate=False)]
        modules = [(name, id(m), sorted(vars(m)), m.training) for name, m in argument.named_modules()]
        return modules, [(name, _tensor(leaf)) for name, leaf in leaves]
    if isinstance(argument, torch.Tensor):
        return _tensor(argument)
    if isinstance(argument, Mapping):
        return [(key, _state(value)) for key, value in argument.items()]
    return repr(argument)


def _tensor(t: torch.Tensor) -> Any:
    held = None if t.is_meta else (t.data_ptr(), bytes(t.detach().reshape(-1).view(torch.uint8).tolist()))
    return id(t), type(t), t.dtype, t.shape, t.stride(), t.requires_grad, t._version, id(t.grad), held


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what is not the same any more, attributes of modules one by one."""
    found = []
    for name, value in before.items():
        if name.startswith("attributes of "):
            # torch and transformers import parts of themselves when they are first used; that adds, and replaces none.
            found += [f"{name}: {key}" for key, i in value.items() if after[name].get(key) != i]
        elif value != after[name]:
            found.append(name)
    return found
