# SPDX-License-Identifier: Apache-2.0
"""SuperTuning: ``W' = W + S``, S zero but at the weight's largest (or smallest) elements (arXiv:2607.09287)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery_formats.arrays import Array, to_cpu
from surgery_formats.updates.sparse import SparseAddition

__all__ = ["SuperTuning"]


@dataclass(frozen=True, slots=True)
class SuperTuning(SparseAddition):
    """Numbers that are added to single elements of a weight, by their positions in it as one row: ``places``, ``(n,)``."""

    kind: ClassVar[str] = "SuperTuning"

    def rows_and_columns(self) -> tuple[Array, Array]:
        """Of the weight that the update was fitted to."""
        return divmod(to_cpu(self.places.read()), self.inputs)
