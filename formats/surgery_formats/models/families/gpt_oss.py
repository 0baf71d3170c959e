# SPDX-License-Identifier: Apache-2.0
"""gpt-oss: experts in 3-D tensors, ``(E, in, out)``, gate and up interleaved; attention sinks."""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms, windows
from surgery_formats.models.families.experts import expert_count, mixture, stacked_networks
from surgery_formats.models.families.family import Family, Fused, Rename
from surgery_formats.models.families.recipe import Attention, Experts, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def recipe(settings: ModelSettings) -> Model:
    """Windows in every second layer, a sink per head, biases everywhere, clamped experts (arXiv:2508.10925)."""
    sizes = read_sizes(
        settings,
        vocabulary=201088,
        max_positions=131072,
        hidden=2880,
        inner=2880,
        layers=36,
        heads=64,
        kv_heads=8,
        head_dim=64,
    )
    rope, norm = read_rope(settings, sizes, theta=150000.0, missing=_ROPE), rms_norms(settings, 1e-5)
    bias = settings.flag("attention_bias", default=True)
    slide = (index % 2 == 0 for index in range(sizes.layers))
    window = windows(settings, sizes, settings.optional_count("sliding_window", 128), slide)
    count = expert_count(settings, sizes, "num_local_experts", default=128)
    top = settings.count("num_experts_per_tok", "experts_per_token", default=4)
    settings.only("swiglu_alpha", 1.702)
    limit = settings.positive("swiglu_limit", default=7.0)

    def attend(at: str, index: int) -> Attention:
        record = attention(at, sizes, rope, bias=bias, window=window[index])
        return replace(record, sinks=f"{at}.sinks")

    def transform(at: str, index: int) -> Experts:
        networks = stacked_networks(
            f"{at}.mlp.experts.gate_up_proj",
            f"{at}.mlp.experts.down_proj",
            count,
            sizes.hidden,
            sizes.inner,
            "quick_gelu",
            transposed=True,
            bias=True,
            interleaved=True,
            limit=limit,
            up_plus=1.0,
        )
        return mixture(settings, f"{at}.mlp.router", sizes.hidden, networks, top=top, router_bias=True)

    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm, transform=transform), norm)


FAMILY = Family(
    names=("gpt_oss",),
    embedding="model.embed_tokens",
    head="lm_head",
    experts_transposed=True,
    gate_up_interleaved=True,
    renames=(Rename("self_attn", "attn"),),  # Tinker's name (tinker-cookbook, weights/_merge_gpt_oss.py)
    numbered=(  # Unsloth holds each expert as a Linear where it quantises them (unsloth-zoo#885)
        Fused("experts.gate_up_proj", ("experts.gate_up_projs.{e}.weight",)),
        Fused("experts.down_proj", ("experts.down_projs.{e}.weight",)),
    ),
    recipe=recipe,
)
