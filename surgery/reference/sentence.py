# SPDX-License-Identifier: Apache-2.0
"""The embedding of a text, of the states of its tokens, row by row."""

from __future__ import annotations

import math

import torch

from surgery.reference.primitives import Load, activate, project
from surgery_formats.models.families.recipe_sentence import DenseStep, PoolingMode, SentenceHead

__all__ = ["embed_text"]


def embed_text(states: torch.Tensor, real: torch.Tensor, head: SentenceHead, load: Load) -> torch.Tensor:
    """``(B, E)`` of states ``(B, S, D)``; `real` ``(B, S)`` are the tokens that are no padding."""
    rows = []
    for row, tokens in zip(states, real.bool(), strict=True):
        values = torch.cat([_pooled(row[tokens], mode) for mode in head.modes])
        for step in head.steps:
            if isinstance(step, DenseStep):
                values = activate(project(values, step.projection, load), step.activation)
            else:
                values = values / max(float(values.norm()), 1e-12)
        rows.append(values)
    return torch.stack(rows)


def _pooled(states: torch.Tensor, mode: PoolingMode) -> torch.Tensor:
    """``D`` values of the states of a text's own tokens."""
    match mode:
        case "cls":
            return states[0]
        case "lasttoken":
            return states[-1]
        case "max":
            return states.amax(0)
        case "mean":
            return states.mean(0)
        case "mean_sqrt_len_tokens":
            return states.sum(0) / math.sqrt(len(states))
        case "weightedmean":
            places = torch.arange(1, len(states) + 1, dtype=states.dtype)
            return places @ states / places.sum()
