# SPDX-License-Identifier: Apache-2.0
"""GPT-2: Conv1D weights are ``(in, out)``, the head is the embedding, and old files store causal masks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from surgery_formats.models.families.decoder import decoder, fused_attention, layer_norm, plain_mlp, pre_norm, root_of
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Embedding, Layer, Model
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY", "NAMES_ONLY", "read_gpt2_sizes"]

read_gpt2_sizes = partial(
    read_sizes,
    vocabulary=50257,
    max_positions=1024,
    hidden=768,
    inner=None,
    layers=12,
    heads=12,
    grouped=False,
    hidden_keys=("n_embd", "hidden_size"),
    inner_keys=("n_inner",),
    layers_keys=("n_layer", "num_hidden_layers"),
    heads_keys=("n_head", "num_attention_heads"),
    max_positions_keys=("n_positions", "max_position_embeddings"),
)
"""`read_sizes` with GPT-2's keys and defaults."""


def recipe(settings: ModelSettings) -> Model:
    """Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*; learned positions."""
    sizes = read_gpt2_sizes(settings)
    epsilon = settings.positive("layer_norm_epsilon", default=1e-5)
    activation = settings.activation("activation_function", default="gelu_new")
    base = sizes.head_dim**-0.5 if settings.flag("scale_attn_weights", default=True) else 1.0
    by_layer = settings.flag("scale_attn_by_inverse_layer_idx", default=False)
    settings.flag("reorder_and_upcast_attn", default=False)  # the same arithmetic, always in float32
    root = root_of(settings, "transformer.", "wte.weight")

    def layer(at: str, index: int) -> Layer:
        qkv, output, scale = f"{at}.attn.c_attn", f"{at}.attn.c_proj", base / (index + 1) if by_layer else base
        return Layer(
            fused_attention(qkv, output, sizes, bias=True, scale=scale, transposed=True),
            pre_norm(layer_norm(f"{at}.ln_1", epsilon)),
            plain_mlp(f"{at}.mlp.c_fc", f"{at}.mlp.c_proj", sizes, activation, transposed=True),
            pre_norm(layer_norm(f"{at}.ln_2", epsilon)),
        )

    final, embedding = layer_norm(f"{root}ln_f", epsilon), Embedding(f"{root}wte.weight", positions=f"{root}wpe.weight")
    return decoder(settings, sizes, f"{root}h", layer, final, embedding, tied=True)


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
