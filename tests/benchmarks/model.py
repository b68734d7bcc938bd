"""What is loaded and saved: a Llama of plain torch modules, its files, and the same network as transformers sees it.

At 1 GB it has the 75 tensors of 8 layers (hidden 2048, intermediate 5632, 16 heads of which 8 for keys and values,
vocabulary 32,000), 1.02 GB in bfloat16. Larger sizes have more layers, smaller ones narrower layers, a rehearsal fewer.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

Tensors = dict[str, torch.Tensor]
HEADS, KV_HEADS = 16, 8
REHEARSAL = 0.1  # a model up to this size only shows that everything works
SMALL_ROWS, SMALL_COLUMNS = 32, 32  # 2 KiB of bfloat16
SMALL_LAYERS = 10


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, gigabytes: float) -> "Shape":
        narrow = math.sqrt(min(gigabytes, 1.0))

        def scaled(full: int, step: int) -> int:
            return max(step, round(full * narrow / step) * step)

        layers = max(8, round(8 * gigabytes)) if gigabytes > REHEARSAL else 2
        return cls(scaled(2048, 32), scaled(5632, 64), layers, scaled(32_000, 64))

    def tensors(self) -> int:
        return 9 * self.layers + 3


class Weight(nn.Module):
    """One weight without a value, on meta: a linear layer, an embedding or a norm to whoever loads it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))


def branch(**children: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made


def layer(shape: Shape) -> nn.Module:
    """One decoder layer, named as transformers names it."""
    h, m = shape.hidden, shape.intermediate
    kv = h * KV_HEADS // HEADS
    return branch(
        self_attn=branch(q_proj=Weight(h, h), k_proj=Weight(kv, h), v_proj=Weight(kv, h), o_proj=Weight(h, h)),
        mlp=branch(gate_proj=Weight(m, h), up_proj=Weight(m, h), down_proj=Weight(h, m)),
        input_layernorm=Weight(h),
        post_attention_layernorm=Weight(h),
    )


def llama(shape: Shape) -> nn.Module:
    """All weights of a Llama, on meta; it computes nothing."""
    model = branch(
        embed_tokens=Weight(shape.vocabulary, shape.hidden),
        layers=nn.ModuleList(layer(shape) for _ in range(shape.layers)),
        norm=Weight(shape.hidden),
    )
    return branch(model=model, lm_head=Weight(shape.vocabulary, shape.hidden))


def small_network(count: int) -> nn.Module:
    """`count` weights of 2 KiB in blocks of ten, on meta."""

    def block() -> nn.Module:
        return nn.ModuleList(Weight(SMALL_ROWS, SMALL_COLUMNS) for _ in range(SMALL_LAYERS))

    return nn.ModuleList(block() for _ in range(count // SMALL_LAYERS))


def numbers(network: nn.Module, dtype: torch.dtype) -> Tensors:
    """Values for every tensor of a network, not all alike and quickly made."""
    made: Tensors = {}
    for place, (key, tensor) in enumerate(network.state_dict().items()):
        row = torch.arange(tensor.shape[-1], dtype=torch.float32).mul_(0.37 + place % 7).sin_().to(dtype)
        made[key] = row.expand(tensor.shape).clone(memory_format=torch.contiguous_format)
        made[key].view(-1)[0] = place % 128
    return made


def total(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def evict(path: Path) -> None:
    """Take a file out of this system's page cache (what a host below caches is out of reach)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@dataclass
class World:
    """The files of a run and what is made of them; everything is made when it is first asked for.

    Attributes:
        root: an empty folder on the file system that is measured.
        size: of the model in GB.
    """

    root: Path
    size: float
    _saves: int = field(default=0)

    @cached_property
    def shape(self) -> Shape:
        return Shape.of(self.size)

    @cached_property
    def tensors(self) -> Tensors:
        """The weights, bfloat16, in ordinary memory."""
        return numbers(self.meta(), torch.bfloat16)

    @cached_property
    def nbytes(self) -> int:
        return total(self.tensors.values())

    @cached_property
    def folder(self) -> Path:
        """A checkpoint as the Hugging Face hub has it: one `model.safetensors` and `config.json`."""
        return self._checkpoint("llama", self.tensors, self.shape, "bfloat16")

    @property
    def path(self) -> Path:
        return self.folder / "model.safetensors"

    @cached_property
    def torch_path(self) -> Path:
        """The same state dict, by `torch.save`."""
        path = self.root / "model.pt"
        torch.save(self.tensors, path)
        return path

    @cached_property
    def wide_shape(self) -> Shape:
        """Half as many weights, so that float32 has as many bytes."""
        return Shape.of(self.size / 2)

    @cached_property
    def wide_folder(self) -> Path:
        """A float32 checkpoint, to be loaded as bfloat16."""
        wide = numbers(llama(self.wide_shape), torch.float32)
        return self._checkpoint("wide", wide, self.wide_shape, "float32")

    @property
    def wide_path(self) -> Path:
        return self.wide_folder / "model.safetensors"

    @cached_property
    def wide_real(self) -> nn.Module:
        """A bfloat16 module in ordinary memory that float32 weights are loaded into."""
        return _zeros(llama(self.wide_shape))

    @cached_property
    def real(self) -> nn.Module:
        """A module in ordinary memory, every page touched; shared by all who load into existing parameters."""
        return _zeros(self.meta())

    @property
    def small_count(self) -> int:
        return max(200, round(20_000 * min(self.size, 1.0)))

    @cached_property
    def small_tensors(self) -> Tensors:
        return numbers(self.small_meta(), torch.bfloat16)

    @cached_property
    def small_path(self) -> Path:
        path = self.root / "small.safetensors"
        save_file(self.small_tensors, path)
        return path

    def meta(self) -> nn.Module:
        """A module without weights."""
        return llama(self.shape)

    def wide_meta(self) -> nn.Module:
        return llama(self.wide_shape)

    def small_meta(self) -> nn.Module:
        return small_network(self.small_count)

    def module_of(self, tensors: Tensors) -> nn.Module:
        """A module that holds these tensors."""
        module = self.meta()
        module.load_state_dict(tensors, assign=True)
        return module

    def empty(self) -> Path:
        """A new folder to save into."""
        self._saves += 1
        path = self.root / f"saved-{self._saves}"
        path.mkdir()
        return path

    def _checkpoint(self, name: str, tensors: Tensors, shape: Shape, dtype: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config(shape, dtype)))
        return folder


def _zeros(meta: nn.Module) -> nn.Module:
    zeros = {key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in meta.state_dict().items()}
    for tensor in zeros.values():
        tensor.fill_(0)  # or its pages would not be there yet
    meta.load_state_dict(zeros, assign=True)
    return meta


def config(shape: Shape, dtype: str) -> dict[str, Any]:
    """`config.json` of the same network for transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
