# SPDX-License-Identifier: Apache-2.0
"""Bloom and Falcon: the head is the embedding."""

from surgery_formats.models.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(names=("bloom", "falcon"), embedding="transformer.word_embeddings", head="lm_head", tied=True)
