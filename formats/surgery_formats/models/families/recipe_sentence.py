# SPDX-License-Identifier: Apache-2.0
"""How an embedding of a whole text is made of the states of its tokens: the modules of sentence-transformers, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery_formats.models.families.recipe_parts import Activation, Projection, Shapes, projection_shapes

__all__ = ["POOLING_MODES", "DenseStep", "PoolingMode", "SentenceHead", "UnitStep"]

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
"""Over the tokens that are no padding: the first, the greatest of each value, the mean, the sum over the square root of their
number, the mean weighted by 1, 2, 3 ..., the last."""

POOLING_MODES: tuple[PoolingMode, ...] = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@dataclass(frozen=True, slots=True)
class DenseStep:
    """``act(x W^T + b)``.

    Attributes:
        projection: The projection.
        activation: None for none.
    """

    projection: Projection
    activation: Activation | None = None


@dataclass(frozen=True, slots=True)
class UnitStep:
    """``x / |x|``, the length being at least 1e-12."""


@dataclass(frozen=True, slots=True)
class SentenceHead:
    """``last_hidden_state (B, S, D)`` and ``sentence_embedding (B, E)``.

    Attributes:
        modes: How states are pooled; results lie side by side, in this order.
        steps: What is done with them then, in order.
        width: ``E``.
    """

    modes: tuple[PoolingMode, ...]
    steps: tuple[DenseStep | UnitStep, ...]
    width: int

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors."""
        return projection_shapes(*(step.projection for step in self.steps if isinstance(step, DenseStep)))
