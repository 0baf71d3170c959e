# SPDX-License-Identifier: Apache-2.0
"""The rows of a textual inversion as virtual tokens: they stand in the text where its token is written."""

from __future__ import annotations

from surgery_formats.adapters.textual_inversion.read import KIND
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.updates import Unmerged

__all__ = ["inversion_prompts"]


def inversion_prompts(adapter: Adapter) -> dict[str, SoftPrompt]:
    """By the text encoder that they are for; none of another adapter."""
    found = {}
    for site, chain in adapter.updates.items():
        for update in chain:
            if isinstance(update, Unmerged) and update.kind == KIND:
                (_, rows), *_ = update.held
                found[site.component] = SoftPrompt(adapter.kind, rows.tensors[0], rows.shape[0], rows.shape[1])
    return found
