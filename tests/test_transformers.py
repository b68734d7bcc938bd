"""Agreement with transformers on real architectures: what it saves we load, what we save it loads, leaf for leaf."""

import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import funcmodel as fm

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", minversion="5")
from transformers.models.auto import configuration_auto, modeling_auto  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ARCHITECTURES = """
aimv2_vision_model albert apertus arcee aria_text audio-spectrogram-transformer audioflamingo3_encoder bailing_hybrid
bart beam beit bert bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small blip_2_qformer
bloom bros camembert chinese_clip_vision_model clip_text_model clip_vision_model codegen cohere cohere2 cohere2_moe
convbert cosmos3_edge_vision cwm data2vec-text data2vec-vision deberta deberta-v2 decision_transformer deit diffllama
dinov2 dinov2_with_registers dinov3_vit distilbert doge dpr dpt electra ernie ernie4_5 ernie4_5_moe eurobert exaone4
exaone4_5_vision exaone_moe falcon_h1 falcon_mamba flaubert flex_olmo flint fnet fun_asr_nano_encoder gemma gemma2
gemma3_text gemma3n_audio gemma4_audio glm glm4 glm4_moe glm4v_moe_text glm4v_text glm_image_text glm_image_vision
glm_ocr_text glmasr_encoder gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite
granite_docling_text granite_swa granitemoe granitemoe_swa granitemoeshared gte helium higgs_audio_v2 hrm_text hy_v3
hyperclovax ibert idefics3_vision ijepa imagegpt internlm3 internvl_vision iquestcoder jais2 jamba jetmoe
jina_embeddings_v3 kimi_k25_vision kolibri1 laguna lasr_encoder layoutlm layoutlmv3 lfm2 lfm3 lfm3_vl_vision lilt
llama llama4_text longformer longt5 lxmert m2m_100 mamba marian mbart megatron-bert mellum mimo_v2_flash
minicpm_ocr_vision minicpmv4_7_vision minimax minimax_m2 ministral3 mistral mixtral mlcd mlcd_vision_model mobilebert
modernbert modernbert-decoder molmo2_text moonshine moshi moss_transcribe_diarize_audio mpnet mpt mra mt5
muse_glimmer_assistant muse_glimmer_text muse_glimmer_vision muse_spark_vision mvp nanochat
nemotron3_5_transcribe_asr_audio nemotron3_diarization_audio nemotron_asr_streaming_encoder nllb-moe nomic_bert
nystromformer olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt openai_privacy_filter opt parakeet_encoder patchtsmixer
patchtst pegasus pegasus_x persimmon phi phi3 phimoe pixio pixtral plbart qianfan_ocr_vision qwen2 qwen2_5_vl_text
qwen2_5_vl_vision qwen2_audio_encoder qwen2_vl_text qwen3 qwen3_5_moe_vision qwen3_5_vision qwen3_moe
qwen3_vl_moe_text qwen3_vl_text qwen4_exp_vision recurrent_gemma rembert roberta roberta-prelayernorm roformer rwkv
sam3_lite_text_text_model sam3_vit_model sapiens2 seamless_m4t seamless_m4t_v2 seed_oss segformer seggpt
siglip2_vision_model siglip_vision_model smollm3 smolvlm_vision solar_open speecht5 splinter squeezebert stablelm
starcoder2 switch_transformers t5 tapas timesfm timesfm2_5 timesformer tipsv2_text_model tipsv2_vision_model udop
ultrabert umt5 vaultgemma video_llama_3_vision videomae videoprism_vision_model vilt visual_bert vit vit_mae vit_msn
vitdet vivit voxtral_encoder voxtral_realtime_encoder wav2vec2-bert whisper xglm xlm xlm-roberta xlm-roberta-xl xlstm
xmod yolos yoso
""".split()  # noqa: SIM905 - a list would take a screen of its own

