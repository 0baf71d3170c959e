# SPDX-License-Identifier: Apache-2.0
"""Phi-3 and Phi-4: q, k, v in one projection, gate and up in another, in the tree as on disk."""

from surgery_formats.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(names=("phi3", "phi4"), embedding="model.embed_tokens", head="lm_head")
