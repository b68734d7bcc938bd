"""`skeleton`: the constructor runs, the parameters take no memory, and nothing else is different."""

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._device import DeviceContext

from funcmodel.bind import recording
from funcmodel.bind.assign import assign
from funcmodel.bind.inspect import live_tensors, module_spec
from funcmodel.bind.skeleton import skeleton
from funcmodel.core.build import live
from funcmodel.plan.loading import plan_load
from funcmodel.run.tensors import tensor_spec

BIG = 1024  # a square matrix of float32 with this side is large enough to be written down only


def plain(factory: Any, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()


def meta_parameters(module: nn.Module) -> bool:
    return all(p.is_meta for p in module.parameters()) and not any(b.is_meta for b in module.buffers())


def assert_alike(factory: Any) -> nn.Module:
    """Names, shapes, ties, flags as constructed plainly; deterministic buffers bit for bit."""
    one, two = plain(factory), skeleton(factory)
    spec, bare = module_spec(one), module_spec(two)
    assert list(spec.params) == list(bare.params)
    assert (spec.tied, spec.views, spec.modules) == (bare.tied, bare.views, bare.modules)
    found = live_tensors(two)
    for key, tensor in live_tensors(one).items():
        leaf = bare.params[key]
        assert leaf.spec == spec.params[key].spec
        assert leaf.requires_grad == spec.params[key].requires_grad
        assert type(found[key]) is type(tensor)
        if not isinstance(tensor, nn.Parameter) and leaf.random_seed is None:
            assert torch.equal(found[key], tensor), key
    return two


# -- what constructors do -------------------------------------------------------------------------------------------


@torch.jit.script
def scripted_(weight: torch.Tensor, gain: float) -> torch.Tensor:
    with torch.no_grad():
        return weight.uniform_(-gain, gain).mul_(2.0)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(BIG, BIG))
        scripted_(self.weight, 0.5)
        self.register_buffer("largest", self.weight.detach().abs().max())


def test_scripted_functions_are_recorded_too() -> None:
    bare = skeleton(Scripted)
    assert meta_parameters(bare)
    assert 0.99 < float(bare.largest) < 1.0


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
    ids=lambda f: f"{f.__module__.rpartition('.')[2]}.{f.__name__}",
)
@pytest.mark.parametrize("side", [4, 520])
def test_reparametrized_weights(wrap: Any, side: int) -> None:
    bare = assert_alike(lambda: wrap(nn.Linear(side, side)))
    assert all(p.is_meta for p in bare.parameters())


