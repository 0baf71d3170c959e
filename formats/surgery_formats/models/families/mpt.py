# SPDX-License-Identifier: Apache-2.0
"""MPT: ALiBi, norms without biases, bounded queries, keys and values; the head is the embedding."""

from __future__ import annotations

from functools import partial

from surgery_formats.models.families.alibi import mpt_slopes
from surgery_formats.models.families.decoder import decoder, fused_attention, layer_norm, plain_mlp, pre_norm, root_of
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Alibi, Embedding, Layer, Model
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """MosaicML 2023, *MPT-7B*: ALiBi; transformers has no other attention than this."""
    sizes = read_sizes(
        settings,
        vocabulary=50368,
        max_positions=2048,
        hidden=2048,
        inner=None,
        layers=24,
        heads=16,
        grouped=False,
        hidden_keys=("d_model", "hidden_size"),
        inner_keys=(),  # always four times the width, see `expansion_ratio`
        layers_keys=("n_layers", "num_hidden_layers"),
        heads_keys=("n_heads", "num_attention_heads"),
        max_positions_keys=("max_seq_len",),
    )
    settings.only("expansion_ratio", 4)
    settings.only("no_bias", True)
    settings.only("embedding_fraction", 1, 1.0)
    settings.only("logit_scale")
    settings.text("norm_type", default="low_precision_layernorm")
    inner = ModelSettings({"model_type": "mpt", **(settings.mapping("attn_config") or {})})
    inner.only("attn_type", "multihead_attention")
    inner.only("alibi", True)
    inner.only("qk_ln", False)
    inner.only("prefix_lm", False)
    inner.only("alibi_bias_max", 8)  # transformers has no other, whatever the file says
    alibi = Alibi(mpt_slopes(sizes.heads))
    scale = inner.optional_positive("softmax_scale")
    clip = inner.optional_positive("clip_qkv")
    inner.finish()
    norm = partial(layer_norm, epsilon=settings.positive("layer_norm_epsilon", default=1e-5), bias=False)

    def layer(at: str, index: int) -> Layer:
        return Layer(
            fused_attention(f"{at}.attn.Wqkv", f"{at}.attn.out_proj", sizes, scale=scale, alibi=alibi, clip=clip),
            pre_norm(norm(f"{at}.norm_1")),
            plain_mlp(f"{at}.ffn.up_proj", f"{at}.ffn.down_proj", sizes, "gelu", bias=False),
            pre_norm(norm(f"{at}.norm_2")),
        )

    root = root_of(settings, "transformer.", "wte.weight")
    embedding = Embedding(f"{root}wte.weight")
    return decoder(settings, sizes, f"{root}blocks", layer, norm(f"{root}norm_f"), embedding, tied=True)


FAMILY = Family(names=("mpt",), embedding="transformer.wte", head="lm_head", tied=True, recipe=recipe)
