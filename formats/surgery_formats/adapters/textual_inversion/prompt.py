# SPDX-License-Identifier: Apache-2.0
"""The rows of a textual inversion as virtual tokens: they stand in the text where its token is written."""

from __future__ import annotations

from pathlib import Path

from surgery_formats.adapters.textual_inversion.read import KIND
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates import Factor, Unmerged

__all__ = ["inversion_adapter", "inversion_prompts"]


def inversion_prompts(adapter: Adapter) -> dict[str, SoftPrompt]:
    """By the text encoder that they are for; none of another adapter."""
    found = {}
    for site, chain in adapter.updates.items():
        for update in chain:
            if isinstance(update, Unmerged) and update.kind == KIND:
                (_, rows), *_ = update.held
                found[site.component] = SoftPrompt(adapter.kind, rows.tensors[0], rows.shape[0], rows.shape[1])
    return found


def inversion_adapter(path: Path, format: str, rows: Tensor, token: str, component: str) -> Adapter:
    """Rows as a textual inversion that `token` calls, for one text encoder."""
    site = Site("token_embedding.weight", component, module_kind="embedding")
    shape = (rows.shape[0], rows.shape[1])
    update = Unmerged(KIND, (("rows", Factor((rows,), shape)),), "", "", shape)
    return Adapter(path, format, "TEXTUAL_INVERSION", {site: (update,)}, (rows,), config={"token": token})
