# SPDX-License-Identifier: Apache-2.0
"""Mixtral: separate experts on disk (w1 gate, w3 up, w2 down), fused and renamed in transformers 5."""

from __future__ import annotations

from surgery_formats.models.families.decoder import attention, llama_layer, llama_named, rms_norms
from surgery_formats.models.families.experts import expert_count, expert_networks, mixture
from surgery_formats.models.families.family import Family, Rename, fused_experts
from surgery_formats.models.families.recipe import Attention, Experts, Model
from surgery_formats.models.families.rope import read_rope
from surgery_formats.models.families.settings import ModelSettings, read_sizes

__all__ = ["MIXTRAL", "NAMES_ONLY"]


def recipe(settings: ModelSettings) -> Model:
    """Mistral's attention; the weights of the chosen experts add up to one (arXiv:2401.04088)."""
    sizes = read_sizes(settings, vocabulary=32000, max_positions=4096 * 32, kv_heads=8, inner=14336)
    rope, norm = read_rope(settings, sizes, theta=1e6), rms_norms(settings, 1e-5)
    window = settings.optional_count("sliding_window")
    count = expert_count(settings, sizes, "num_local_experts", default=8)
    top = settings.count("num_experts_per_tok", default=2)
    activation = settings.activation("hidden_act", default="silu")

    def attend(at: str, index: int) -> Attention:
        return attention(at, sizes, rope, window=window)

    def transform(at: str, index: int) -> Experts:
        block = f"{at}.block_sparse_moe"
        block = block if f"{block}.gate.weight" in settings.names else f"{at}.mlp"
        names = ("w1", "w3", "w2") if block.endswith("moe") else ("gate_proj", "up_proj", "down_proj")
        networks = expert_networks(
            settings, f"{block}.experts", count, sizes.hidden, sizes.inner, activation, names=names
        )
        return mixture(settings, f"{block}.gate", sizes.hidden, networks, top=top)

    return llama_named(settings, sizes, llama_layer(settings, sizes, attend, norm, transform=transform), norm)


MIXTRAL = Family(
    names=("mixtral",),
    embedding="model.embed_tokens",
    head="lm_head",
    renames=(Rename("mlp", "block_sparse_moe"),),
    fused=fused_experts("w1", "w3", "w2"),
    recipe=recipe,
)
NAMES_ONLY = Family(
    names=("minimax", "minimax_m2", "phimoe"),
    embedding="model.embed_tokens",
    head="lm_head",
    renames=(Rename("mlp", "block_sparse_moe"),),
    fused=fused_experts("w1", "w3", "w2"),
)
