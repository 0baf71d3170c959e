# SPDX-License-Identifier: Apache-2.0
"""ERNIE 4.5 with experts: softmax scores with a correction of the choice, neighbours as rotary pairs."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, gated_mlp, llama_layer, llama_named, rms_norms
from surgery_formats.models.families.deepseek import further_layers
from surgery_formats.models.families.experts import expert_count, expert_networks, inner_mlp, mixture
from surgery_formats.models.families.family import Family, fused_experts
from surgery_formats.models.families.recipe import MLP, Attention, Experts, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """Experts in every layer from ``moe_layer_start_index`` to ``moe_layer_end_index``."""
    sizes = read_sizes(
        settings,
        vocabulary=103424,
        max_positions=131072,
        hidden=2560,
        inner=12288,
        layers=28,
        heads=20,
        kv_heads=4,
    )
    rope = read_rope(settings, sizes, theta=500_000.0, interleaved=True)
    norm = rms_norms(settings, 1e-5)
    settings.only("use_bias", False)
    count = expert_count(settings, sizes, "moe_num_experts", default=64)
    top = settings.count("moe_k", default=6)
    inner = settings.count("moe_intermediate_size", default=1536)
    shared = settings.whole("moe_num_shared_experts", default=2)
    first = settings.whole("moe_layer_start_index", default=1)
    last = settings.raw("moe_layer_end_index")
    interval = settings.count("moe_layer_interval", default=1)
    floor = settings.positive("moe_norm_min", default=1e-12)
    if last is not None and type(last) is not int:
        raise settings.fault("moe_layer_end_index must be a whole number")
    until = sizes.layers - 1 if last is None or last == -1 else last
    activation = settings.activation("hidden_act", default="silu")

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope)

    def transform(at: str, index: int) -> MLP | Experts:
        block = f"{at}.mlp"
        if (index + 1) % interval or not first <= index <= until:
            return gated_mlp(block, sizes, activation)
        networks = expert_networks(settings, f"{block}.experts", count, sizes.hidden, inner, activation)
        return mixture(
            settings,
            f"{block}.gate",
            sizes.hidden,
            networks,
            top=top,
            floor=floor,
            precise=True,
            correction=f"{block}.moe_statics.e_score_correction_bias",
            correction_row=True,
            shared=inner_mlp(f"{block}.shared_experts", sizes.hidden, inner * shared, activation) if shared else None,
        )

    layer = llama_layer(settings, sizes, attend, norm, transform=transform)
    return llama_named(settings, sizes, layer, norm, tied=True, further_layers=further_layers(settings))


FAMILY = Family(
    names=("ernie4_5_moe",),
    embedding="model.embed_tokens",
    head="lm_head",
    tied=True,
    fused=fused_experts("gate_proj", "up_proj", "down_proj"),
    recipe=recipe,
)
