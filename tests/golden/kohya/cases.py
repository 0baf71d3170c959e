# SPDX-License-Identifier: Apache-2.0
"""What the golden files adapt: modules of the pipelines, under the keys that sd-scripts gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pipelines import base_weights, sgm_name

__all__ = ["Module", "cases"]


@dataclass(frozen=True)
class Module:
    """One adapted module: where it is in the base and what it is called in the file."""

    target: str  # component/tensor name of the weight
    key: str  # lora_unet_..., lora_te_...
    rank: int
    alpha: float | None  # None: no alpha tensor, which means alpha = rank
    mid: bool = False  # LoCon: a lora_mid core holds the kernel
    magnitude: str = ""  # "out" or "in": a dora_scale along that axis


def modules(
    name: str,
    wanted: Callable[[str], bool],
    *,
    rank: int,
    alpha: float | None,
    sgm: bool = False,
    **extra: Any,
) -> list[Module]:
    """Every Linear/Conv weight of the base whose ``component/module`` is wanted, with its sd-scripts key."""
    prefixes = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if name == "sdxl" else "lora_te",
        "text_encoder_2": "lora_te2",
    }
    out = []
    for full, weight in base_weights(name).items():
        component, tensor = full.split("/")
        module = tensor.removesuffix(".weight")
        if weight.ndim < 2 or not tensor.endswith(".weight") or not wanted(f"{component}/{module}"):
            continue
        flat = module.replace(".", "_")
        flat = sgm_name(flat) if sgm and component == "unet" else flat
        out.append(Module(full, f"{prefixes[component]}_{flat}", rank, alpha, **extra))
    if not out:
        raise ValueError("nothing matched")
    return out


def attention(path: str) -> bool:
    """What sd-scripts trains by default: Linear and 1x1 of the transformers, the text encoders' layers."""
    return (path.startswith("unet/") and "attentions" in path) or ".encoder.layers." in path


def small(path: str) -> bool:
    """A few modules of each kind."""
    return path in {
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "unet/down_blocks.0.attentions.0.proj_in",
        "unet/down_blocks.0.resnets.0.conv1",
        "unet/down_blocks.1.resnets.0.conv_shortcut",
        "unet/mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "text_encoder/text_model.encoder.layers.1.mlp.fc2",
        # diffusers takes the attention of a text encoder only if some out_proj is there (measured)
        "text_encoder/text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoder/text_model.encoder.layers.0.self_attn.out_proj",
    }


def convolution(path: str) -> bool:
    """3x3 convolutions of one level and its resampler."""
    return path in {
        "unet/down_blocks.0.resnets.0.conv1",
        "unet/down_blocks.0.resnets.1.conv2",
        "unet/down_blocks.0.downsamplers.0.conv",
        "unet/up_blocks.0.upsamplers.0.conv",
    }


def outside(path: str) -> bool:
    """SDXL: what lies outside the numbered blocks, and one of every kind inside them."""
    return path in {
        "unet/conv_in",
        "unet/conv_out",
        "unet/time_embedding.linear_1",
        "unet/time_embedding.linear_2",
        "unet/add_embedding.linear_1",
        "unet/add_embedding.linear_2",
    }


def blocks(path: str) -> bool:
    """SDXL: resnets, resamplers and attention of every numbered block, the light half of them."""
    return path.startswith("unet/") and any(
        part in path
        for part in (
            "conv_shortcut",
            "time_emb_proj",
            "samplers.0.conv",
            "attn1.to_q",
            "attn2.to_out",
            "proj_in",
            "mid_block.resnets.0.conv1",
            "down_blocks.0.resnets.1.conv2",
        )
    )


def cases() -> dict[str, tuple[str, list[Module], torch.dtype]]:
    """File -> (pipeline, modules, dtype)."""

    def te(path: str) -> bool:
        return path.startswith("text_encoder")

    def linear(path: str) -> bool:
        return small(path) and "resnets" not in path and "proj_in" not in path

    f32, f16 = torch.float32, torch.float16
    mixed = modules("sd1", linear, rank=3, alpha=1.5) + modules("sd1", convolution, rank=2, alpha=4.0)
    mixed += modules("sd1", lambda p: p == "unet/down_blocks.0.attentions.0.proj_in", rank=4, alpha=None)
    mixed += modules("sd1", lambda p: p.endswith("layers.0.mlp.fc1"), rank=4, alpha=None)
    mixed += modules("sd1", lambda p: p.endswith("layers.0.self_attn.k_proj"), rank=2, alpha=8.0)
    partial = modules("sd1", lambda p: te(p) and p.endswith(("q_proj", "v_proj")), rank=2, alpha=1.0)
    xl_te = modules("sdxl", lambda p: te(p) and "layers.1" in p, rank=2, alpha=1.0)
    xl_mixed = modules("sdxl", lambda p: p.endswith("attentions.0.transformer_blocks.1.attn2.to_v"), rank=3, alpha=6.0)
    xl_mixed += modules(
        "sdxl", lambda p: p.endswith("attentions.0.transformer_blocks.1.attn1.to_q"), rank=2, alpha=None
    )
    xl_mixed += modules("sdxl", lambda p: te(p) and p.endswith("layers.0.mlp.fc1"), rank=2, alpha=0.5)
    xl_mixed += modules("sdxl", lambda p: te(p) and p.endswith("layers.0.mlp.fc2"), rank=3, alpha=2.0)
    xl_mixed += modules("sdxl", lambda p: p == "text_encoder_2/text_projection", rank=2, alpha=1.0)
    return {
        "sd1/lora": ("sd1", modules("sd1", attention, rank=2, alpha=1.0), f32),
        "sd1/lora-fp16": ("sd1", modules("sd1", linear, rank=2, alpha=1.0), f16),
        "sd1/lora-noalpha": ("sd1", modules("sd1", linear, rank=2, alpha=None), f32),
        "sd1/conv": (
            "sd1",
            modules("sd1", lambda p: convolution(p) or (small(p) and "unet/" in p), rank=2, alpha=3.0),
            f32,
        ),
        "sd1/mixed": ("sd1", mixed, f32),
        "sd1/te-partial": ("sd1", partial, f32),
        "sd1/mid": (
            "sd1",
            modules("sd1", convolution, rank=3, alpha=1.0, mid=True) + modules("sd1", linear, rank=2, alpha=1.0),
            f32,
        ),
        "sd1/dora": ("sd1", modules("sd1", small, rank=2, alpha=1.0, magnitude="out"), f32),
        "sd1/dora-in": ("sd1", modules("sd1", small, rank=2, alpha=1.0, magnitude="in"), f32),
        "sdxl/sgm-names": (
            "sdxl",
            modules("sdxl", blocks, rank=2, alpha=1.0, sgm=True)
            + modules("sdxl", outside, rank=2, alpha=1.0, sgm=True)
            + xl_te,
            f32,
        ),
        "sdxl/diffusers-names": (
            "sdxl",
            modules("sdxl", blocks, rank=2, alpha=1.0) + modules("sdxl", outside, rank=2, alpha=1.0) + xl_te,
            f32,
        ),
        "sdxl/mixed": ("sdxl", xl_mixed, f32),
    }
