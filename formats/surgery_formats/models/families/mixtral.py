# SPDX-License-Identifier: Apache-2.0
"""Mixtral: separate experts on disk (w1 gate, w3 up, w2 down), fused and renamed in transformers 5."""

from surgery_formats.models.families.family import Family, Fused, Rename

__all__ = ["FAMILY"]

FAMILY = Family(
    names=("mixtral", "minimax", "minimax_m2", "phimoe"),
    embedding="model.embed_tokens",
    head="lm_head",
    renames=(Rename("mlp", "block_sparse_moe"),),
    fused=(
        Fused("experts.gate_up_proj", ("experts.{e}.w1.weight", "experts.{e}.w3.weight")),
        Fused("experts.down_proj", ("experts.{e}.w2.weight",)),
        Fused("switch_mlp.gate_proj.weight", ("experts.{e}.w1.weight",)),  # as MLX stacks them
        Fused("switch_mlp.up_proj.weight", ("experts.{e}.w3.weight",)),
        Fused("switch_mlp.down_proj.weight", ("experts.{e}.w2.weight",)),
    ),
)
