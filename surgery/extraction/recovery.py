# SPDX-License-Identifier: Apache-2.0
"""How much of what a fine-tune gained an extraction has: figures on a text that is predicted. Imported without numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.extraction.findings import six_digits

__all__ = ["LEAST_GAIN", "Recovery", "TextScore", "least_gain"]

LEAST_GAIN = 1e-4
"""Bits per byte. Two evaluations of one model, by this library and by transformers, differ by 1e-5."""
_ERRORS = 3  # standard errors that chance exceeds once in 700 times


@dataclass(frozen=True, slots=True)
class TextScore:
    """How well a model predicts the text, and how near its predictions are to TUNED's.

    Attributes:
        bits_per_byte: By UTF-8 bytes of the text.
        divergence: Mean of ``KL(TUNED || model)`` over the tokens, in nats.
        agreement: Share of tokens for which both expect the same one most.
    """

    bits_per_byte: float
    divergence: float
    agreement: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return six_digits(
            {"bits_per_byte": self.bits_per_byte, "kl_divergence": self.divergence, "same_top_token": self.agreement}
        )


@dataclass(frozen=True, slots=True)
class Recovery:
    """BASE, BASE with the adapter attached, and TUNED on one text.

    Attributes:
        text: The text.
        text_digest: sha256 of its bytes.
        text_bytes: Their number.
        tokens: Tokens that were predicted.
        base: BASE.
        adapter: BASE with the adapter attached, unmerged.
        tuned: Bits per byte of TUNED.
        least: What BASE has to need more than TUNED, in bits per byte, for a share of it to mean something (`least_gain`).
        ranks: BASE with LoRAs of other ranks, by rank and layers, where a table was asked for.
        remarks: What was not measured, and why.
    """

    text: Path
    text_digest: str
    text_bytes: int
    tokens: int
    base: TextScore
    adapter: TextScore
    tuned: float
    least: float
    ranks: Mapping[tuple[int, str], TextScore] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def gain(self) -> float:
        """Bits per byte that TUNED needs less than BASE."""
        return self.base.bits_per_byte - self.tuned

    @property
    def recovered(self) -> float | None:
        """Share of the gain that the adapter has; None where TUNED is not clearly better than BASE."""
        return self.share(self.adapter)

    def share(self, score: TextScore) -> float | None:
        """``(BASE - score) / (BASE - TUNED)`` in bits per byte; None where the denominator is not clearly above 0."""
        return (self.base.bits_per_byte - score.bits_per_byte) / self.gain if self.gain > self.least else None

    def as_json(self) -> dict[str, Any]:
        """Plain values without the path of the text, for ``--json`` and the manifest."""
        text = {"sha256": self.text_digest, "nbytes": self.text_bytes, "tokens": self.tokens}
        scores = {"base": self.base.as_json(), "adapter": self.adapter.as_json()}
        scores["tuned"] = six_digits({"bits_per_byte": self.tuned})
        shares = {"gain": self.gain, "least_gain": self.least, "recovered": self.recovered}
        return {"text": text, **scores, **six_digits(shares)}


def least_gain(difference: float, squares: float, tokens: int, nbytes: int) -> float:
    """What a difference of two models has to exceed to be more than chance, in bits per byte.

    Three standard errors of the sum over tokens, taken as independent, and at least `LEAST_GAIN`.

    Args:
        difference: Of their negative log-likelihoods, in nats, summed.
        squares: Of that of each token, summed.
        tokens: Their number.
        nbytes: Of the text.
    """
    if tokens < 2:
        return math.inf
    variance = max(squares - difference * difference / tokens, 0.0) * tokens / (tokens - 1)
    return max(LEAST_GAIN, _ERRORS * math.sqrt(variance) / math.log(2) / nbytes)
