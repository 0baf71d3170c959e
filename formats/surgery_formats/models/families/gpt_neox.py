# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX and Pythia: transformers 5 names the head ``lm_head``, checkpoints name it ``embed_out``."""

from __future__ import annotations

from surgery_formats.models.families.decoder import decoder, fused_attention, layer_norm, plain_mlp, pre_norm, root_of
from surgery_formats.models.families.family import Family, Rename
from surgery_formats.models.families.recipe import Embedding, Layer, Model, Rope
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """Parallel branches, a quarter of each head rotated, q, k and v interleaved by head (arXiv:2204.06745)."""
    settings.only("is_decoder", False, True)
    sizes = read_sizes(settings, vocabulary=50432, max_positions=2048, hidden=6144, inner=24576, layers=44, heads=64)
    if sizes.kv_heads != sizes.heads or sizes.head_dim * sizes.heads != sizes.hidden:
        raise settings.fault("num_key_value_heads and head_dim are fixed in this family")
    rope = _rope(settings, sizes)
    epsilon = settings.positive("layer_norm_eps", default=1e-5)
    bias = settings.flag("attention_bias", default=True)
    parallel = settings.flag("use_parallel_residual", default=True)
    activation = settings.activation("hidden_act", default="gelu")
    root = root_of(settings, "gpt_neox.", "embed_in.weight")

    def layer(at: str, index: int) -> Layer:
        qkv, output = f"{at}.attention.query_key_value", f"{at}.attention.dense"
        return Layer(
            fused_attention(qkv, output, sizes, layout="by_head", rope=rope, bias=bias),
            pre_norm(layer_norm(f"{at}.input_layernorm", epsilon)),
            plain_mlp(f"{at}.mlp.dense_h_to_4h", f"{at}.mlp.dense_4h_to_h", sizes, activation),
            pre_norm(layer_norm(f"{at}.post_attention_layernorm", epsilon)),
            parallel=parallel,
        )

    return decoder(
        settings,
        sizes,
        f"{root}layers",
        layer,
        layer_norm(f"{root}final_layer_norm", epsilon),
        Embedding(f"{root}embed_in.weight"),
        head="lm_head" if "lm_head.weight" in settings.names else "embed_out",
    )


def _rope(settings: ModelSettings, sizes: Sizes) -> Rope:
    """The family's own keys are ``rotary_emb_base`` and ``rotary_pct``."""
    theta = settings.positive("rotary_emb_base", default=10000.0)
    fraction = settings.positive("rotary_pct", default=0.25)
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", fraction)):
        if settings.raw(key) is not None and settings.number(key, default=value) != value:
            raise settings.fault(f"{key} differs from rotary_emb_base or rotary_pct, which this family uses")
    return read_rope(settings, sizes, theta=theta, partial=fraction)


FAMILY = Family(
    names=("gpt_neox",),
    embedding="gpt_neox.embed_in",
    head="embed_out",
    renames=(Rename("lm_head", "embed_out"),),
    derivable=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
    recipe=recipe,
)
