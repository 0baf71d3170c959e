# SPDX-License-Identifier: Apache-2.0
"""Families of diffusers' pipelines: tiny sizes of their denoisers, and what each is run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["FAMILIES", "TOKENS", "Family", "denoiser_of", "draw", "given"]

TOKENS = 5


@dataclass(frozen=True)
class Family:
    """A family of pipelines.

    Attributes:
        pipeline: Its class.
        model: The denoiser's class.
        sizes: Its configuration.
        given: What it is run on.
        network: Its family in the rules for names, and the function of diffusers' that converts a release.
    """

    pipeline: str
    model: str
    sizes: Mapping[str, Any]
    given: Callable[[Any], Mapping[str, Any]]
    network: tuple[str, str] | None = None


def draw(*sizes: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def _ids(count: int, axes: int) -> torch.Tensor:
    return torch.arange(count * axes).reshape(count, axes).float() % 4


def _unet(model: Any) -> Mapping[str, Any]:
    given: dict[str, Any] = {"sample": draw(1, 4, 8, 8), "timestep": 7}
    given["encoder_hidden_states"] = draw(1, TOKENS, model.config.cross_attention_dim, seed=2)
    if model.config.addition_embed_type:
        given["added_cond_kwargs"] = {"text_embeds": draw(1, 16, seed=3), "time_ids": draw(1, 6, seed=4).abs()}
    return given


def _sd3(model: Any) -> Mapping[str, Any]:
    c = model.config
    return {
        "hidden_states": draw(1, 4, 8, 8),
        "encoder_hidden_states": draw(1, TOKENS, c.joint_attention_dim, seed=2),
        "pooled_projections": draw(1, c.pooled_projection_dim, seed=3),
        "timestep": torch.tensor([7.0]),
    }


def _flux(model: Any) -> Mapping[str, Any]:
    c, axes = model.config, len(model.config.axes_dims_rope)
    found = {
        "hidden_states": draw(1, 16, c.in_channels),
        "encoder_hidden_states": draw(1, TOKENS, c.joint_attention_dim, seed=2),
        "timestep": torch.tensor([0.7]),
        "img_ids": _ids(16, axes),
        "txt_ids": _ids(TOKENS, axes),
    }
    if "pooled_projection_dim" in c:
        found["pooled_projections"] = draw(1, c.pooled_projection_dim, seed=3)
    if c.get("guidance_embeds"):
        found["guidance"] = torch.tensor([3.0])
    return found


def _wan(model: Any) -> Mapping[str, Any]:
    c = model.config
    found = {"hidden_states": draw(1, c.in_channels, 2, 4, 4), "timestep": torch.tensor([7])}
    found["encoder_hidden_states"] = draw(1, TOKENS, c.text_dim, seed=2)
    if c.image_dim:
        found["encoder_hidden_states_image"] = draw(1, 3, c.image_dim, seed=3)
    return found


def _qwen(model: Any) -> Mapping[str, Any]:
    c = model.config
    return {
        "hidden_states": draw(1, 16, c.in_channels),
        "encoder_hidden_states": draw(1, TOKENS, c.joint_attention_dim, seed=2),
        "encoder_hidden_states_mask": torch.ones(1, TOKENS, dtype=torch.bool),
        "timestep": torch.tensor([0.7]),
        "img_shapes": [[(1, 4, 4)]],
    }


def _z_image(model: Any) -> Mapping[str, Any]:
    c = model.config
    return {
        "x": [draw(c.in_channels, 1, 8, 8)],
        "t": torch.tensor([0.7]),
        "cap_feats": [draw(TOKENS, c.cap_feat_dim, seed=2)],
    }


def _hunyuan(model: Any) -> Mapping[str, Any]:
    c = model.config
    return {
        "hidden_states": draw(1, c.in_channels, 1, 4, 4),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": draw(1, TOKENS, c.text_embed_dim, seed=2),
        "encoder_attention_mask": torch.ones(1, TOKENS),
        "pooled_projections": draw(1, c.pooled_projection_dim, seed=3),
        "guidance": torch.tensor([3.0]),
    }


def _ltx(model: Any) -> Mapping[str, Any]:
    c = model.config
    found = {
        "hidden_states": draw(1, 16, c.in_channels),
        "encoder_hidden_states": draw(1, TOKENS, c.caption_channels, seed=2),
        "timestep": torch.tensor([7]),
        "encoder_attention_mask": torch.ones(1, TOKENS),
    }
    return found | {"num_frames": 1, "height": 4, "width": 4}


def _lumina(model: Any) -> Mapping[str, Any]:
    c = model.config
    return {
        "hidden_states": draw(1, c.in_channels, 8, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": draw(1, TOKENS, c.cap_feat_dim, seed=2),
        "encoder_attention_mask": torch.ones(1, TOKENS, dtype=torch.bool),
    }


_UNET: Mapping[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_XL: Mapping[str, Any] = {
    **_UNET,
    "block_out_channels": (32, 64, 64),
    "cross_attention_dim": 48,
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
_FLUX: Mapping[str, Any] = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
_STABLE = ("Stable Diffusion 1, 2 or XL", "convert_ldm_unet_checkpoint")
_LAYERS: Mapping[str, Any] = {"num_layers": 2, "num_attention_heads": 2}
_WAN: Mapping[str, Any] = {
    **_LAYERS,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 48,
    "rope_max_seq_len": 32,
}

FAMILIES: Mapping[str, Family] = {
    "sd15": Family("StableDiffusionPipeline", "UNet2DConditionModel", _UNET, _unet, _STABLE),
    "sdxl": Family("StableDiffusionXLPipeline", "UNet2DConditionModel", _XL, _unet, _STABLE),
    "sd3": Family(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
            **_LAYERS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
        },
        _sd3,
        ("Stable Diffusion 3", "convert_sd3_transformer_checkpoint_to_diffusers"),
    ),
    "flux": Family(
        "FluxPipeline",
        "FluxTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 16, "guidance_embeds": True},
        _flux,
    ),
    "flux-wide": Family(  # as wide as the published model, whose widths conversions of files by trainers have in them
        "FluxPipeline",
        "FluxTransformer2DModel",
        {
            **_FLUX,
            "num_single_layers": 1,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "axes_dims_rope": (16, 56, 56),
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
        },
        _flux,
    ),
    "chroma": Family(
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        {**_FLUX, "approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1},
        _flux,
    ),
    "flux2": Family(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        _flux,
        ("Flux 2", "convert_flux2_transformer_checkpoint_to_diffusers"),
    ),
    "wan": Family(
        "WanPipeline",
        "WanTransformer3DModel",
        _WAN,
        _wan,
        ("Wan", "convert_wan_transformer_to_diffusers"),
    ),
    "wan-i2v": Family(
        "WanImageToVideoPipeline",
        "WanTransformer3DModel",
        {**_WAN, "image_dim": 24, "added_kv_proj_dim": 32},
        _wan,
        ("Wan", "convert_wan_transformer_to_diffusers"),
    ),
    "qwen-image": Family(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {
            **_LAYERS,
            "in_channels": 16,
            "out_channels": 4,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen,
        ("Qwen-Image", ""),
    ),
    "z-image": Family(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 24,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 64, 64],
        },
        _z_image,
        ("Z-Image", "convert_z_image_transformer_checkpoint_to_diffusers"),
    ),
    "hunyuan-video": Family(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "pooled_projection_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        _hunyuan,
    ),
    "ltx": Family(
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        {
            **_LAYERS,
            "in_channels": 8,
            "out_channels": 8,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 24,
        },
        _ltx,
        ("LTX-Video", "convert_ltx_transformer_checkpoint_to_diffusers"),
    ),
    "lumina2": Family(
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 24,
        },
        _lumina,
    ),
}


def denoiser_of(pipe: Any) -> str:
    """Which part of a pipeline it is."""
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def given(model: Any) -> Mapping[str, Any]:
    """What a denoiser of one of the families is run on."""
    family = next(one for one in FAMILIES.values() if one.model == type(model).__name__)
    return family.given(model)
