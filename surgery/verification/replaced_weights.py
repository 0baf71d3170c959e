# SPDX-License-Identifier: Apache-2.0
"""Weights of the reference, some with other values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from surgery.reference.weights import ReferenceWeights

__all__ = ["ReplacedWeights"]


@dataclass(frozen=True)
class ReplacedWeights:
    """Weights of which some, or others besides, have the values given."""

    inner: ReferenceWeights
    values: Mapping[str, torch.Tensor]

    @property
    def names(self) -> Collection[str]:
        """All names."""
        return {*self.inner.names, *self.values}

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Load rows ``[start, stop)``; see `ReferenceWeights`."""
        return self.values[name][start:stop].float() if name in self.values else self.inner.load(name, start, stop)
