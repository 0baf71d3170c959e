# SPDX-License-Identifier: Apache-2.0
"""Phi 1, 1.5 and 2: parallel branches, half of each head rotated, biases everywhere, the head's too."""

from __future__ import annotations

from functools import partial

from surgery_formats.models.families.decoder import attention, layer_norm, llama_named, plain_mlp, pre_norm
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Branch, Layer, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """Phi 1, 1.5 and 2 (arXiv:2309.05463): parallel branches, half of each head rotated, biases, the head's too."""
    sizes = read_sizes(settings, vocabulary=51200, max_positions=2048, hidden=2048, inner=8192, layers=24)
    rope = read_rope(settings, sizes, partial=0.5)
    norm = partial(layer_norm, epsilon=settings.positive("layer_norm_eps", default=1e-5))
    normed = settings.flag("qk_layernorm", default=False)
    activation = settings.activation("hidden_act", default="gelu_new")

    def layer(at: str, index: int) -> Layer:
        q_norm, k_norm = (norm(f"{at}.self_attn.{which}_layernorm") if normed else None for which in "qk")
        attend = partial(attention, bias=True, output="dense", q_norm=q_norm, k_norm=k_norm)
        return Layer(
            attend(f"{at}.self_attn", sizes, rope),
            pre_norm(norm(f"{at}.input_layernorm")),
            plain_mlp(f"{at}.mlp.fc1", f"{at}.mlp.fc2", sizes, activation),
            Branch(),
            parallel=True,
        )

    return llama_named(settings, sizes, layer, norm, head_bias=True, final_name="final_layernorm")


FAMILY = Family(names=("phi",), embedding="model.embed_tokens", head="lm_head", recipe=recipe)
