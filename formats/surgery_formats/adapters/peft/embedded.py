# SPDX-License-Identifier: Apache-2.0
"""A LoraConfig inside a file of another format: read as PEFT means it, and written for PEFT to read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery_formats.adapters.alphas import written_alpha
from surgery_formats.adapters.peft.kinds.lora import LORA
from surgery_formats.adapters.peft.read_config import PeftConfig, parse_config
from surgery_formats.adapters.writing import commonest

__all__ = ["embedded_config", "embedded_fields"]


def embedded_config(fields: Mapping[str, Any], path: Path) -> PeftConfig:
    """The configuration in `fields`.

    Raises:
        MalformedError, FitError: see `read_config.parse_config`.
    """
    return parse_config({**fields, "peft_type": LORA.name}, path, {LORA.name: LORA.switches})


def embedded_fields(
    before: Mapping[str, Any], modules: Mapping[str, tuple[int, float]], *, biased: bool = False, directed: bool = False
) -> dict[str, Any]:
    """The fields that state the rank and the alpha of each module, beside those of `before` that still hold.

    Args:
        before: Of the file that it was made from.
        modules: Rank and alpha by path.
        biased: Whether factors have biases beside them, which PEFT drops unless it is told.
        directed: Whether they have magnitudes beside them, which it drops in the same way.
    """
    rank = commonest(rank for rank, _ in modules.values())
    alpha = commonest(alpha for _, alpha in modules.values())
    return {
        **before,
        "peft_type": LORA.name,
        "r": rank,
        "lora_alpha": None if alpha is None else written_alpha(alpha),
        "rank_pattern": {_whole(name): own for name, (own, _) in sorted(modules.items()) if own != rank},
        "alpha_pattern": {
            _whole(name): written_alpha(own) for name, (_, own) in sorted(modules.items()) if own != alpha
        },
        "use_rslora": False,
        **({"lora_bias": True} if biased else {}),
        **({"use_dora": True} if directed else {}),
        "target_modules": sorted(modules),
    }


def _whole(module: str) -> str:
    """A pattern that matches this module alone."""
    return f"^{re.escape(module)}"
