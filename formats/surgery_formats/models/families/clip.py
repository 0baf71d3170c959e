# SPDX-License-Identifier: Apache-2.0
"""CLIP text encoders: transformers 5 dropped ``text_model.`` from the module paths, so files have both spellings."""

from surgery_formats.models.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(names=("clip_text_model", "clip"), embedding="text_model.embeddings.token_embedding")
