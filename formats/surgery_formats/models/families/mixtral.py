# SPDX-License-Identifier: Apache-2.0
"""Mixtral: separate experts on disk (w1 gate, w3 up, w2 down), fused and renamed in transformers 5."""

from surgery_formats.models.families.family import Family, Rename, fused_experts

__all__ = ["FAMILY"]

FAMILY = Family(
    names=("mixtral", "minimax", "minimax_m2", "phimoe"),
    embedding="model.embed_tokens",
    head="lm_head",
    renames=(Rename("mlp", "block_sparse_moe"),),
    fused=fused_experts("w1", "w3", "w2"),
)
