# SPDX-License-Identifier: Apache-2.0
"""How far the logits of a graph are from those of the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SOFT_PROMPT", "LogitDifference"]


SOFT_PROMPT = "soft prompt"
"""What the comparison of a stored prompt is called."""


@dataclass(frozen=True)
class LogitDifference:
    """One comparison.

    Attributes:
        name: Description of the run.
        difference: Greatest absolute difference of a logit.
        size: Greatest absolute logit of the reference.
        wrong_tokens: Differing greedy tokens, except near ties of the reference.
    """

    name: str
    difference: float
    size: float
    wrong_tokens: int = 0

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most `tolerance` times the larger of 1 and `size`; NaN never is."""
        return self.difference <= tolerance * max(1.0, self.size) and not self.wrong_tokens
