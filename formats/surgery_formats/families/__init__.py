# SPDX-License-Identifier: Apache-2.0
"""Model families as data: which names mean what. Adding one is adding a file here and its name to `FAMILIES`.

Names, the module graph and (later) graph recipes read the same record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery_formats.families import (
    bert,
    bloom,
    clip,
    diffusion,
    gpt2,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    opt,
    phi3,
    qwen,
    qwen_moe,
    t5,
    vit,
    whisper,
)
from surgery_formats.families.family import Family, Fused, Rename

__all__ = ["FAMILIES", "Family", "Fused", "Rename", "family_of"]

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    llama.NAMES_ONLY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    bert.FAMILY,
    bloom.FAMILY,
    gpt_neo.FAMILY,
    t5.FAMILY,
    opt.FAMILY,
    phi3.FAMILY,
    mixtral.FAMILY,
    gpt_oss.FAMILY,
    qwen_moe.FAMILY,
    vit.FAMILY,
    clip.FAMILY,
    whisper.FAMILY,
    diffusion.FAMILY,
)

_UNKNOWN = Family(names=("unknown",))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json (``model_type``; ``_class_name`` for diffusers), or one without any special names."""
    kind = config.get("model_type", config.get("_class_name"))
    return next((family for family in FAMILIES if kind in family.names), _UNKNOWN)
