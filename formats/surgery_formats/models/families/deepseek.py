# SPDX-License-Identifier: Apache-2.0
"""DeepSeek 2 and 3: multi-head latent attention, experts chosen within groups, dense first layers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from surgery_formats.models.families.decoder import gated_mlp, llama_layer, llama_named, projection, rms_norms
from surgery_formats.models.families.experts import Transformation, expert_count, expert_networks, inner_mlp, mixture
from surgery_formats.models.families.family import Family, fused_experts
from surgery_formats.models.families.recipe import MLP, Attention, Experts, Latent, Model, Rope
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import MOST_LAYERS, ModelSettings, Sizes, read_sizes
from surgery_formats.text import show

__all__ = ["DEEPSEEK2", "DEEPSEEK3", "further_layers", "sigmoid_experts"]

_LATENT_EPSILON = 1e-6
"""Of the norms inside attention, whatever ``rms_norm_eps`` is: transformers 5.23 does not pass it on."""


def deepseek2(settings: ModelSettings) -> Model:
    """DeepSeek 2: softmax scores, groups as good as their best expert (arXiv:2405.04434)."""
    settings.only("norm_topk_prob", False)
    settings.only("scoring_func", "softmax")
    sizes = _sizes(settings, hidden=4096, inner=11008, layers=32, heads=32, vocabulary=102400, max_positions=2048)
    limited = settings.text("topk_method", default="greedy")
    if limited not in ("greedy", "group_limited_greedy"):
        raise settings.fault(f"topk_method is '{show(limited, 40)}', supported are greedy and group_limited_greedy")
    fields = {"normalised": False, "scale": settings.number("routed_scaling_factor", default=1.0)}
    if limited != "greedy":
        fields |= _groups(settings, 1, 1)
    else:
        settings.raw("n_group", "topk_group")
    settings.only("mlp_bias", False)
    transform = _after_dense(settings, sizes, fields, {"experts": 64, "inner": 1407, "shared": 2, "dense": 0, "top": 6})
    return _model(settings, sizes, transform, interleaved=True)


def deepseek3(settings: ModelSettings) -> Model:
    """DeepSeek 3: sigmoid scores, a correction of the choice, groups as good as their two best (arXiv:2412.19437)."""
    settings.only("topk_method", "noaux_tc")
    settings.only("scoring_func", "sigmoid")
    settings.only("head_dim", settings.count("qk_rope_head_dim", default=64))
    sizes = _sizes(settings, hidden=7168, inner=18432, layers=61, heads=128, vocabulary=129280, max_positions=4096)
    transform = sigmoid_experts(
        settings,
        sizes,
        {"experts": 256, "inner": 2048, "shared": 1, "dense": 3, "top": 8, "groups": 8, "best": 4},
        scale=2.5,
    )
    return _model(settings, sizes, transform, interleaved=settings.flag("rope_interleave", default=True))


def _sizes(settings: ModelSettings, **default: Any) -> Sizes:
    """The sizes, with those of a head's key."""
    rotated = settings.count("qk_rope_head_dim", default=64)
    sizes = read_sizes(settings, head_dim=rotated, **default)
    if sizes.kv_heads != sizes.heads:
        raise settings.fault("num_key_value_heads differs from num_attention_heads")
    settings.raw("qk_head_dim")
    return replace(sizes, head_dim=settings.count("qk_nope_head_dim", default=128) + rotated)