class Derived(nn.Module):
    """Buffers that are computed from a weight."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(side, side))
        with torch.no_grad():
            self.weight.mul_(3.0)[0].fill_(0.5)
        self.register_buffer("sums", self.weight.detach().sum(1), persistent=False)
        with torch.no_grad():
            self.weight.zero_()
        self.register_buffer("later", self.weight.detach()[0] + 1)


@pytest.mark.parametrize("side", [3, BIG])
def test_a_buffer_computed_from_a_weight_is_right(side: int) -> None:
    bare = assert_alike(lambda: Derived(side))
    assert bare.weight.is_meta
    assert bare.sums[:2].tolist() == [0.5 * side, 3.0 * side]


def test_an_initializer_s_arguments_are_those_of_the_time_of_the_call() -> None:
    class Copied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.other = nn.Parameter(torch.empty(BIG, BIG)), nn.Parameter(torch.ones(BIG, BIG))
            row = torch.full((BIG,), 5.0)
            with torch.no_grad():
                self.weight.copy_(row).add_(self.other)
                row.zero_()
                self.other.zero_()
            self.register_buffer("seen", self.weight.detach()[:2].clone())

    assert assert_alike(Copied).seen.tolist() == [[6.0] * BIG] * 2


@pytest.mark.parametrize("side", [3, BIG])
def test_a_view_of_a_parameter_as_buffer_stays_a_view(side: int) -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(side, side))
            self.register_buffer("row", self.weight.detach()[1], persistent=False)

    bare = assert_alike(Viewed)
    assert module_spec(bare).views.keys() == {"row"}
    assert bare.row.untyped_storage().data_ptr() == bare.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(5,), (BIG, BIG)])
def test_a_bare_parameter(shape: tuple[int, ...]) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(shape))
            self.shift = nn.Parameter(torch.randn(shape) * 0.02, requires_grad=False)
            self.shift.note = "kept"
            self.register_buffer("copied", self.scale.detach().clone())

    bare = assert_alike(Bare)
    assert meta_parameters(bare)
    assert bare.shift.note == "kept"


@pytest.mark.parametrize(
    "read",
    [
        lambda t: torch.from_numpy(t.detach().numpy().copy()),
        lambda t: torch.tensor(t.detach().tolist()),
        lambda t: torch.from_dlpack(t.detach()).clone(),
        lambda t: torch.tensor(np.asarray(t.detach())),
        lambda t: torch.tensor(float(repr(t[0, 0].item()))),
        lambda t: copy.deepcopy(t.detach()),
        lambda t: torch.frombuffer(bytearray(bytes(t.detach().untyped_storage()[:8])), dtype=torch.float32),
        lambda t: t.detach().clone().apply_(lambda x: x + 1),
    ],
    ids=["numpy", "tolist", "dlpack", "asarray", "item", "deepcopy", "storage", "apply"],
)
def test_reads_that_never_reach_the_dispatcher(read: Any) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((512, 513), 0.0))
            nn.init.constant_(self.weight, 7.0)
            self.register_buffer("seen", read(self.weight))

    bare = assert_alike(Reads)
    assert float(bare.seen.flatten()[0]) in (7.0, 8.0)


def test_what_no_parameter_owns_is_computed() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(BIG, BIG))
            self.plain = torch.full((BIG, BIG), 3.0)
            self.listed = [nn.Parameter(torch.ones(BIG, BIG))]
            self.transposed = self.weight.detach().t()

    bare = skeleton(Loose)
    assert bare.weight.is_meta
    assert float(bare.plain.min()) == 3.0
    assert float(bare.listed[0].detach().sum()) == BIG * BIG
    assert float(bare.transposed.sum()) == BIG * BIG


def test_copies_of_large_modules_are_not_computed_and_are_not_tied() -> None:
    bare = assert_alike(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 4, 2048, batch_first=True), 3))
    assert meta_parameters(bare)
    assert not module_spec(bare).tied


def test_an_lstm_still_finds_its_weights() -> None:
    bare = assert_alike(lambda: nn.LSTM(3, 4, num_layers=2))
    assert all(a is b for a, b in zip(bare._flat_weights, bare.parameters(), strict=True))


def test_hooks_that_the_constructor_registers_are_kept() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.weight.register_hook(calls.append)

    calls: list[torch.Tensor] = []
    skeleton(Hooked).weight.sum().backward()
    assert [grad.is_meta for grad in calls] == [True]


def test_what_an_initializer_refuses_is_refused() -> None:
    class Wrong(nn.Module):
        def __init__(self, act: Any) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(BIG, BIG))
            with torch.no_grad():
                act(self.weight)

    for act in (lambda w: w.normal_(0, -1.0), lambda w: w.copy_(torch.ones(3)), lambda w: w.mul_(torch.ones(2, 2))):
        with pytest.raises(RuntimeError):
            Wrong(act)
        with pytest.raises(RuntimeError):
            skeleton(Wrong, act)


def test_a_factory_that_returns_no_module_is_refused() -> None:
    with pytest.raises(TypeError):
        skeleton(dict)


# -- random numbers ----------------------------------------------------------------------------------------------------


class Drawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(BIG, BIG))
        self.register_buffer("noise", torch.randn(8))
        self.register_buffer("mask", torch.ones_like(self.noise))
        self.register_buffer("derived", self.weight.detach()[0] * 2)
        self.register_buffer("order", torch.randperm(9))
        self.register_buffer("dropped", nn.functional.dropout(torch.ones(20), 0.5))
        self.register_buffer("chosen", torch.multinomial(torch.ones(9), 3))


def test_random_buffers_have_their_seed_as_origin_and_follow_it() -> None:
    one, two, three = skeleton(Drawn), skeleton(Drawn), skeleton(Drawn, seed=1)
    seeds = {key: leaf.random_seed for key, leaf in module_spec(three).params.items()}
    random = {"noise", "derived", "order", "dropped", "chosen"}
    assert seeds == {key: 1 if key in random else None for key in seeds}
    for name in random:
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert not torch.equal(one.noise, three.noise)
    assert not torch.equal(one.noise, one.derived[:8] / 2)
    assert not torch.equal(skeleton(lambda: nn.ModuleList([Drawn(), Drawn()]))[1].noise, one.noise)


def test_a_buffer_that_was_loaded_is_no_longer_random() -> None:
    bare = skeleton(Drawn)
    tensors = {key: tensor.detach().clone() for key, tensor in Drawn().state_dict().items()}
    plan = plan_load(module_spec(bare), {key: live(key, tensor_spec(t)) for key, t in tensors.items()})
    assign(plan, bare, live=tensors)
    assert {leaf.random_seed for leaf in module_spec(bare).params.values()} == {None}


def test_what_is_read_does_not_change_what_is_drawn() -> None:
    class Peeking(nn.Module):
        def __init__(self, peek: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(BIG, BIG).normal_())
            self.other = nn.Parameter(torch.empty(BIG, BIG).uniform_())
            self.first = [float(w[0, 0]) for w in (self.weight, self.other)[:peek]]
            self.register_buffer("row", self.other.detach()[0].clone())

    assert torch.equal(skeleton(Peeking, 0).row, skeleton(Peeking, 2).row)


# -- the process -------------------------------------------------------------------------------------------------------


def process() -> tuple[Any, ...]:
    return (
        *(vars(torch.nn.init)[name] for name in sorted(vars(torch.nn.init))),
        *(vars(nn.Module)[name] for name in sorted(vars(nn.Module)) if name != "__dict__"),
        *(vars(nn.Parameter).get(name) for name in ("__new__", "__init__", "__deepcopy__")),
        *(torch.empty, torch.zeros, torch.ones, torch.randn, torch.Tensor.normal_, torch.Tensor.__torch_function__),
        *(torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        torch.utils._python_dispatch.is_in_torch_dispatch_mode(),
        torch.utils._device.CURRENT_DEVICE,
        len(torch.overrides._get_current_function_mode_stack()),
        bytes(torch.get_rng_state().tolist()),
    )


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(BIG, BIG)
        self.register_buffer("noise", torch.randn(3))
        raise LookupError


def test_law_45_the_process_is_as_it_was_also_after_an_error() -> None:
    before = process()
    skeleton(Drawn)
    assert process() == before
    assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode()
    with pytest.raises(LookupError):
        skeleton(Raises)
    assert process() == before


def test_threads_do_not_disturb_each_other_or_the_process() -> None:
    factories = [Drawn, Scripted, lambda: Derived(BIG), lambda: nn.LSTM(3, 4), lambda: nn.Linear(BIG, BIG)]
    reference = [live_tensors(skeleton(factory)) for factory in factories]
    before = process()

    def work(position: int) -> bool:
        if position % 7 == 0:
            with pytest.raises(LookupError):
                skeleton(Raises)
        real = nn.Linear(4, 4)  # a plain construction on the same thread is untouched
        found = live_tensors(skeleton(factories[position % 5]))
        expected = reference[position % 5]
        return (
            not real.weight.is_meta
            and found.keys() == expected.keys()
            and all(
                t.is_meta if e.is_meta else torch.equal(t, e)
                for t, e in zip(found.values(), expected.values(), strict=True)
            )
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(80)))
    after = process()
    assert after[:-1] == before[:-1]  # the threads' own plain modules drew from the global generator


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_outside_does_not_reach_the_constructor(device: str) -> None:
    with torch.device(device):
        bare = skeleton(Derived, 3)
    assert meta_parameters(bare)
    assert bare.sums.tolist() == [1.5, 9.0, 9.0]


@pytest.mark.parametrize("context", [torch.device, DeviceContext])  # older versions of torch only have the second
def test_a_default_device_inside_is_the_constructor_s_choice(context: Any) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with context("meta"):
                self.head = nn.BatchNorm1d(3)
            self.norm = nn.BatchNorm1d(3)

    assert skeleton(Inside).head.running_mean.is_meta
    with torch.device("cpu"):
        bare = skeleton(Inside)
    assert bare.head.running_mean.is_meta
    assert not bare.norm.running_mean.is_meta


def test_nested_skeletons() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = skeleton(Derived, BIG)
            self.weight = nn.Parameter(torch.ones(BIG, BIG))

    bare = skeleton(Outer)
    assert meta_parameters(bare)
    assert bare.inner.sums[0] == 0.5 * BIG


MEASURED = """
import resource, sys
import torch
from torch import nn
from funcmodel.bind.skeleton import skeleton
from funcmodel.core.build import live
from funcmodel.plan.loading import plan_load
from funcmodel.run.tensors import tensor_spec

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4096, 4096) for _ in range(12))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(2048, 8, 8192, batch_first=True), 3)
        self.scale = nn.Parameter(torch.randn(4096, 4096) * 0.02)
        for layer in self.layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.register_buffer("mask", torch.ones(1024, 1024))

