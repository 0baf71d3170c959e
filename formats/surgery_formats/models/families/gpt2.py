# SPDX-License-Identifier: Apache-2.0
"""GPT-2: Conv1D weights are ``(in, out)``, the head is the embedding, and old files store causal masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from surgery_formats.models.families.decoder import (
    Sizes,
    causal_only,
    decoder,
    layer_norm,
    plain_mlp,
    pre_norm,
    projection,
    root_of,
)
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Attention, Embedding, Layer, Model
from surgery_formats.models.families.settings import LAYERS, ModelSettings

__all__ = ["FAMILY", "NAMES_ONLY"]


def recipe(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*; learned positions."""
    settings = ModelSettings(config)
    causal_only(settings, "LMHeadModel", "ForCausalLM")
    sizes = _sizes(settings)
    epsilon = settings.positive("layer_norm_epsilon", default=1e-5)
    activation = settings.activation("activation_function", default="gelu_new")
    base = sizes.head_dim**-0.5 if settings.flag("scale_attn_weights", default=True) else 1.0
    by_layer = settings.flag("scale_attn_by_inverse_layer_idx", default=False)
    settings.flag("reorder_and_upcast_attn", default=False)  # the same arithmetic, always in float32
    root = root_of(names, "transformer.", "wte.weight")

    def layer(index: int) -> Layer:
        at = f"{root}h.{index}"
        return Layer(
            Attention(
                inputs=(projection(f"{at}.attn.c_attn", sizes.hidden, 3 * sizes.hidden, True, transposed=True),),
                layout="concatenated",
                output=projection(f"{at}.attn.c_proj", sizes.hidden, sizes.hidden, True, transposed=True),
                heads=sizes.heads,
                kv_heads=sizes.heads,
                head_dim=sizes.head_dim,
                scale=base / (index + 1) if by_layer else base,
            ),
            pre_norm(layer_norm(f"{at}.ln_1", epsilon)),
            plain_mlp(f"{at}.mlp.c_fc", f"{at}.mlp.c_proj", sizes.hidden, sizes.inner, activation, transposed=True),
            pre_norm(layer_norm(f"{at}.ln_2", epsilon)),
        )

    return decoder(
        settings,
        names,
        sizes,
        map(layer, range(sizes.layers)),
        layer_norm(f"{root}ln_f", epsilon),
        Embedding(f"{root}wte.weight", positions=f"{root}wpe.weight"),
        tied=True,
    )


def _sizes(settings: ModelSettings) -> Sizes:
    hidden = settings.count("n_embd", "hidden_size", default=768)
    heads = settings.count("n_head", "num_attention_heads", default=12)
    if hidden % heads:
        raise settings.fault(f"n_embd {hidden} is not a multiple of n_head {heads}")
    return Sizes(
        hidden=hidden,
        inner=settings.count("n_inner", default=4 * hidden),
        layers=settings.count("n_layer", "num_hidden_layers", default=12, most=LAYERS),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=settings.count("vocab_size", default=50257),
        max_positions=settings.count("n_positions", "max_position_embeddings", default=1024),
    )


FAMILY = Family(
    names=("gpt2",),
    embedding="transformer.wte",
    head="lm_head",
    tied=True,
    conv1d=("c_attn", "c_proj", "c_fc", "q_attn"),
    derivable=("attn.bias", "attn.masked_bias"),
    recipe=recipe,
)
NAMES_ONLY = replace(FAMILY, names=("openai-gpt", "imagegpt", "decision_transformer"), recipe=None)
