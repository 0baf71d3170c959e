# SPDX-License-Identifier: Apache-2.0
"""The rows of a vocabulary that are nearest to some vectors, by cosine, distance and dot product, in one pass.

A block of rows is in memory at a time. Candidates are found in float32, more than are asked for; their figures are then
computed again in float64 from their own rows, so that the order is that of the exact figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from surgery.prompts.vocabulary import Rows, Vocabulary

__all__ = ["MEASURES", "NearToken", "search"]

MEASURES = ("cosine", "distance", "dot")
_PRODUCTS = 1 << 22  # of vectors and rows, in memory at a time
_SPARE = 8  # candidates beyond those asked for, as far as float32 may be mistaken


@dataclass(frozen=True, slots=True)
class NearToken:
    """A token and how near it is.

    Attributes:
        id: Its row.
        cosine: Of the angle between the two.
        distance: Euclidean.
        dot: Their product.
    """

    id: int
    cosine: float
    distance: float
    dot: float


_FARNESS: Mapping[str, Callable[[NearToken], float]] = {
    "cosine": lambda near: -near.cosine,
    "distance": lambda near: near.distance,
    "dot": lambda near: -near.dot,
}


def search(
    vocabulary: Vocabulary,
    vectors: Rows,
    count: int,
    *,
    measures: Sequence[str] = MEASURES,
    selves: Sequence[int] = (),
) -> list[dict[str, tuple[NearToken, ...]]]:
    """The `count` nearest tokens of each vector, by each measure, the nearest first.

    Args:
        vocabulary: Where to look.
        vectors: ``(n, width)``.
        count: How many; fewer where the vocabulary is smaller.
        measures: Of `MEASURES`.
        selves: Rows that the first vectors are themselves, and that are not to be found for them.
    """
    kept = min(count + (_SPARE if count > 1 else 2), vocabulary.size)
    nothing = np.zeros((len(vectors), 0), np.float32), np.zeros((len(vectors), 0), np.int64)
    best = dict.fromkeys(measures, nothing)
    lengths = np.linalg.norm(vectors, axis=1)
    own = np.asarray(selves, np.int64)
    for start, rows in vocabulary.blocks(max(1, _PRODUCTS // len(vectors))):
        here = np.flatnonzero((own >= start) & (own < start + len(rows)))
        for measure, values in _nearness(vectors, lengths, rows, measures):
            values[here, own[here] - start] = -np.inf
            best[measure] = _best(best[measure], values, start, kept)
    return [
        _exact(
            vocabulary,
            vectors[number],
            {measure: ids[number] for measure, (_, ids) in best.items()},
            count,
            selves[number] if number < len(selves) else None,
        )
        for number in range(len(vectors))
    ]


def _nearness(vectors: Rows, lengths: Rows, rows: Rows, measures: Sequence[str]) -> Iterator[tuple[str, Rows]]:
    """By each measure a matrix ``(vectors, rows)``: the greater, the nearer."""
    dots, norms = vectors @ rows.T, np.linalg.norm(rows, axis=1)
    if "cosine" in measures:
        scale = lengths[:, None] * norms[None]
        yield "cosine", np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)
    if "distance" in measures:
        yield "distance", 2 * dots - norms[None] ** 2  # less the vector's own square
    if "dot" in measures:
        yield "dot", dots


def _best(
    before: tuple[Rows, npt.NDArray[np.int64]], values: Rows, start: int, kept: int
) -> tuple[Rows, npt.NDArray[np.int64]]:
    """The `kept` greatest of `before` and of `values`, whose first column is token `start`."""
    ids = np.broadcast_to(np.arange(start, start + values.shape[1]), values.shape)
    joined, names = np.concatenate([before[0], values], 1), np.concatenate([before[1], ids], 1)
    if joined.shape[1] <= kept:
        return joined, names
    top = np.argpartition(-joined, kept - 1, axis=1)[:, :kept]
    return np.take_along_axis(joined, top, 1), np.take_along_axis(names, top, 1)


def _exact(
    vocabulary: Vocabulary,
    vector: Rows,
    candidates: Mapping[str, npt.NDArray[np.int64]],
    count: int,
    itself: int | None,
) -> dict[str, tuple[NearToken, ...]]:
    """The nearest of the candidates of one vector, by their exact figures; of equals the first token."""
    ids = sorted({int(row) for rows in candidates.values() for row in rows} - {itself})
    near = dict(zip(ids, _figures(vector, vocabulary.chosen(ids), ids), strict=True)) if ids else {}
    found = {}
    for measure, rows in candidates.items():
        ranked = sorted(
            (near[row] for row in map(int, rows) if row in near), key=lambda n: (_FARNESS[measure](n), n.id)
        )
        found[measure] = tuple(ranked[:count])
    return found


def _figures(vector: Rows, rows: Rows, ids: Sequence[int]) -> list[NearToken]:
    one, many = vector.astype(np.float64), rows.astype(np.float64)
    dots = many @ one
    lengths = np.linalg.norm(many, axis=1) * np.linalg.norm(one)
    cosines = np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
    distances = np.linalg.norm(many - one, axis=1)
    return [
        NearToken(*figures) for figures in zip(ids, cosines.tolist(), distances.tolist(), dots.tolist(), strict=True)
    ]
