# SPDX-License-Identifier: Apache-2.0
"""What a user allows a rewriting to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.rank import Rank
from surgery_formats.errors import FitError

__all__ = ["Consent", "SavedChoice", "check_greatest_rank"]

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


def check_greatest_rank(rank: int | None) -> None:
    """Refuse a greatest rank that no program has.

    Raises:
        FitError: it is not positive.
    """
    if rank is not None and rank < 1:
        raise FitError(f"no program takes ranks up to {rank}", hint="it is a positive number, for example 16")
