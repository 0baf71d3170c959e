# SPDX-License-Identifier: Apache-2.0
"""What a program makes of one part of an adapter, and of the adapter as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["FORMAT", "OUTCOMES", "Outcome", "Remedy", "Verdict", "worst"]

Outcome = Literal["honoured", "scaled wrongly", "ignored", "refused"]
"""What becomes of a part.

``honoured``
    It acts as it was trained.
``scaled wrongly``
    It acts with another scale, by `Verdict.factor`.
``ignored``
    The program runs as if the part were not there.
``refused``
    The program does not load the adapter, because of this part.
"""
OUTCOMES: tuple[Outcome, ...] = ("honoured", "scaled wrongly", "ignored", "refused")
"""From the best to the worst."""
Remedy = Literal["", "rewrite", "scale", "pad", "partners", "cut", "dialect", "lora", "saved", "drop"]
"""What makes a program honour a part.

``rewrite``
    Writing the adapter anew in the program's format.
``scale``
    Multiplying the scale into B.
``pad``
    One rank for all modules, with zeros behind the smaller ones.
``partners``
    LoRAs of zeros for the modules that the program expects beside it.
``cut``
    The best LoRA of a lower rank.
``dialect``
    Writing experts in the program's dialect.
``lora``
    A LoRA that does the same, or comes nearest.
``saved``
    A LoRA of the difference to the base, or leaving the module out, by the user's choice.
``drop``
    Leaving it out, by the user's choice.
"""

FORMAT = "format"
"""`Verdict.what` of an adapter that a program refuses as a whole, because it is in another program's format."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One part of an adapter.

    Attributes:
        part: Path of a parameter, name of a field, or name of a file.
        what: What it is, see `surgery.consumers.traits.Trait`; or `FORMAT`.
        outcome: What becomes of it.
        why: The rule, in a sentence; empty for what is honoured without a word.
        remedy: What makes the program honour it; empty where only a merge into the base does.
        factor: The program's scale over the adapter's; None unless it is scaled wrongly.
        needs: Path of the module that the program expects a LoRA of beside this one.
    """

    part: str
    what: str
    outcome: Outcome
    why: str = ""
    remedy: Remedy = ""
    factor: float | None = None
    needs: str = ""

    @property
    def module(self) -> str:
        """Path of the module that the part belongs to."""
        return self.part.removesuffix(".weight")


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The outcome of the whole: a refusal of one part is one of all."""
    return max(outcomes, key=OUTCOMES.index, default="honoured")
