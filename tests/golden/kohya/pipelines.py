# SPDX-License-Identifier: Apache-2.0
"""Two tiny diffusion pipelines, and what the original (sgm) code calls the modules of the second: written out, not derived."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

__all__ = ["HERE", "UNETS", "Tensors", "base_weights", "make_pipeline", "sgm_name"]

HERE = Path(__file__).resolve().parent
Tensors = dict[str, torch.Tensor]

UNETS: dict[str, dict[str, Any]] = {
    # SD1: 1x1 convolutions as proj_in/proj_out, attention in the first level.
    "sd1": {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    # SDXL: linear proj_in/proj_out, no attention in the first level, added conditioning.
    "sdxl": {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 24,
        "attention_head_dim": (1, 2),
        "norm_num_groups": 4,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 16,
    },
}
# What sits where in the SDXL UNet above (layers_per_block 2) under the names of the original (sgm) code.
SGM = {
    "conv_in": "input_blocks_0_0",
    "down_blocks_0_resnets_0": "input_blocks_1_0",
    "down_blocks_0_resnets_1": "input_blocks_2_0",
    "down_blocks_0_downsamplers_0_conv": "input_blocks_3_0_op",
    "down_blocks_1_resnets_0": "input_blocks_4_0",
    "down_blocks_1_attentions_0": "input_blocks_4_1",
    "down_blocks_1_resnets_1": "input_blocks_5_0",
    "down_blocks_1_attentions_1": "input_blocks_5_1",
    "mid_block_resnets_0": "middle_block_0",
    "mid_block_attentions_0": "middle_block_1",
    "mid_block_resnets_1": "middle_block_2",
    "up_blocks_0_resnets_0": "output_blocks_0_0",
    "up_blocks_0_attentions_0": "output_blocks_0_1",
    "up_blocks_0_resnets_1": "output_blocks_1_0",
    "up_blocks_0_attentions_1": "output_blocks_1_1",
    "up_blocks_0_resnets_2": "output_blocks_2_0",
    "up_blocks_0_attentions_2": "output_blocks_2_1",
    "up_blocks_0_upsamplers_0_conv": "output_blocks_2_2_conv",
    "up_blocks_1_resnets_0": "output_blocks_3_0",
    "up_blocks_1_resnets_1": "output_blocks_4_0",
    "up_blocks_1_resnets_2": "output_blocks_5_0",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
    "conv_out": "out_2",
}
SGM_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def sgm_name(flat: str) -> str:
    """``down_blocks_1_resnets_0_conv1`` -> ``input_blocks_4_0_in_layers_2``."""
    for ours, theirs in SGM.items():
        if flat == ours:
            return theirs
        if flat.startswith(f"{ours}_"):
            rest = flat.removeprefix(f"{ours}_")
            return f"{theirs}_{SGM_RESNET.get(rest, rest) if 'resnets' in ours else rest}"
    raise KeyError(flat)


def fill(tensors: Tensors, rng: np.random.Generator) -> Tensors:
    """The same names and shapes with seeded values (norm weights near 1); position_ids are left out."""
    out: Tensors = {}
    for key in sorted(tensors):
        if key.endswith("position_ids"):
            continue
        noise = torch.from_numpy(rng.standard_normal(tuple(tensors[key].shape)))
        is_norm = "norm" in key and key.endswith(".weight")
        out[key] = (1 + 0.1 * noise if is_norm else 0.3 * noise).float()
    return out


def make_pipeline(name: str) -> None:
    """Writes ``<name>/base``, a diffusers pipeline folder; text encoders have the names found in the wild."""
    rng = np.random.default_rng(sum(name.encode()))
    base = HERE / name / "base"
    unet = UNet2DConditionModel(**UNETS[name])
    unet.load_state_dict(fill(unet.state_dict(), rng))
    unet.save_pretrained(base / "unet")
    text: dict[str, Any] = {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "bos_token_id": 22,
        "eos_token_id": 23,
        "pad_token_id": 23,
    }
    encoders: dict[str, Any] = {"text_encoder": CLIPTextModel(CLIPTextConfig(**text, projection_dim=16))}
    if name == "sdxl":
        wide = text | {"hidden_size": 8, "intermediate_size": 12, "hidden_act": "gelu", "projection_dim": 16}
        encoders["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**wide))
    for component, model in encoders.items():
        model.save_pretrained(base / component)
        # transformers 5 writes CLIPTextModel without the level every published checkpoint has.
        named = {
            k if k.startswith(("text_model.", "text_projection.")) else f"text_model.{k}": v
            for k, v in model.state_dict().items()
        }
        save_file(fill(named, rng), base / component / "model.safetensors", metadata={"format": "pt"})
    scheduler: Any = DDIMScheduler
    scheduler().save_pretrained(base / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if name == "sdxl" else "StableDiffusionPipeline",
        "_diffusers_version": version("diffusers"),
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [None, None],
        "tokenizer": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    index |= {c: ["transformers", type(m).__name__] for c, m in encoders.items()}
    if name == "sdxl":
        index |= {"tokenizer_2": [None, None], "force_zeros_for_empty_prompt": True}
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    (base / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for config in base.glob("*/*.json"):  # drop what depends on the machine
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def base_weights(name: str) -> Tensors:
    """``component/tensor`` -> weight on disk."""
    out: Tensors = {}
    for folder in sorted((HERE / name / "base").iterdir()):
        for file in folder.glob("*.safetensors"):
            out |= {f"{folder.name}/{k}": v for k, v in load_file(file).items()}
    return out
