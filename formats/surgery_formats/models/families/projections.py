# SPDX-License-Identifier: Apache-2.0
"""Projections that some models store as one matrix, and otherwise equal models as parts stacked by rows.

Phi-3, GLM-4 and vLLM's copies of Llama have ``qkv_proj`` and ``gate_up_proj``; Llama and its relatives, and Phi-3
rewritten as a Llama, have the parts. Interleaved layouts (GPT-NeoX, Falcon) are not covered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PROJECTIONS", "FusedProjection", "heights_by_config"]


@dataclass(frozen=True, slots=True)
class FusedProjection:
    """One matrix and its parts.

    Attributes:
        whole: Module path below its block.
        parts: Module paths of the parts, in row order.
    """

    whole: str
    parts: tuple[str, ...]


PROJECTIONS = (
    FusedProjection("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    FusedProjection("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
)


def heights_by_config(projection: FusedProjection, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Rows of each part according to a ``config.json``; None if it lacks the numbers."""

    def number(key: str) -> int:
        value = config.get(key)
        return value if isinstance(value, int) and value > 0 else 0

    if len(projection.parts) == 2:
        height = number("intermediate_size")
        return (height, height) if height else None
    heads = number("num_attention_heads")
    groups = number("num_key_value_heads") or heads
    width = number("head_dim") or (number("hidden_size") // heads if heads else 0)
    return (heads * width, groups * width, groups * width) if width else None
