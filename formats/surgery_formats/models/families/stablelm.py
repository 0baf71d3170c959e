# SPDX-License-Identifier: Apache-2.0
"""StableLM: layer norms with biases, a quarter of each head rotated, and optionally parallel branches."""

from __future__ import annotations

from functools import partial

from surgery_formats.models.families.decoder import attention, gated_mlp, layer_norm, llama_named, pre_norm
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Branch, Layer, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """arXiv:2402.17834, with norms of queries and keys that have a gain per head."""
    sizes = read_sizes(settings, vocabulary=50304, max_positions=4096, kv_heads=32, hidden=2560, inner=6912)
    rope = read_rope(settings, sizes, partial=0.25)
    norm = partial(layer_norm, epsilon=settings.positive("layer_norm_eps", default=1e-5))
    bias = settings.flag("use_qkv_bias", default=False)
    normed = settings.flag("qk_layernorm", default=False)
    parallel = settings.flag("use_parallel_residual", default=False)
    activation = settings.activation("hidden_act", default="silu")

    def layer(at: str, index: int) -> Layer:
        q_norm, k_norm = (
            norm(f"{at}.self_attn.{which}_layernorm.norms.{{h}}", bias=False) if normed else None for which in "qk"
        )
        attend = partial(attention, q_norm=q_norm, k_norm=k_norm, norm_over="heads")
        return Layer(
            attend(f"{at}.self_attn", sizes, rope, bias=bias, output_bias=False),
            pre_norm(norm(f"{at}.input_layernorm")),
            gated_mlp(f"{at}.mlp", sizes, activation),
            Branch() if parallel else pre_norm(norm(f"{at}.post_attention_layernorm")),
            parallel=parallel,
        )

    return llama_named(settings, sizes, layer, norm)


FAMILY = Family(names=("stablelm",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
