# SPDX-License-Identifier: Apache-2.0
"""Qwen 2 and 3 with experts, OLMoE, and models with their names: gate_proj, up_proj, down_proj per expert on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from surgery_formats.models.families.decoder import (
    attention,
    gated_mlp,
    llama_layer,
    llama_named,
    projection,
    rms_norms,
)
from surgery_formats.models.families.experts import Transformation, expert_count, expert_networks, inner_mlp, mixture
from surgery_formats.models.families.family import Family, fused_experts
from surgery_formats.models.families.recipe import MLP, Attention, Experts, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes

__all__ = ["NAMES_ONLY", "OLMOE", "QWEN2_MOE", "QWEN3_MOE"]

_sizes = partial(read_sizes, vocabulary=151936, max_positions=32768, hidden=2048, layers=24)


def qwen2_moe(settings: ModelSettings) -> Model:
    """Qwen 2 with experts: an expert for every token, behind a gate, beside those chosen (arXiv:2407.10671)."""
    sizes = _sizes(settings, kv_heads=16, heads=16, inner=5632)
    rope, norm = read_rope(settings, sizes), rms_norms(settings)
    bias = settings.flag("qkv_bias", default=True)
    _no_windows(settings, sizes)
    shared = settings.count("shared_expert_intermediate_size", default=5632)
    activation = settings.activation("hidden_act", default="silu")
    networks = {"experts": 60, "top": 4, "inner": 1408}

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, bias=bias, output_bias=False)

    def of_layer(at: str) -> dict[str, Any]:
        expert = inner_mlp(f"{at}.shared_expert", sizes.hidden, shared, activation)
        return {"shared": expert, "shared_gate": projection(f"{at}.shared_expert_gate", sizes.hidden, 1)}

    transform = _sparse(settings, sizes, networks, of_layer)
    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm, transform=transform), norm)


def qwen3_moe(settings: ModelSettings) -> Model:
    """Qwen 3 with experts, and no shared one (arXiv:2505.09388)."""
    sizes = _sizes(settings, kv_heads=4, heads=32, inner=6144)
    rope, norm = read_rope(settings, sizes), rms_norms(settings)
    bias = settings.flag("attention_bias", default=False)
    _no_windows(settings, sizes)

    def attend(at: str, index: int) -> Attention:
        q_norm, k_norm = norm(f"{at}.q_norm"), norm(f"{at}.k_norm")
        return attention(at, sizes, rope, bias=bias, q_norm=q_norm, k_norm=k_norm)

    transform = _sparse(settings, sizes, {"experts": 128, "top": 8, "inner": 768})
    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm, transform=transform), norm)


def olmoe(settings: ModelSettings) -> Model:
    """OLMoE: norms over all queries and keys at once; the weights of the chosen do not add up to one (arXiv:2409.02060)."""
    settings.only("clip_qkv")
    sizes = read_sizes(settings, vocabulary=50304, max_positions=4096, hidden=2048, inner=2048, layers=16, heads=16)
    rope, norm = read_rope(settings, sizes), rms_norms(settings, 1e-5)
    bias = settings.flag("attention_bias", default=False)

    def attend(at: str, index: int) -> Attention:
        q_norm, k_norm = norm(f"{at}.q_norm"), norm(f"{at}.k_norm")
        return attention(at, sizes, rope, bias=bias, q_norm=q_norm, k_norm=k_norm, norm_over="width")

    transform = _sparse(settings, sizes, {"experts": 64, "top": 8, "inner": sizes.inner})
    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm, transform=transform), norm)


def _no_windows(settings: ModelSettings, sizes: Sizes) -> None:
    settings.only("use_sliding_window", False)
    settings.raw("sliding_window", "max_window_layers")  # read only where windows are enabled
    settings.words("layer_types", sizes.layers, ("full_attention",))


def _sparse(
    settings: ModelSettings,
    sizes: Sizes,
    default: dict[str, int],
    of_layer: Callable[[str], dict[str, Any]] = lambda block: {},
) -> Transformation:
    """Experts in every layer but some; `of_layer` maps a layer's block to further fields of `Experts`, `default` are the family's sizes."""
    count = expert_count(settings, sizes, "num_experts", "num_local_experts", default=default["experts"])
    top = settings.count("num_experts_per_tok", default=default["top"])
    inner = settings.count("moe_intermediate_size", default=default["inner"])
    normalised = settings.flag("norm_topk_prob", default=False)
    step = settings.count("decoder_sparse_step", default=1)
    dense = settings.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(number) is int for number in dense):
        raise settings.fault("mlp_only_layers must be a list of numbers of layers")
    activation = settings.activation("hidden_act", default="silu")

    def transform(at: str, index: int) -> MLP | Experts:
        block = f"{at}.mlp"
        if index in dense or (index + 1) % step:
            return gated_mlp(block, sizes, activation)
        networks = expert_networks(settings, f"{block}.experts", count, sizes.hidden, inner, activation)
        fields = {"top": top, "normalised": normalised, **of_layer(block)}
        return mixture(settings, f"{block}.gate", sizes.hidden, networks, **fields)

    return transform


_NAMED = Family(
    names=(),
    embedding="model.embed_tokens",
    head="lm_head",
    fused=fused_experts("gate_proj", "up_proj", "down_proj"),
)
QWEN2_MOE = replace(_NAMED, names=("qwen2_moe",), recipe=qwen2_moe)
QWEN3_MOE = replace(_NAMED, names=("qwen3_moe",), recipe=qwen3_moe)
OLMOE = replace(_NAMED, names=("olmoe",), recipe=olmoe)
NAMES_ONLY = replace(
    _NAMED,
    names=("dots1", "flex_olmo", "hunyuan_v1_moe", "jamba", "longcat_flash", "exaone_moe", "cohere2_moe"),
)
