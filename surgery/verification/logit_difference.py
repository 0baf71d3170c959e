# SPDX-License-Identifier: Apache-2.0
"""How far the logits of a graph are from those of the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SOFT_PROMPT", "LogitDifference"]


SOFT_PROMPT = "soft prompt"
"""What the comparison of a stored prompt is called."""
_MOST = 0.1


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

    def limit(self, tolerance: float) -> float:
        """`tolerance` times the larger of 1 and `size`, but no more than a tenth of a `size` that is not 0.

        Without that tenth, zeros would pass for a model whose logits are all below the tolerance.
        """
        usual = tolerance * max(1.0, self.size)
        return min(usual, max(tolerance, _MOST) * self.size) if self.size else usual

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most its limit; NaN never is."""
        return self.difference <= self.limit(tolerance) and not self.wrong_tokens
