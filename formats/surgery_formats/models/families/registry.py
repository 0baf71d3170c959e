# SPDX-License-Identifier: Apache-2.0
"""All known families, and the lookup for a configuration. To add a family, add its file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from surgery_formats.models.families.family import Family

__all__ = ["families", "family_of"]


@cache
def families() -> tuple[Family, ...]:
    """All known families. Their modules are imported with the first model that is opened; most adapters come alone."""
    from surgery_formats.models.families import (
        bert,
        bloom,
        clip,
        diffusion,
        distilbert,
        gemma,
        gpt2,
        gpt_neo,
        gpt_neox,
        gpt_oss,
        granite,
        llama,
        mistral,
        mixtral,
        olmo,
        opt,
        phi3,
        qwen,
        qwen_moe,
        roberta,
        smollm3,
        stablelm,
        t5,
        vit,
        whisper,
    )

    return (
        llama.FAMILY,
        mistral.FAMILY,
        qwen.QWEN2,
        qwen.QWEN3,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
        olmo.OLMO,
        olmo.OLMO2,
        granite.FAMILY,
        smollm3.FAMILY,
        stablelm.FAMILY,
        llama.NAMES_ONLY,
        gpt2.FAMILY,
        gpt2.NAMES_ONLY,
        gpt_neox.FAMILY,
        opt.FAMILY,
        phi3.FAMILY,
        phi3.NAMES_ONLY,
        bert.FAMILY,
        bert.NAMES_ONLY,
        roberta.FAMILY,
        distilbert.FAMILY,
        bloom.FAMILY,
        gpt_neo.FAMILY,
        t5.FAMILY,
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
    """Return the family of a config.json (``model_type``; ``_class_name`` in diffusers), or one without any names."""
    kind = config.get("model_type", config.get("_class_name"))
    return next((family for family in families() if kind in family.names), _UNKNOWN)
