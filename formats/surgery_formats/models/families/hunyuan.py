# SPDX-License-Identifier: Apache-2.0
"""HunYuan's dense models: Llama with norms of queries and keys behind the rotation."""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Model, Rope
from surgery_formats.models.families.rope import read_rope, rope_of
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """Norms of queries and keys behind the rotation; ``dynamic`` with an ``alpha`` is a larger base and nothing dynamic."""
    sizes = read_sizes(settings, vocabulary=290943, max_positions=2048)
    rope, norm = _rope(settings, sizes), rms_norms(settings, 1e-5)
    bias = settings.flag("attention_bias", default=False)
    settings.only("use_qk_norm", True)
    settings.only("attention_head_dim", sizes.head_dim)
    settings.only("use_cla", False)
    settings.only("use_rotary_pos_emb", True)
    settings.only("mlp_bias", False)

    def attend(at: str, index: int) -> Attention:
        q_norm, k_norm = norm(f"{at}.query_layernorm"), norm(f"{at}.key_layernorm")
        record = attention(at, sizes, rope, bias=bias, q_norm=q_norm, k_norm=k_norm)
        return replace(record, norm_after_rope=True)

    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm), norm)


def _rope(settings: ModelSettings, sizes: Sizes) -> Rope:
    found = settings.mapping("rope_scaling") or settings.mapping("rope_parameters") or {}
    kind = found.get("rope_type") or found.get("type")
    alpha = found.get("alpha")
    if kind != "dynamic" or not alpha:
        return read_rope(settings, sizes)
    settings.mapping("rope_parameters")
    theta = found.get("rope_theta") or settings.positive("rope_theta", default=10000.0)
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1e30 for x in (alpha, theta)):
        raise settings.fault("alpha and rope_theta must be numbers above 0")
    if sizes.head_dim <= 2:
        raise settings.fault("alpha needs more than 2 values per head")
    base = float(theta) * float(alpha) ** (sizes.head_dim / (sizes.head_dim - 2))
    return rope_of(settings, {"rope_theta": base}, sizes)


FAMILY = Family(names=("hunyuan_v1_dense",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
