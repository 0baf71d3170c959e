# SPDX-License-Identifier: Apache-2.0
"""How programs work out the scale of a LoRA, each as a function of the configuration and of the LoRA's own rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Formula", "alpha_over_own_rank", "alpha_over_own_rank_or_root", "alpha_over_r", "alpha_over_r_or_root"]

Formula = Callable[[Mapping[str, Any], int], float]
"""``(adapter_config.json, rank of the factors) -> scale``."""


def alpha_over_r(config: Mapping[str, Any], rank: int) -> float:
    """``lora_alpha / r``, whatever the patterns, the factors' rank and ``use_rslora`` say."""
    return _alpha(config) / _rank(config)


def alpha_over_r_or_root(config: Mapping[str, Any], rank: int) -> float:
    """``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``; patterns are not looked at."""
    r = _rank(config)
    return _alpha(config) / (math.sqrt(r) if config.get("use_rslora") else r)


def alpha_over_own_rank(config: Mapping[str, Any], rank: int) -> float:
    """``lora_alpha / rank`` of the factors; an alpha of 0 is taken for none, and the scale is 1."""
    alpha = _alpha(config)
    return alpha / rank if alpha else 1.0


def alpha_over_own_rank_or_root(config: Mapping[str, Any], rank: int) -> float:
    """``lora_alpha / rank`` of the factors, or ``lora_alpha / sqrt(rank)`` with ``use_rslora``."""
    return _alpha(config) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _alpha(config: Mapping[str, Any]) -> float:
    value = config.get("lora_alpha")
    return float(value) if isinstance(value, int | float) else 8.0


def _rank(config: Mapping[str, Any]) -> int:
    value = config.get("r")
    return value if isinstance(value, int) and value > 0 else 8  # PEFT's default, for the programs that ask PEFT
