# SPDX-License-Identifier: Apache-2.0
"""GTE's multilingual embedders and rerankers: BERT's layers with rotary positions and gated MLPs."""

from __future__ import annotations

from surgery_formats.models.families.decoder import fused_attention, layer_norm, projection, root_of
from surgery_formats.models.families.encoder import encoder
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import MLP, Branch, Embedding, LanguageHead, Layer, Model, Projection
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """Zhang et al. 2024, arXiv:2407.19669; models as transformers has them."""
    sizes = read_sizes(
        settings,
        vocabulary=250048,
        max_positions=8192,
        hidden=768,
        inner=3072,
        layers=12,
        heads=12,
        grouped=False,
    )
    activation = settings.activation("hidden_act", default="gelu")
    epsilon = settings.positive("layer_norm_eps", default=1e-12)
    rope = read_rope(settings, sizes, theta=160_000.0)
    root = root_of(settings, "gte.", "embeddings.word_embeddings.weight")

    def layer(at: str) -> Layer:
        wide = projection(f"{at}.mlp.up_gate_proj", sizes.hidden, 2 * sizes.inner)
        down = projection(f"{at}.mlp.down_proj", sizes.inner, sizes.hidden, True)
        return Layer(
            fused_attention(f"{at}.attention.qkv_proj", f"{at}.attention.o_proj", sizes, rope=rope, bias=True),
            Branch(on_sum=layer_norm(f"{at}.attn_ln", epsilon)),
            MLP((wide,), down, activation, gated=True, gate_last=True),
            Branch(on_sum=layer_norm(f"{at}.mlp_ln", epsilon)),
        )

    table = f"{root}embeddings.word_embeddings.weight"
    types = settings.whole("type_vocab_size", default=1) > 0
    pooler = projection(f"{root}pooler.dense", sizes.hidden, sizes.hidden, True)

    def language() -> LanguageHead:
        tied = settings.flag("tie_word_embeddings", default=True)
        return LanguageHead(
            Projection(
                table if tied else "lm_head.decoder.weight", sizes.hidden, sizes.vocabulary, "lm_head.decoder.bias"
            ),
            projection("lm_head.dense", sizes.hidden, sizes.hidden, True),
            activation="gelu",
            norm=layer_norm("lm_head.norm", epsilon),
        )

    return encoder(
        settings,
        sizes,
        Embedding(
            table,
            types=f"{root}embeddings.token_type_embeddings.weight" if types else "",
            norm=layer_norm(f"{root}embeddings.LayerNorm", epsilon),
        ),
        (layer(f"{root}encoder.layer.{index}") for index in range(sizes.layers)),
        before=(pooler, "tanh"),
        pooler=pooler,
        language=language,
        heads={"question-answering": None},
    )


FAMILY = Family(
    names=("gte",),
    embedding="gte.embeddings.word_embeddings",
    head="lm_head.decoder",
    tied=True,
    derivable=("rotary_emb.inv_freq", "embeddings.position_ids", "embeddings.token_type_ids"),
    recipe=recipe,
)
