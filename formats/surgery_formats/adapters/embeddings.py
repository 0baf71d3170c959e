# SPDX-License-Identifier: Apache-2.0
"""Which modules are embeddings: several formats store their factors transposed, and a tied head follows in some."""

from __future__ import annotations

from surgery_formats.adapters.writing import places_of, whole_place
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.updates import LoRA

__all__ = ["EMBEDDINGS", "following_head", "is_embedding"]

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


def following_head(site: Site, lora: LoRA, adapter: Adapter, base: Checkpoint | None) -> str:
    """The module of a tied head that follows the embedding at `site` (mlx-lm), for a format in which it does not; or empty.

    The head needs the same LoRA of its own there.
    """
    if base is None or base.is_pipeline or not adapter.keeps_ties:
        return ""
    main = base.main
    place = whole_place(places_of(site, base, lora.tensors))
    follows = (
        main.tied and main.head and place and place[0] == main.embedding and Site(main.head) not in adapter.updates
    )
    return main.head.removesuffix(".weight") if follows else ""
