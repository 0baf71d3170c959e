# SPDX-License-Identifier: Apache-2.0
"""The next token from logits: greedy, or drawn with temperature, top-k and top-p (nucleus, Holtzman et al. 2020, arXiv:1904.09751).

Pure functions of logits and a generator; the order is that of transformers: temperature, top-k, top-p, draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery_formats.errors import FitError

__all__ = ["Sampling", "choose", "greedy", "probabilities"]

Logits = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: Logits are divided by it; 0 is greedy.
        top_k: Only the k likeliest; 0 for all.
        top_p: Only the likeliest whose sum reaches it; 1 for all.
        seed: Of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise FitError(
                f"a temperature of {self.temperature}", hint="0 is greedy, 1 leaves the model's distribution"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise FitError(f"top_k {self.top_k}, top_p {self.top_p}", hint="top_k >= 0, 0 < top_p <= 1")


def greedy(logits: Logits) -> npt.NDArray[np.int64]:
    """``(B, V)`` logits -> ``(B,)`` ids of the largest; the first of equals.

    16-bit floats are compared as integers, whose order is theirs among numbers above zero, and its reverse below: numpy has no fast
    comparison for them, and at 128,000 entries a slow one takes a tenth of a decoding step.
    """
    if logits.dtype.itemsize != 2:
        return np.asarray(logits.argmax(-1), np.int64)
    bits = logits.view(np.int16)
    largest = bits.argmax(-1)
    below = (
        np.take_along_axis(bits, largest[:, None], -1)[:, 0] < 0
    )  # no number above zero: the smallest pattern is the largest
    return np.asarray(np.where(below, bits.argmin(-1), largest) if below.any() else largest, np.int64)


def probabilities(logits: Logits, how: Sampling) -> npt.NDArray[np.float64]:
    """``(V,)`` probabilities after temperature, top-k and top-p; they sum to 1."""
    scores = logits.astype(np.float64) / how.temperature
    weights = np.exp(scores - scores.max())
    order = np.argsort(-weights, kind="stable")
    keep = order if not how.top_k else order[: how.top_k]
    if how.top_p < 1:
        sums = np.cumsum(weights[keep]) / weights[keep].sum()
        keep = keep[: int(np.searchsorted(sums, how.top_p)) + 1]  # up to and with the one that reaches it
    found = np.zeros_like(weights)
    found[keep] = weights[keep]
    normal: npt.NDArray[np.float64] = found / found.sum()
    return normal


def choose(logits: Logits, how: Sampling, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """``(B, V)`` logits -> ``(B,)`` ids.

    Raises:
        FitError: logits that are not numbers.
    """
    if how.temperature == 0:
        found = greedy(logits)
        if not np.isfinite(np.take_along_axis(logits, found[:, None], -1).astype(np.float32)).all():
            raise FitError(
                "the model's logits are not finite", hint="export in fp32 or bf16; surgery verify tells more"
            )
        return found
    if not np.isfinite(logits.astype(np.float32).max(-1)).all():
        raise FitError("the model's logits are not finite", hint="export in fp32 or bf16; surgery verify tells more")
    draws = generator.random(len(logits))
    sums = (np.cumsum(probabilities(row, how)) for row in logits)
    return np.array([int(np.searchsorted(row, draw * row[-1], "right")) for row, draw in zip(sums, draws, strict=True)])