# Parameters that a constructor freezes and transformers' from_pretrained thaws; funcmodel keeps them frozen.
THAWED = {
    "audioflamingo3_encoder": {"embed_positions.weight"},
    "ernie4_5_moe": {"model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"},
    "laguna": {"model.layers.1.mlp.gate.e_score_correction_bias"},
    "marian": {"model.decoder.embed_positions.weight"},
    "moss_transcribe_diarize_audio": {"embed_positions.weight"},
    "patchtst": {"encoder.positional_encoder.position_enc"},
    "pegasus": {"model.decoder.embed_positions.weight"},
    "qwen2_audio_encoder": {"embed_positions.weight"},
    "roformer": {"roformer.encoder.embed_positions.weight"},
    "vit_mae": {"embeddings.position_embeddings"},
    "voxtral_encoder": {"embed_positions.weight"},
}

# Sizes that make a default configuration small; each is set where the configuration has an int of that name.
WIDTH = ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim")
INNER = ("intermediate_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim")
DEPTH = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_layers",
    "num_decoder_layers",
)
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
SIZES = {
    **dict.fromkeys(WIDTH, 32),
    **dict.fromkeys(INNER, 48),
    **dict.fromkeys(DEPTH, 2),
    **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(EXPERTS, 4),
    **{"num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
    **{"vocab_size": 99, "max_position_embeddings": 64, "image_size": 32, "patch_size": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


SAME = {(False, False), (True, True)}


def architecture(model_type: str) -> tuple[type[nn.Module], Any]:
    """The model class with the most interesting ties, and a small configuration of it."""
    kinds = ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MASKED_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL")
    tables = (getattr(modeling_auto, f"{kind}_MAPPING_NAMES") for kind in kinds)
    name = next(names for table in tables if (names := table.get(model_type)))
    config_class = configuration_auto.CONFIG_MAPPING[model_type]
    default = config_class()
    sizes = {k: v for k, v in SIZES.items() if type(getattr(default, k, None)) is int}
    return getattr(transformers, name if isinstance(name, str) else name[0]), config_class(**sizes)


def build(model_type: str) -> nn.Module:
    """A model whose leaves all differ from what any initializer would give."""
    cls, config = architecture(model_type)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) if p.is_floating_point() else 0)
            persistent = set(model.state_dict())
            for name, b in model.named_buffers():
                if name in persistent and b.is_floating_point():
                    b.add_(torch.rand_like(b))
    return model


def leaves(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def ties(model: nn.Module) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, leaf in leaves(model):
        groups.setdefault(id(leaf), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def differences(ours: nn.Module, theirs: nn.Module, *, thawed: frozenset[str] = frozenset()) -> set[str]:
    """Names of leaves that differ in presence, bits, dtype, device or `requires_grad`; and ties that differ.

    Those in `thawed` must differ in `requires_grad`, and in nothing else.
    """
    a, b = dict(leaves(ours)), dict(leaves(theirs))
    found = set(a) ^ set(b)
    for name in set(a) & set(b):
        same = (
            a[name].dtype == b[name].dtype
            and a[name].device == b[name].device
            and (a[name].requires_grad, b[name].requires_grad) in ({(False, True)} if name in thawed else SAME)
            and torch.equal(a[name].detach().flatten().view(torch.uint8), b[name].detach().flatten().view(torch.uint8))
        )
        found |= set() if same else {name}
    return found | {" = ".join(sorted(group)) for group in ties(ours) ^ ties(theirs)}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_both_ways(model_type: str, tmp_path: Path) -> None:
    cls, config = architecture(model_type)
    original = build(model_type)

    # save_original_format=False keeps the names of the state dict, where transformers has a mapping to older names.
    original.save_pretrained(tmp_path / "theirs", save_original_format=False)
    reference = cls.from_pretrained(tmp_path / "theirs").eval()
    loaded = fm.load(fm.skeleton(cls, config), tmp_path / "theirs")
    thawed = frozenset(THAWED.get(model_type, ()))
    assert differences(loaded, original) == set()
    assert differences(loaded, reference, thawed=thawed) == set()

    saved_config = json.loads((tmp_path / "theirs" / "config.json").read_text("utf-8"))
    fm.save(original, tmp_path / "ours", max_shard_size="100KB", config=saved_config)
    assert differences(original, cls.from_pretrained(tmp_path / "ours").eval(), thawed=thawed) == set()


def test_at_least_a_hundred() -> None:
    assert len(set(ARCHITECTURES)) == len(ARCHITECTURES) >= 100
    assert inspect.isgeneratorfunction(leaves)
