# SPDX-License-Identifier: Apache-2.0
"""A head that config.json says is tied, while the file has one with other values."""

from __future__ import annotations

from surgery_formats.binding.tied_edits import same_values
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.models.families.recipe import LanguageHead, Model

__all__ = ["check_tied_head"]


def check_tied_head(component: Component, model: Model) -> None:
    """Refuse a head stored beside the embedding that `model` reads in its place, unless both have the same values.

    transformers 4 reads the embedding then, and transformers 5 the head: nobody can tell which was trained.

    Raises:
        FitError: the values differ.
    """
    head = model.head
    if not isinstance(head, LanguageHead) or head.projection.weight != model.embedding.tokens:
        return
    stored, table = (component.parameters.get(name) for name in (component.head, component.embedding))
    if component.head == component.embedding or stored is None or table is None:
        return
    if not (stored.storage.is_float and table.storage.is_float) or same_values(stored.storage, table.storage):
        return
    raise FitError(
        f"differs from '{component.embedding}', which config.json says it is tied to (tie_word_embeddings)",
        tensor=component.head,
        hint=(
            "remove it from the file to use the embedding"
            if model.encoder is not None  # whose recipes know no head of its own
            else "set tie_word_embeddings to false to use it, or remove it from the file to use the embedding"
        ),
    )
