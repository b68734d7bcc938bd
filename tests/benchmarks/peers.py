"""How others do it. Each function makes an act; a package that is not installed makes a row that says so.

Optional peers, used where they can be imported: `fastsafetensors`, `runai-model-streamer` (neither is a dependency of
the tests), `transformers`, `accelerate`, `huggingface_hub`. What a peer gives back lazily, as pages of a mapped file,
is measured three times: as it is, with every page touched, and with memory of its own.
"""

import importlib
import importlib.metadata
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch as st
import torch
from safetensors import safe_open
from torch import nn

from tests.benchmarks.limits import spread
from tests.benchmarks.measure import Unavailable
from tests.benchmarks.model import Tensors

Act = Callable[[Any], Any]
LEFT_OUT: set[str] = set()  # packages that this run does without, for example because importing them takes long


def package(name: str) -> Any:
    """An optional package.

    Raises:
        Unavailable: it cannot be imported, or the run does without it.
    """
    if name in LEFT_OUT:
        raise Unavailable(f"left out: --without {name}")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error


def touch(tensors: Mapping[str, torch.Tensor]) -> None:
    """Read one byte of every page."""
    for tensor in tensors.values():
        tensor.detach().reshape(-1).view(torch.uint8)[::4096].sum()


def _pread(function: Callable[..., Any]) -> dict[str, str]:
    if "backend" not in inspect.signature(function).parameters:
        raise Unavailable(f"safetensors {importlib.metadata.version('safetensors')} has no backend='pread'")
    return {"backend": "pread"}


def load_file(path: Path) -> Act:
    return lambda _: st.load_file(path)