skeleton(nn.Linear, 2, 2)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak(), anonymous()
module = skeleton(Deep)
print(peak() - before[0], anonymous() - before[1], sum(p.nbytes for p in module.parameters()) / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_the_buffers() -> None:
    out = subprocess.run([sys.executable, "-c", MEASURED], check=True, capture_output=True, text=True).stdout
    peak, held, parameters = map(float, out.split())
    assert parameters > 1400
    assert peak < 4 + 64
    assert held < 4 + 64


# -- real architectures ------------------------------------------------------------------------------------------------


def architectures() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    bert = transformers.BertConfig(**small, intermediate_size=64)
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=64)
    llama = transformers.LlamaConfig(**small, intermediate_size=64, tie_word_embeddings=True)
    return {
        "bert": lambda: transformers.BertModel(bert),
        "bert head": lambda: transformers.BertForMaskedLM(bert),
        "gpt2": lambda: transformers.GPT2LMHeadModel(gpt2),
        "llama": lambda: transformers.LlamaForCausalLM(llama),
    }


@pytest.mark.parametrize("name", ["bert", "bert head", "gpt2", "llama"])
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_transformers_models(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "PENDING_FROM", size)
    bare = assert_alike(architectures()[name])
    assert meta_parameters(bare)
    assert module_spec(bare).tied or name == "bert"
    if name == "llama":
        assert float(bare.model.rotary_emb.inv_freq[0]) == 1.0
