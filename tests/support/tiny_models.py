# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the types that the installed transformers knows, made from their configurations' defaults."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

__all__ = ["causal_types", "inputs", "model_types", "multimodal_types", "output", "tiny"]

_TASKS: Mapping[str, str] = {
    "causal": "CAUSAL_LM",
    "images": "IMAGE_TEXT_TO_TEXT",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "speech": "SPEECH_SEQ_2_SEQ",
    "ctc": "CTC",
    "audio classes": "AUDIO_CLASSIFICATION",
    "image classes": "IMAGE_CLASSIFICATION",
    "masked": "MASKED_LM",
    "any": "MULTIMODAL_LM",
    "contrast": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "video classes": "VIDEO_CLASSIFICATION",
    "text": "TEXT_ENCODING",
}
"""What a model is for, and transformers' name of the table of its classes; the first one that has a type counts."""

_SMALL: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim", "d_kv"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "bos_token_id"), 1),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("d_ff", "mlp_dim"), 48),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "text_hidden_size"), 32),
    "hidden_dim": 64,
    "vocab_size": 101,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "max_source_positions": 32,
    "num_mel_bins": 8,
}
"""Numbers that configurations have under these names, whatever their type."""

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MLA = {"qk_rope_head_dim": 8, "num_key_value_heads": 4, "qk_head_dim": 16, "head_dim": 8}
_TURNED = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS = {"rope_parameters": _TURNED | {"mrope_section": [2, 1, 1]}}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "layer_types": ["mamba", "attention"]}
_WITH_LATENTS = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3"),
    *("axk1", "axk2", "youtu"),
)
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_CONVNEXT = _STAGES | {"num_stages": 2, "patch_size": 2}
_RESNET = _STAGES | {"embedding_size": 8, "groups_width": 4, "num_groups": 4}
_LFM3 = {"layer_types": ["conv", "full_attention"]}
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 2}
_SPECIAL: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), _HYBRID | _LINEAR),
    **dict.fromkeys(_WITH_LATENTS, _MLA),
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    **dict.fromkeys(("mistral4", "mistral_large4_text", "mistral_large4", "dots3_note_text"), _MLA),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), _MLA | _HYBRID),
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "bit": _RESNET,
    "clip_vision_model": {"projection_dim": 32},
    **dict.fromkeys(("convnext", "convnextv2"), _CONVNEXT),
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "diffusion_gemma_text": {"top_k_experts": 2, "num_experts": 4},
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1], "d_inner": 48, "d_head": 8},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 101,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 101,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    },
    **dict.fromkeys(("lfm3", "lfm3_text"), _LFM3),
    "llama4_vision_model": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "mobilebert": {"embedding_size": 16},
    "molmo2_adapter": {"vision_feature_layer": [-1, 0], "vit_layers": [-1, 0]},
    "prophetnet": {"num_hidden_layers": None},
    **dict.fromkeys(("resnet", "regnet"), _RESNET),
    "roc_bert": {
        "shape_vocab_size": 50,
        "pronunciation_vocab_size": 50,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
    },
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin", "swin2sr"), _SWIN),
    "xlnet": {"max_position_embeddings": None},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "mamba", "hybrid"],
        "layer_types": ["mamba", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "qwen2_5_omni_text", "paddleocr_vl_text"),
        _SECTIONS,
    ),
    "glm4v_moe_text": {"rope_parameters": _TURNED | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "falcon": {"head_dim": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "granitemoehybrid": _MAMBA,
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8, "n_groups": 2},
}
"""Numbers that only some types need."""

_CONTRAST = ("CLIPModel", "CLIPSegModel", "SiglipModel", "IdeficsForVisionText2Text", "AlignModel")
_FRAMES_FIRST = re.compile("bert|lasr|parakeet|canary|cohere_asr|speech_to_text|granite|seamless")
_OUTPUTS = ("logits", "logits_per_text", "last_hidden_state", "end_logits")
_LARGEST = 9_000_000
_ANY = False


