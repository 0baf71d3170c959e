# SPDX-License-Identifier: Apache-2.0
"""What a user allows a rewriting to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.rank import Rank

__all__ = ["Consent", "SavedChoice"]

SavedChoice = Literal["lora", "drop"]


@dataclass(frozen=True, slots=True)
class Consent:
    """What the user allows.

    Attributes:
        saved: What becomes of modules trained in full: a LoRA of their difference to the base, or nothing.
        loss: Whether parts may be left out that the consumer cannot honour.
        merged: Whether the parts that the consumer cannot honour are merged into a copy of the base.
        rank: Directions of LoRAs that stand for other kinds; None loses nothing.
        greatest_rank: What the program was started with; None for its own default.
    """

    saved: SavedChoice | None = None
    loss: bool = False
    merged: bool = False
    rank: Rank | None = None
    greatest_rank: int | None = None
