# SPDX-License-Identifier: Apache-2.0
"""gpt-oss: experts in 3-D tensors, ``(E, in, out)``, gate and up interleaved."""

from surgery_formats.models.families.family import Family, Fused, Rename

__all__ = ["FAMILY"]

FAMILY = Family(
    names=("gpt_oss",),
    embedding="model.embed_tokens",
    head="lm_head",
    experts_transposed=True,
    gate_up_interleaved=True,
    renames=(Rename("self_attn", "attn"),),  # Tinker's name (tinker-cookbook, weights/_merge_gpt_oss.py)
    numbered=(  # Unsloth holds each expert as a Linear where it quantises them (unsloth-zoo#885)
        Fused("experts.gate_up_proj", ("experts.gate_up_projs.{e}.weight",)),
        Fused("experts.down_proj", ("experts.down_projs.{e}.weight",)),
    ),
)
