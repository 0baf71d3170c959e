# SPDX-License-Identifier: Apache-2.0
"""A map from the input space of one model to another's, fitted on the tokens that both have, and its score.

A part of the tokens is held out: what the map explains of them, and how many it leads to themselves, is what it is worth. Virtual
tokens mostly lie where no token is, so that even a map that is right for tokens may be wrong for them; only texts tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from surgery.prompts.search import search
from surgery.prompts.vocabulary import Vocabulary

__all__ = ["Map", "fitted_map", "shared_tokens"]

_MOST = 1 << 16  # tokens to fit to
_NUMBERS = 1 << 22  # of rows in memory at a time
_TRIED = 512  # held-out tokens that are looked for
_STRENGTHS = (1e-6, 1e-4, 1e-2, 1.0)  # of ridge, by the mean of the squares


@dataclass(frozen=True)
class Map:
    """A linear map of rows.

    Attributes:
        method: ``ridge`` or ``orthogonal``.
        matrix: ``(old width, new width)``.
        fitted: Tokens it was fitted to.
        held_out: Tokens it was tried on.
        explained: Share of their variance that it explains.
        found: Share of them that are nearest to themselves.
    """

    method: str
    matrix: np.ndarray
    fitted: int
    held_out: int
    explained: float
    found: float


def shared_tokens(old: dict[int, str], new: dict[int, str], sizes: tuple[int, int]) -> list[tuple[int, int]]:
    """Ids of tokens that both vocabularies have, by how their tokenizers spell them; by id, of equal ones without."""
    if not old or not new:
        return [(row, row) for row in range(sizes[0])] if sizes[0] == sizes[1] and not (old or new) else []
    by_text = {text: row for row, text in new.items() if row < sizes[1]}
    return [(row, by_text[text]) for row, text in sorted(old.items()) if row < sizes[0] and text in by_text]


def fitted_map(old: Vocabulary, new: Vocabulary, shared: Sequence[tuple[int, int]], method: str) -> Map:
    """Fit a map to four of five shared tokens, and try it on the others.

    Args:
        old: Where prompts come from.
        new: Where they go.
        shared: Ids of one token in both.
        method: ``ridge``, ``orthogonal`` (of equal widths), or ``auto``: what explains more of a part of its own.
    """
    step = -(-len(shared) // _MOST)
    pairs = list(shared)[::step]
    fit, choose, test = (
        [pair for number, pair in enumerate(pairs) if number % 10 in part] for part in (range(8), (8,), (9,))
    )
    found_maps = _candidates(old, new, fit, method)
    tried = [(_explained(old, new, choose, matrix), name, matrix) for name, matrix in found_maps]
    _, name, matrix = max(tried, key=lambda entry: entry[0])
    asked = test[:: -(-len(test) // _TRIED) or 1]
    images = np.asarray(old.chosen([a for a, _ in asked]) @ matrix, np.float32)
    nearest = search(new, images, 1, measures=("cosine",))
    found = sum(near["cosine"][0].id == b for near, (_, b) in zip(nearest, asked, strict=True)) / len(asked)
    return Map(name, matrix, len(fit), len(test), _explained(old, new, test, matrix), found)


def _blocks(
    old: Vocabulary, new: Vocabulary, pairs: Sequence[tuple[int, int]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of both sides in float64, so many pairs at a time."""
    height = max(1, _NUMBERS // (old.width + new.width))
    for start in range(0, len(pairs), height):
        part = pairs[start : start + height]
        yield old.chosen([a for a, _ in part]).astype(np.float64), new.chosen([b for _, b in part]).astype(np.float64)


def _candidates(
    old: Vocabulary, new: Vocabulary, pairs: Sequence[tuple[int, int]], method: str
) -> list[tuple[str, np.ndarray]]:
    square, cross = np.zeros((old.width, old.width)), np.zeros((old.width, new.width))
    for x, y in _blocks(old, new, pairs):
        square += x.T @ x
        cross += x.T @ y
    found: list[tuple[str, np.ndarray]] = []
    if method in ("auto", "ridge"):
        scale = float(np.trace(square)) / len(square)
        found += [
            ("ridge", np.linalg.solve(square + strength * scale * np.eye(len(square)), cross))
            for strength in _STRENGTHS
        ]
    if method == "orthogonal" or (method == "auto" and old.width == new.width):
        left, values, right = np.linalg.svd(cross, full_matrices=False)
        found.append(("orthogonal", (left @ right) * (values.sum() / max(float(np.trace(square)), 1e-300))))
    return found


def _explained(old: Vocabulary, new: Vocabulary, pairs: Sequence[tuple[int, int]], matrix: np.ndarray) -> float:
    """1 less the share of the variance that is left."""
    total = sum((y.sum(0) for _, y in _blocks(old, new, pairs)), np.zeros(new.width))
    mean = total / max(len(pairs), 1)
    whole = left = 0.0
    for x, y in _blocks(old, new, pairs):
        whole += float(np.square(y - mean).sum())
        left += float(np.square(y - x @ matrix).sum())
    return 1 - left / whole if whole else 0.0
