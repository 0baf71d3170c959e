# SPDX-License-Identifier: Apache-2.0
"""All known families, and the lookup for a configuration. To add a family, add its file and its name here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from surgery_formats.models.eras import class_ties, experts_transposed
from surgery_formats.models.families.family import Family

__all__ = ["families", "family_of", "modules"]

_MODULES = (
    *(
        "llama",
        "mistral",
        "qwen",
        "gemma",
        "olmo",
        "gemma3n",
        "granite",
        "smollm3",
        "stablelm",
        "gpt2",
        "gpt_neox",
        "opt",
        "phi3",
    ),
    *("phi", "starcoder2", "falcon", "bloom", "gptj", "gpt_neo", "cohere", "glm", "exaone4", "nemotron", "arcee"),
    *("hunyuan", "ernie", "seed_oss", "gpt_bigcode", "mpt", "persimmon", "lfm2"),
    *("bert", "roberta", "distilbert", "electra", "albert", "mpnet", "deberta", "modernbert", "nomic_bert", "eurobert"),
    *("gte", "t5", "mixtral", "gpt_oss", "qwen_moe", "deepseek", "ernie_moe", "glm_moe", "vit", "dinov2", "clip"),
    *("bart", "whisper", "vision_language", "diffusion", "retrieval"),
)

_UNKNOWN = Family(names=("unknown",))


def modules() -> Iterator[ModuleType]:
    """The files of all families, each imported when its turn comes: most models need one of the first."""
    return (import_module(f"surgery_formats.models.families.{name}") for name in _MODULES)


def families(module: ModuleType | None = None) -> Iterator[Family]:
    """All families, or those of one file; it may hold several (with a recipe, and of names alone)."""
    for home in modules() if module is None else (module,):
        yield from (record for name in home.__all__ if isinstance(record := getattr(home, name), Family))


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json (``model_type``; ``_class_name`` in diffusers), or one without any names."""
    kind = config.get("model_type", config.get("_class_name"))
    if kind is None:
        return _UNKNOWN
    found = next((family for family in families() if kind in family.names), None)
    if found is None or not (found.recipe and not found.embedding):
        return found or _of_transformers(config)
    return replace(_of_transformers(config), recipe=found.recipe)  # names are as for types without a file here


def _of_transformers(config: Mapping[str, Any]) -> Family:
    """What transformers' own classes tell of a type without a file here."""
    ties = class_ties(config)
    turned = bool(experts_transposed(config))
    heads = [(alias, source) for alias, source in ties.items() if alias.endswith(".weight")]
    if len(heads) != 1:
        return replace(_UNKNOWN, experts_transposed=turned)
    ((head, embedding),) = heads
    return Family(
        names=(str(config.get("model_type")),),
        embedding=embedding.removesuffix(".weight"),
        head=head.removesuffix(".weight"),
        ties=tuple((alias, source) for alias, source in ties.items() if not alias.endswith(".weight")),
        experts_transposed=turned,
    )
