# SPDX-License-Identifier: Apache-2.0
"""A weight that is a tensor, for equations that look at the weight first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery_formats.tensors.views import Index

if TYPE_CHECKING:
    import torch

__all__ = ["WeightInMemory"]


@dataclass(frozen=True)
class WeightInMemory:
    """Satisfies `surgery_formats.updates.Weight`.

    Attributes:
        values: ``(out, in)``, float32 or float64; never written into.
    """

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> str:
        """Of the values."""
        return str(self.values.device)

    def blocks(self) -> Iterator[tuple[torch.Tensor, Index, Index]]:
        """All of it at once."""
        yield self.values.clone(), range(self.shape[0]), range(self.shape[1])