def _classes(task: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{_TASKS[task]}_MAPPING_NAMES")
    return found


def causal_types() -> Iterator[str]:
    """Types with a model for causal language modelling."""
    return iter(_classes("causal"))


def multimodal_types() -> Iterator[str]:
    """Types with a model of images and text."""
    return iter(_classes("images"))


def model_types() -> Iterator[str]:
    """Types of which transformers has a class for one of the tasks."""
    return iter(dict.fromkeys(name for task in _TASKS for name in _classes(task)))


def _class_of(model_type: str, first: Sequence[str]) -> Any:
    name = next(_classes(task)[model_type] for task in (*first, *_TASKS) if model_type in _classes(task))
    return getattr(transformers, name[0] if isinstance(name, tuple | list) else name)


def _default(config: Any, name: str) -> Any:
    """False where a configuration has no such number; some have one for each layer, and no other."""
    try:
        return getattr(config, name, False)
    except Exception:  # each type has an exception of its own
        return None


def _small(kind: type, special: Mapping[str, Any]) -> dict[str, Any]:
    default = kind()
    numbers = {
        name: value
        for name, value in _SMALL.items()
        if not isinstance(found := _default(default, name), bool) and isinstance(found, int | type(None))
    }
    numbers |= {name: value for name, value in special.items() if _default(default, name) is not _ANY or value is None}
    turned = _default(default, "rope_parameters")
    if isinstance(turned, dict) and "mrope_section" in turned:
        dim = numbers.get("head_dim") or numbers["hidden_size"] // numbers["num_attention_heads"]
        half = int(dim * turned.get("partial_rotary_factor", 1.0)) // 2
        numbers["rope_parameters"] = turned | {"mrope_section": [half - half // 4 * 2, half // 4, half // 4]}
    return {name: value for name, value in numbers.items() if value is not None}


def _config(model_type: str) -> Any:
    kind = transformers.CONFIG_MAPPING[model_type]
    special = _SPECIAL.get(model_type, {})
    below = {}
    default = kind()
    for name in getattr(kind, "sub_configs", {}):
        sub = getattr(default, name, None)
        if sub is not None:
            below[name] = {"model_type": sub.model_type} | _small(type(sub), _SPECIAL.get(sub.model_type, {}))
    return kind(**below | _small(kind, special))


def tiny(model_type: str, *, seed: int = 0, first: Sequence[str] = ()) -> Any:
    """A random model of a type, on the CPU in float32, in inference mode.

    Args:
        model_type: As configurations have it.
        seed: Of its numbers.
        first: Tasks whose class is taken where a type has several.
    """
    config = _config(model_type)
    composite = ("images",) if getattr(type(config), "sub_configs", {}) else ()
    made = _class_of(model_type, (*first, *composite))
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in made(config).parameters())
    if numbers > _LARGEST:
        raise ValueError(f"{numbers} parameters are no tiny model")
    torch.manual_seed(seed)
    model = made(config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.08
    model.tie_weights()
    return model


def _first(config: Any, names: Sequence[str], default: Any) -> Any:
    """The first number of a name in a configuration or in the ones that it is composed of."""
    parts = [getattr(config, name, None) for name in getattr(type(config), "sub_configs", {})]
    for one in (config, *(part for part in parts if part is not None)):
        for name in names:
            if (found := _default(one, name)) not in (False, None):
                return found
    return default


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """What a model of any type can be run on, by the names of its inputs."""
    generator = torch.Generator().manual_seed(5)
    config, name = model.config, model.main_input_name
    taken = inspect.signature(model.forward).parameters
    ids = torch.randint(3, 90, (2, 12), generator=generator)
    found = {}
    needs_images = name == "pixel_values" or type(model).__name__.endswith(_CONTRAST)
    if needs_images:
        size = _first(config, ("image_size",), 32)
        height, width = (size, size) if isinstance(size, int) else size
        frames = _first(config, ("num_frames",), 0) if "Video" in type(model).__name__ else 0
        shape = (2, *((frames,) if frames else ()), _first(config, ("num_channels",), 3), height, width)
        found["pixel_values"] = torch.randn(shape, generator=generator)
    elif name == "input_features":
        bins = _first(config, ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel"), 80)
        frames = 2 * _first(config, ("max_source_positions",), 32)
        shape = (2, frames, bins) if _FRAMES_FIRST.search(config.model_type) else (2, bins, frames)
        found[name] = torch.randn(shape, generator=generator)
    elif name == "input_values":
        found[name] = torch.randn(2, 4000, generator=generator)
    if "input_ids" in taken and (name == "input_ids" or "pixel_values" in found):
        found["input_ids"] = ids
    if "qformer_input_ids" in taken:
        found["qformer_input_ids"] = ids
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        found["decoder_input_ids"] = ids.flip(1)
    return found


def output(model: Any, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a model on `inputs`, or what it has in their place."""
    with torch.no_grad():
        found = model(**given)
    first: torch.Tensor = next(found[name] for name in _OUTPUTS if name in found)
    return first
