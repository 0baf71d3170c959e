# SPDX-License-Identifier: Apache-2.0
"""OPT: a decoder under ``model.decoder``; old files lack the prefix ``model.``."""

from __future__ import annotations

from surgery_formats.models.families.decoder import (
    attention,
    decoder,
    layer_norm,
    plain_mlp,
    pre_norm,
    projection,
    root_of,
)
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Branch, Embedding, Layer, Model
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """Learned positions, counted from the mask; 350m has post-norm and a narrow embedding (arXiv:2205.01068)."""
    sizes = read_sizes(
        settings,
        vocabulary=50272,
        max_positions=2048,
        hidden=768,
        inner=3072,
        layers=12,
        heads=12,
        inner_keys=("ffn_dim",),
    )
    if sizes.kv_heads != sizes.heads or sizes.head_dim * sizes.heads != sizes.hidden:
        raise settings.fault("num_key_value_heads and head_dim are fixed in this family")
    narrow = settings.count("word_embed_proj_dim", default=sizes.hidden)
    before = settings.flag("do_layer_norm_before", default=True)
    bias = settings.flag("enable_bias", default=True)
    affine = settings.flag("layer_norm_elementwise_affine", default=True)
    bare = settings.flag("_remove_final_layer_norm", default=False)
    activation = settings.activation("activation_function", default="relu")
    root = root_of(settings, "model.", "decoder.embed_tokens.weight") + "decoder."

    def branch(name: str) -> Branch:
        norm = layer_norm(name, 1e-5, affine=affine)
        return pre_norm(norm) if before else Branch(on_sum=norm)

    def layer(at: str, index: int) -> Layer:
        return Layer(
            attention(f"{at}.self_attn", sizes, None, bias=bias, output="out_proj"),
            branch(f"{at}.self_attn_layer_norm"),
            plain_mlp(f"{at}.fc1", f"{at}.fc2", sizes, activation, bias=bias),
            branch(f"{at}.final_layer_norm"),
        )

    return decoder(
        settings,
        sizes,
        f"{root}layers",
        layer,
        layer_norm(f"{root}final_layer_norm", 1e-5, affine=affine) if before and not bare else None,
        Embedding(
            f"{root}embed_tokens.weight",
            positions=f"{root}embed_positions.weight",
            position_rule="mask",
            position_offset=2,
            projection=None if narrow == sizes.hidden else projection(f"{root}project_in", narrow, sizes.hidden),
        ),
        tied=True,
        before=None if narrow == sizes.hidden else projection(f"{root}project_out", sizes.hidden, narrow),
    )


FAMILY = Family(names=("opt",), embedding="model.decoder.embed_tokens", head="lm_head", tied=True, recipe=recipe)
