# SPDX-License-Identifier: Apache-2.0
"""Retrieval by late interaction over vision-language models: ColPali and its kin."""

from __future__ import annotations

from surgery_formats.models.families.family import Family, Rename

__all__ = ["RETRIEVAL"]

RETRIEVAL = Family(
    names=("colpali", "colqwen2"),
    renames=(Rename("embedding_proj_layer", "custom_text_proj"),),  # colpali-engine's name, in published adapters
)
