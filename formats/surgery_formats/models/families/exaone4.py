# SPDX-License-Identifier: Apache-2.0
"""EXAONE 4: norms of queries, keys and branches; in its hybrid, only the layers with a window rotate."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, gated_mlp, llama_named, rms_norms, windows
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Branch, Layer, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """EXAONE 4 (arXiv:2507.11407): norms of queries, keys and branches; in the hybrid, layers with a window rotate."""
    sizes = read_sizes(settings, vocabulary=102400, max_positions=2048, kv_heads=32, inner=16384)
    rope, norm = read_rope(settings, sizes), rms_norms(settings, 1e-5)
    local = settings.optional_count("sliding_window", 4096)
    if settings.raw("layer_types") is None and local is not None:
        pattern = settings.count("sliding_window_pattern", default=4)
    else:
        settings.raw("sliding_window_pattern")  # also "LLLG"; the types of the layers say the same
        pattern = 1
    window = windows(settings, sizes, local, ((i + 1) % pattern != 0 for i in range(sizes.layers)))
    activation = settings.activation("hidden_act", default="silu")

    def layer(at: str, index: int) -> Layer:
        q_norm, k_norm = norm(f"{at}.self_attn.q_norm"), norm(f"{at}.self_attn.k_norm")
        own = rope if local is None or window[index] is not None else None
        return Layer(
            attention(f"{at}.self_attn", sizes, own, window=window[index], q_norm=q_norm, k_norm=k_norm),
            Branch(after=norm(f"{at}.post_attention_layernorm")),
            gated_mlp(f"{at}.mlp", sizes, activation),
            Branch(after=norm(f"{at}.post_feedforward_layernorm")),
        )

    return llama_named(settings, sizes, layer, norm)


FAMILY = Family(names=("exaone4",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
