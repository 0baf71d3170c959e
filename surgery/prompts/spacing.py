# SPDX-License-Identifier: Apache-2.0
"""How far the tokens of a vocabulary lie from one another, and what that makes of a match.

A nearest token is always found, for any numbers at all. Two figures say whether it means something: how far real tokens are
from their own nearest neighbours, and how near a random direction comes to one of so many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from surgery.prompts.search import NearToken, search
from surgery.prompts.vocabulary import Rows, Vocabulary

__all__ = ["Reading", "Spacing", "reading_of", "spacing_of"]

_ALL = 1 << 34  # products up to which every token is compared with every other
_SAMPLE = 512
_RANDOM = 128  # directions
_SAME = 1e-3  # of a token's norm

Verdict = Literal["itself", "near", "by direction", "none"]
"""``itself``: the row of a token. ``near``: among tokens as they are among themselves. ``by direction``: as near by the
angle, but longer or shorter than any token there. ``none``: no nearer than chance, or farther than any token from its
nearest."""


@dataclass(frozen=True)
class Spacing:
    """How tokens lie among themselves.

    Attributes:
        tokens: How many were asked for their nearest neighbour.
        size: Of the vocabulary.
        distance: Quantiles of the distance to it, by their share; 1.0 is the farthest.
        cosine: The same of the cosine with the token of the nearest direction; 0.0 is the least.
        norm: Of the norms.
        chance: The cosine that 95 of 100 random directions do not reach with any token.
    """

    tokens: int
    size: int
    distance: dict[str, float]
    cosine: dict[str, float]
    norm: dict[str, float]
    chance: float

    @property
    def farthest(self) -> float:
        """The greatest distance of a token from its nearest neighbour."""
        return self.distance["1"]

    @property
    def sampled(self) -> bool:
        """Whether not all tokens were asked."""
        return self.tokens < self.size


@dataclass(frozen=True, slots=True)
class Reading:
    """What the nearest tokens of a virtual token are worth.

    Attributes:
        verdict: In a word.
        ratio: The distance of the nearest, by the farthest nearest neighbour of a token: above 1, none is near.
        why: In a sentence.
    """

    verdict: Verdict
    ratio: float
    why: str


def spacing_of(vocabulary: Vocabulary, sample: int | None = None) -> Spacing:
    """Compare tokens with all others.

    Args:
        vocabulary: Whose.
        sample: How many tokens to ask, evenly spread; by default all of a small vocabulary, else 512.
    """
    size = vocabulary.size
    few = size * size * vocabulary.width <= _ALL
    asked = min(size, sample if sample is not None else size if few else _SAMPLE)
    ids = [number * size // asked for number in range(asked)]
    rows = vocabulary.chosen(ids)
    live = [number for number, row in enumerate(rows) if row.any()]  # rows nobody has trained say nothing
    ids, rows = [ids[number] for number in live], rows[live]
    random = np.random.default_rng(0).standard_normal((_RANDOM, vocabulary.width)).astype(np.float32)
    found = search(vocabulary, np.concatenate([rows, random]), 1, measures=("cosine", "distance"), selves=ids)
    own, chance = found[: len(ids)], found[len(ids) :]
    return Spacing(
        len(ids),
        size,
        _quantiles([near["distance"][0].distance for near in own if near["distance"]]),
        _quantiles([near["cosine"][0].cosine for near in own if near["cosine"]]),
        _quantiles([float(norm) for norm in np.linalg.norm(rows, axis=1)]),
        float(np.quantile([near["cosine"][0].cosine for near in chance], 0.95)),
    )


def reading_of(nearest: dict[str, tuple[NearToken, ...]], vector: Rows, spacing: Spacing) -> Reading:
    """What the nearest tokens of `vector` are worth."""
    by_distance, by_cosine = nearest["distance"][0], nearest["cosine"][0]
    ratio = by_distance.distance / spacing.farthest if spacing.farthest else float("inf")
    if by_distance.distance <= _SAME * float(np.linalg.norm(vector)):
        return Reading("itself", ratio, "it is a token's own row")
    if by_cosine.cosine <= spacing.chance:
        return Reading(
            "none", ratio, f"no token is near: a random direction comes as close (cosine {spacing.chance:.2f})"
        )
    if ratio <= 1:
        return Reading("near", ratio, "as near as tokens are to one another")
    if by_cosine.cosine >= spacing.cosine["0.05"]:
        return Reading(
            "by direction", ratio, f"one lies in its direction, but {ratio:.2f}x the farthest nearest neighbour away"
        )
    return Reading("none", ratio, f"no token is near: {ratio:.2f}x the farthest nearest neighbour")


def _quantiles(values: list[float]) -> dict[str, float]:
    return {f"{share:g}": float(np.quantile(values, share)) for share in (0, 0.05, 0.5, 0.95, 1)} if values else {}