def safe_open_rows(path: Path) -> Act:
    def act(_: Any) -> Tensors:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no dict
            return {key: one[one.get_shape()[0] // 2 :].clone() for key, one in slices.items()}

    return act


def safe_open_columns(path: Path) -> Act:
    def act(_: Any) -> Tensors:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no dict
            return {key: one[:, one.get_shape()[1] // 2 :].clone() for key, one in slices.items()}

    return act


def load_file_stacked(path: Path) -> Act:
    def act(_: Any) -> Tensors:
        groups: dict[str, list[torch.Tensor]] = {}
        for key, tensor in sorted(st.load_file(path).items(), key=lambda one: [*map(int, one[0].split(".")[:2])]):
            groups.setdefault(key.partition(".")[0], []).append(tensor)
        return {f"{key}.weight": torch.stack(group) for key, group in groups.items()}

    return act


def load_file_cast(path: Path) -> Act:
    return lambda _: {key: tensor.float() for key, tensor in st.load_file(path).items()}


def load_file_touch(path: Path) -> Act:
    def act(_: Any) -> Tensors:
        tensors = st.load_file(path)
        touch(tensors)
        return tensors

    return act


def load_file_clone(path: Path) -> Act:
    return lambda _: {key: tensor.clone() for key, tensor in st.load_file(path).items()}


def load_file_pread(path: Path) -> Act:
    option = _pread(st.load_file)
    return lambda _: st.load_file(path, **option)


def load_bytes(path: Path) -> Act:
    """What loading from a stream of bytes costs."""
    return lambda _: st.load(path.read_bytes())


def load_file_state_dict(path: Path) -> Act:
    def act(module: nn.Module) -> nn.Module:
        module.load_state_dict(st.load_file(path))
        return module

    return act


def load_file_assign(path: Path) -> Act:
    def act(module: nn.Module) -> nn.Module:
        module.load_state_dict(st.load_file(path), assign=True)
        return module

    return act


def load_file_by_hand(path: Path) -> Act:
    """What a careful user writes for many tensors: no names are checked, and memory stays mapped to the file."""

    def act(module: nn.Module) -> nn.Module:
        parents = dict(module.named_modules())
        for key, tensor in st.load_file(path).items():
            parent, _, leaf = key.rpartition(".")
            parents[parent]._parameters[leaf] = nn.Parameter(tensor)
        return module

    return act


def load_model(path: Path) -> Act:
    def act(module: nn.Module) -> nn.Module:
        st.load_model(module, path)
        return module

    return act


def torch_load(path: Path, *, mmap: bool = False) -> Act:
    return lambda _: torch.load(path, mmap=mmap, weights_only=True)


def torch_load_into(path: Path, *, assign: bool) -> Act:
    """From a mapped `torch.save` file into a module."""

    def act(module: nn.Module) -> nn.Module:
        module.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=assign)
        return module

    return act


def transformers_build(folder: Path) -> Act:
    """Building the model alone, on meta; what `from_pretrained` takes beyond it is its loading."""
    transformers = package("transformers")
    made = transformers.AutoConfig.from_pretrained(folder)

    def act(_: Any) -> nn.Module:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(made)

    return act


def from_pretrained(folder: Path, *, then: str = "nothing", **options: Any) -> Act:
    """`then`: "nothing", "touch", or "own" (each parameter gets memory of its own)."""
    transformers = package("transformers")
    transformers.utils.logging.disable_progress_bar()
    options.setdefault("dtype", torch.bfloat16)

    def act(_: Any) -> nn.Module:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        if then == "touch":
            touch(dict(model.named_parameters()))
        if then == "own":
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        return model

    return act


def save_pretrained(folder: Path, max_shard_size: int | None = None) -> Act:
    """Of a model that holds its weights in memory of its own."""
    model = from_pretrained(folder, then="own")(None)
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    return lambda into: model.save_pretrained(into, **options)


def accelerate_load(path: Path, *, device_map: Mapping[str, str] | None = None) -> Act:
    accelerate = package("accelerate")

    def act(module: nn.Module) -> nn.Module:
        accelerate.load_checkpoint_in_model(module, str(path), device_map=device_map)
        return module

    return act


def dcp_read(folder: Path) -> Act:
    dcp = package("torch.distributed.checkpoint")
    reader = getattr(dcp, "HuggingFaceStorageReader", None)
    if reader is None:
        raise Unavailable(f"torch {torch.__version__} has no HuggingFaceStorageReader")

    def act(module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process only
            dcp.load(module.state_dict(), storage_reader=reader(str(folder)), no_dist=True)
        return module

    return act


def dcp_write(tensors: Tensors) -> Act:
    dcp = package("torch.distributed.checkpoint")
    writer = getattr(dcp, "HuggingFaceStorageWriter", None)
    if writer is None:
        raise Unavailable(f"torch {torch.__version__} has no HuggingFaceStorageWriter")

    def act(into: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(tensors, storage_writer=writer(str(into)), no_dist=True)

    return act


def save_file(tensors: Tensors) -> Act:
    return lambda into: st.save_file(tensors, into / "model.safetensors")


def save_files(shares: list[Tensors], threads: int) -> Act:
    """One `save_file` per share, by so many threads; no index."""

    def act(into: Path) -> None:
        def save(numbered: tuple[int, Tensors]) -> None:
            st.save_file(numbered[1], into / f"model-{numbered[0]}.safetensors")

        spread(save, list(enumerate(shares)), threads)

    return act


def save_model(module: nn.Module) -> Act:
    return lambda into: st.save_model(module, str(into / "model.safetensors"))


def torch_save(tensors: Tensors) -> Act:
    return lambda into: torch.save(tensors, into / "model.pt")


def hub_save(tensors: Tensors, max_shard_size: int | None = None) -> Act:
    hub = package("huggingface_hub")
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    return lambda into: hub.save_torch_state_dict(tensors, into, **options)


def fastsafetensors_load(path: Path, device: str) -> Act:
    """Without GPUDirect Storage; cloned, since its tensors live in one block that closing frees."""
    fast = package("fastsafetensors")

    def act(_: Any) -> Tensors:
        with fast.fastsafe_open(filenames=[str(path)], nogds=True, device=device, debug_log=False) as file:
            return {key: file.get_tensor(key).clone().detach() for key in file.keys()}  # noqa: SIM118 - no dict  # noqa: SIM118

    return act


def runai_load(path: Path, device: str) -> Act:
    """Cloned, since it yields views of a buffer that it uses again."""
    runai = package("runai_model_streamer")
    os.environ.setdefault("RUNAI_STREAMER_CONCURRENCY", "16")

    def act(_: Any) -> Tensors:
        with runai.SafetensorsStreamer() as streamer:
            streamer.stream_file(str(path))
            if device == "cpu":
                return {key: tensor.clone().detach() for key, tensor in streamer.get_tensors()}
            return {key: tensor.to(device) for key, tensor in streamer.get_tensors()}

    return act
