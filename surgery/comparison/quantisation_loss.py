# SPDX-License-Identifier: Apache-2.0
"""What a comparison says of weights that one side stores as codes."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.reports.values import Phrase, Value

__all__ = ["QuantisationLoss"]


@dataclass(frozen=True, slots=True)
class QuantisationLoss:
    """How far weights that are stored as codes lie from those of the other side, which are not.

    Attributes:
        kind: The format of the codes.
        other: The type of the other side.
        weights: How many they are.
        relative: ``||coded - other||_F / ||other||_F`` over all of them.
        rounding: The same, if every code were the nearest on the scales that are stored.
        nearest: Share of the codes that are.
    """

    kind: str
    other: str
    weights: int
    relative: float
    rounding: float
    nearest: float

    @property
    def phrase(self) -> Phrase:
        """In one line."""
        return (
            f"{self.kind} against {self.other} in {self.weights} weights: ", Value(self.relative, "number", 3),
            " of the norm; the nearest codes on the stored scales leave ", Value(self.rounding, "number", 3), ", and ",
            Value(self.nearest, "share", 3), " of the codes are the nearest",
        )  # fmt: skip
