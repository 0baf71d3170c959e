# SPDX-License-Identifier: Apache-2.0
"""T5: one embedding for encoder and decoder, and (v1.0) for the head."""

from surgery_formats.models.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    names=("t5", "mt5", "umt5"),
    embedding="shared",
    head="lm_head",
    tied=True,
    inseparable="transformers scales T5's last hidden state by d_model ** -0.5 only while the head is tied",
    ties=(("encoder.embed_tokens.weight", "shared.weight"), ("decoder.embed_tokens.weight", "shared.weight")),
)
