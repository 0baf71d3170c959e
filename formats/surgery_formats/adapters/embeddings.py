# SPDX-License-Identifier: Apache-2.0
"""Which modules are embeddings: several formats store their factors transposed."""

from __future__ import annotations

from surgery_formats.canonical.adapter import Site
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["EMBEDDINGS", "is_embedding"]

EMBEDDINGS = frozenset(
    [
        "embed",
        "embed_in",
        "embed_tokens",
        "embed_tokens_per_layer",
        "embedding",
        "embeddings",
        "position_embedding_table",
        "tok_embeddings",
        "token_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    ]
)
"""Last names of modules that are embeddings in every library's models."""


def is_embedding(module: str, base: Checkpoint | None = None, site: Site | None = None) -> bool:
    """Whether `module` is an embedding, by its site, the base, or its name."""
    if site is not None and site.module_kind:
        return site.module_kind == "embedding"
    if base is not None and not base.is_pipeline and base.main.embedding == f"{module}.weight":
        return True
    return module.rpartition(".")[2] in EMBEDDINGS
