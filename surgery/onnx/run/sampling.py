# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token: greedy, or temperature, top-k and top-p (nucleus, Holtzman et al. 2020, arXiv:1904.09751).

Pure functions of logits and a generator, in the order of transformers: temperature, top-k, top-p, draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery_formats.errors import FitError, UsageError

__all__ = ["Sampling", "choose", "greedy", "probabilities"]

Logits = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: Divisor of the logits; 0 is greedy.
        top_k: Keep only the k likeliest; 0 for all.
        top_p: Keep only the likeliest whose sum reaches this; 1 for all.
        seed: Seed for sampling.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "seed"):
            value, expected = getattr(self, name), Integral if name in ("top_k", "seed") else Real
            if isinstance(value, bool) or not isinstance(value, expected):
                kind = "a whole number" if expected is Integral else "a number"
                raise UsageError(f"{name} is {kind}, not {type(value).__name__}")
        if not 0 <= self.temperature < float("inf"):
            raise FitError(f"temperature is {self.temperature}", hint="0 is greedy, 1 keeps the model's distribution")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise FitError(f"top_k is {self.top_k}, top_p is {self.top_p}", hint="top_k >= 0, 0 < top_p <= 1")


def greedy(logits: Logits) -> npt.NDArray[np.int64]:
    """``(B, V)`` logits -> ``(B,)`` ids of the largest; the first of equals.

    16-bit floats are compared as integers, which sort like them above zero and in reverse below: numpy has no fast
    comparison for them, and over 128,000 entries the slow one takes a tenth of a decoding step.
    """
    if logits.dtype.itemsize != 2:
        return np.asarray(logits.argmax(-1), np.int64)
    bits = logits.view(np.int16)
    largest = bits.argmax(-1)
    # if no number is above zero, the smallest bit pattern is the largest number
    below = np.take_along_axis(bits, largest[:, None], -1)[:, 0] < 0
    return np.asarray(np.where(below, bits.argmin(-1), largest) if below.any() else largest, np.int64)


def probabilities(logits: Logits, sampling: Sampling) -> npt.NDArray[np.float64]:
    """``(V,)`` probabilities after temperature, top-k and top-p; they sum to 1."""
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # at a temperature near 0 all but the largest are infinitely far away
        weights = np.exp((scores - scores.max()) / sampling.temperature)
    order = np.argsort(-weights, kind="stable")
    keep = order if not sampling.top_k else order[: sampling.top_k]
    if sampling.top_p < 1:
        sums = np.cumsum(weights[keep]) / weights[keep].sum()
        keep = keep[: int(np.searchsorted(sums, sampling.top_p)) + 1]  # including the one that reaches it
    kept = np.zeros_like(weights)
    kept[keep] = weights[keep]
    normalised: npt.NDArray[np.float64] = kept / kept.sum()
    return normalised


def choose(logits: Logits, sampling: Sampling, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """``(B, V)`` logits -> ``(B,)`` ids.

    Raises:
        FitError: logits that are not finite.
    """
    if sampling.temperature == 0:
        ids = greedy(logits)
        if not np.isfinite(np.take_along_axis(logits, ids[:, None], -1).astype(np.float32)).all():
            raise FitError(
                "the model's logits are not finite", hint="export in fp32 or bf16; see surgery verify for details"
            )
        return ids
    if not np.isfinite(logits.astype(np.float32).max(-1)).all():
        hint = "export in fp32 or bf16; see surgery verify for details"
        raise FitError("the model's logits are not finite", hint=hint)
    draws = generator.random(len(logits))
    sums = (np.cumsum(probabilities(row, sampling)) for row in logits)
    return np.array([int(np.searchsorted(row, draw * row[-1], "right")) for row, draw in zip(sums, draws, strict=True)])
