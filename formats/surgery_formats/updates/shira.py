# SPDX-License-Identifier: Apache-2.0
"""SHiRA: ``W' = W + S``, S zero but for a percent or two of its elements (Bhardwaj et al. 2024, arXiv:2406.13175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery_formats.arrays import Array
from surgery_formats.updates.sparse import SparseAddition

__all__ = ["SHiRA"]


@dataclass(frozen=True, slots=True)
class SHiRA(SparseAddition):
    """Numbers that are added to single elements of a weight, of which each has a row and a column: ``places``, ``(2, n)``."""

    kind: ClassVar[str] = "SHiRA"

    def rows_and_columns(self) -> tuple[Array, Array]:
        """As they are stored."""
        rows, cols = self.places.read()
        return rows, cols
