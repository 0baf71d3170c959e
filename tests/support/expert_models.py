# SPDX-License-Identifier: Apache-2.0
"""Tiny mixtures of experts of seven types, with adapters of their experts by PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles import peft_oracle

__all__ = ["EXPERTS", "MODELS", "build", "logits", "train"]

EXPERTS = 4
_COMMON = {
    "vocab_size": 65,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_QWEN = {**_COMMON, "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": EXPERTS}
_TEXT = {**_QWEN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def _config(name: str, **fields: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**fields)


MODELS: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", _config("Qwen3MoeConfig", **_QWEN)),
    "mixtral": (
        "MixtralForCausalLM",
        _config("MixtralConfig", **_COMMON, intermediate_size=24, num_local_experts=EXPERTS),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        _config(
            "GptOssConfig",
            **_COMMON,
            intermediate_size=24,
            num_local_experts=EXPERTS,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=16,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
    ),
    "olmoe": ("OlmoeForCausalLM", _config("OlmoeConfig", **_COMMON, intermediate_size=24, num_experts=EXPERTS)),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        _config(
            "DeepseekV3Config",
            **{key: value for key, value in _COMMON.items() if key not in ("head_dim", "num_key_value_heads")},
            num_key_value_heads=4,
            intermediate_size=40,
            moe_intermediate_size=24,
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
        ),
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        _config(
            "Qwen3_5MoeConfig",
            text_config={**_QWEN, "layer_types": ["full_attention"] * 2, "shared_expert_intermediate_size": 16},
            vision_config=_VISION,
        ),
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        _config("Qwen3VLMoeConfig", text_config=_TEXT, vision_config=_VISION),
    ),
}


def build(name: str, folder: Path) -> Path:
    """A model of random parameters in a new folder."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1 and "visual" not in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


def load(name: str, folder: Path) -> Any:
    """The model in `folder`, in float32."""
    return getattr(transformers, MODELS[name][0]).from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    """What it makes of a fixed text."""
    ids = torch.randint(3, 65, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def train(name: str, base: Path, folder: Path, **config: Any) -> Path:
    """A LoRA of the experts, and of attention, by PEFT, with random factors."""
    fields = {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": r".*self_attn\.o_proj",
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        **config,
    }
    with peft_oracle.quiet():
        model = peft.get_peft_model(load(name, base), peft.LoraConfig(**fields))
        peft_oracle.randomise(model, torch.Generator().manual_seed(3))
        model.save_pretrained(folder)
    return folder


def rewritten(folder: Path, to: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A folder with other tensors, and other fields in its configuration; fields that are None are left out."""
    to.mkdir()
    save_file(dict(tensors), to / "adapter_model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "adapter_config.json").read_text()) | config
    kept = {key: value for key, value in raw.items() if value is not None or key not in config}
    (to / "adapter_config.json").write_text(json.dumps(kept))
    return to