def _model(settings: ModelSettings, sizes: Sizes, transform: Transformation, *, interleaved: bool) -> Model:
    plain = settings.count("qk_nope_head_dim", default=128)
    rope = read_rope(settings, replace(sizes, head_dim=sizes.head_dim - plain), interleaved=interleaved)
    norm = rms_norms(settings)
    query_rank = settings.optional_count("q_lora_rank", 1536)
    rank, values = settings.count("kv_lora_rank", default=512), settings.count("v_head_dim", default=128)
    if values > sizes.head_dim:
        raise settings.fault(f"v_head_dim {values} is more than the {sizes.head_dim} values of a key")
    bias = settings.flag("attention_bias", default=False)
    scale = sizes.head_dim**-0.5 * _grown(rope) ** 2

    def attend(at: str, index: int) -> Attention:
        queries = sizes.heads * sizes.head_dim
        latent = Latent(
            replace(norm(f"{at}.kv_a_layernorm"), epsilon=_LATENT_EPSILON),
            projection(f"{at}.kv_b_proj", rank, sizes.heads * (plain + values)),
            plain,
            values,
        )
        first = projection(f"{at}.q_proj", sizes.hidden, queries)
        if query_rank is not None:
            first = projection(f"{at}.q_a_proj", sizes.hidden, query_rank, bias)
            second = projection(f"{at}.q_b_proj", query_rank, queries)
            q_norm = replace(norm(f"{at}.q_a_layernorm"), epsilon=_LATENT_EPSILON)
            latent = replace(latent, query_norm=q_norm, query=second)
        compress = projection(f"{at}.kv_a_proj_with_mqa", sizes.hidden, rank + rope.dims, bias)
        return Attention(
            inputs=(first, compress),
            output=projection(f"{at}.o_proj", sizes.heads * values, sizes.hidden, bias),
            heads=sizes.heads,
            kv_heads=sizes.heads,
            head_dim=sizes.head_dim,
            scale=scale,
            layout="latent",
            rope=rope,
            latent=latent,
        )

    layer = llama_layer(settings, sizes, attend, norm, transform=transform)
    return llama_named(settings, sizes, layer, norm, further_layers=further_layers(settings))


def _grown(rope: Rope) -> float:
    """The factor of YaRN's temperature (arXiv:2309.00071) on queries, and on keys."""
    factor, weight = rope.parameters.get("factor", 1.0), rope.parameters.get("mscale_all_dim", 0.0)
    return 0.1 * weight * math.log(factor) + 1.0 if rope.parameters["rope_type"] == "yarn" and factor > 1 else 1.0


def _groups(settings: ModelSettings, groups: int, best: int) -> dict[str, Any]:
    return {
        "groups": settings.count("n_group", default=groups),
        "best_groups": settings.count("topk_group", default=best),
    }


def sigmoid_experts(settings: ModelSettings, sizes: Sizes, default: dict[str, int], *, scale: float) -> Transformation:
    """The mixture of DeepSeek 3 and of models after it; `default` and `scale` are the family's."""
    fields = {
        "scoring": "sigmoid",
        "normalised": settings.flag("norm_topk_prob", default=True),
        "floor": 1e-20,
        "scale": settings.number("routed_scaling_factor", default=scale),
        "group_score": "two",
        **_groups(settings, default["groups"], default["best"]),
    }
    return _after_dense(settings, sizes, fields, default, correction="gate.e_score_correction_bias")


def _after_dense(
    settings: ModelSettings, sizes: Sizes, fields: dict[str, Any], default: dict[str, int], correction: str = ""
) -> Transformation:
    """Experts, one or several of them for every token, in all layers but the first ones."""
    settings.only("moe_layer_freq", 1)
    settings.only("ep_size", 1)
    count = expert_count(settings, sizes, "n_routed_experts", "num_local_experts", default=default["experts"])
    settings.raw("num_experts", "num_local_experts")
    top = settings.count("num_experts_per_tok", default=default["top"])
    inner = settings.count("moe_intermediate_size", default=default["inner"])
    shared = settings.whole("n_shared_experts", default=default["shared"])
    dense = settings.whole("first_k_dense_replace", default=default["dense"])
    activation = settings.activation("hidden_act", default="silu")

    def transform(at: str, index: int) -> MLP | Experts:
        block = f"{at}.mlp"
        if index < dense:
            return gated_mlp(block, sizes, activation)
        networks = expert_networks(settings, f"{block}.experts", count, sizes.hidden, inner, activation)
        return mixture(
            settings,
            f"{block}.gate",
            sizes.hidden,
            networks,
            top=top,
            precise=True,
            correction=f"{block}.{correction}" if correction else "",
            shared=inner_mlp(f"{block}.shared_experts", sizes.hidden, inner * shared, activation) if shared else None,
            **fields,
        )

    return transform


def further_layers(settings: ModelSettings) -> int:
    """Layers after the last that predict several tokens at once, which a decoder does not use."""
    return settings.whole("num_nextn_predict_layers", "num_mtp_layers", default=0, most=MOST_LAYERS)


_NAMED = Family(
    names=(),
    embedding="model.embed_tokens",
    head="lm_head",
    fused=fused_experts("gate_proj", "up_proj", "down_proj"),
)
DEEPSEEK2 = replace(_NAMED, names=("deepseek_v2",), recipe=deepseek2)
DEEPSEEK3 = replace(_NAMED, names=("deepseek_v3",), recipe=deepseek3)
