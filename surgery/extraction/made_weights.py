# SPDX-License-Identifier: Apache-2.0
"""Parameters of the model's class that transformers makes of several tensors of a file, or of a part of one.

Their differences are read where the tensors lie: rows of one below those of another, a part of the rows, turned, or in
another order, which then is the order of the factors' rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from surgery.extraction.pairing import Delta, Pair, Strip
from surgery_formats.models.component import Component
from surgery_formats.models.conversions import matrices_of
from surgery_formats.models.eras import Era, Eras
from surgery_formats.storage.aligned import turned
from surgery_formats.storage.base import Storage
from surgery_formats.storage.parameter import Parameter
from surgery_formats.tensors.views import whole

__all__ = ["MadeWeight", "made_weights"]


@dataclass(frozen=True, slots=True)
class MadeWeight:
    """A parameter of the class and the differences that make its own.

    Attributes:
        path: Its name in the class.
        deltas: One per expert, or a single one.
        stacked: Whether it is a stack of experts.
        order: The row of a difference that each row of the parameter is; empty for the same.
    """

    path: str
    deltas: tuple[Delta, ...]
    stacked: bool
    order: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of TUNED that make it."""
        return tuple(dict.fromkeys(name for delta in self.deltas for name in delta.names))


def made_weights(eras: Eras, pairs: Mapping[str, Pair], base: Component) -> Iterator[MadeWeight]:
    """The parameters that are made of matrices among `pairs`, as far as their places in these can be told.

    Raises:
        FitError: an expert is missing.
    """
    for path, era in eras.parameters.items():
        if era.conversion is None or not all(name in pairs for name in era.stored.values()):
            continue
        sizes = [pairs[name].tuned.sizes for name in era.stored.values()]
        if all(pairs[name].is_float for name in era.stored.values()) and all(len(size) in (2, 3) for size in sizes):
            made = _made(path, era, pairs, base)
            if made is not None:
                yield made


def _made(path: str, era: Era, pairs: Mapping[str, Pair], base: Component) -> MadeWeight | None:
    def stored(name: str) -> Parameter:
        tuned = _upright(pairs[name])[1]
        return Parameter(name, tuned, whole(tuned.shape))

    found = [_delta(matrix, pairs) for matrix in matrices_of(path, era, stored, base.config)]
    deltas = [delta for delta in found if delta is not None]
    orders = {order for _, order in deltas}
    if not deltas or len(deltas) < len(found) or len(orders) > 1:
        return None
    steps = era.conversion.steps if era.conversion else ()
    stacked = len(found) > 1 or any(step == "MergeModulelist" for step, _ in steps)
    return MadeWeight(path, tuple(delta for delta, _ in deltas), stacked, orders.pop())


def _upright(pair: Pair) -> tuple[Storage, Storage]:
    """Both sides with the rows that the model's code has."""
    base, tuned = pair.matrices(stacked=True)
    return (turned(base), turned(tuned)) if base.transposed else (base, tuned)


def _delta(matrix: Sequence[Parameter], pairs: Mapping[str, Pair]) -> tuple[Delta, tuple[int, ...]] | None:
    """The difference of one matrix and the order of its rows; None if it is no run of stored rows."""
    pieces: dict[str, list[int]] = {}
    order: list[int] = []
    names = tuple(dict.fromkeys(pairs[piece.name].name for piece in matrix))
    flips = {piece.view.transposed for piece in matrix}
    if len(flips) > 1 or (True in flips and len(matrix) > 1):
        return None
    for piece in matrix:
        across = piece.view.rows if piece.view.transposed else piece.view.cols
        if list(across) != list(range(piece.storage.shape[1])):
            return None
        pieces.setdefault(piece.name, []).extend(piece.view.cols if piece.view.transposed else piece.view.rows)
    strips: list[Strip] = []
    at = 0
    for name, rows in pieces.items():
        first, last = min(rows), max(rows) + 1
        if len(rows) != last - first or len(set(rows)) != len(rows):
            return None
        base, tuned = _upright(pairs[name])
        strips.append(Strip(base, tuned, first, last))
        order += [at + row - first for row in rows]
        at += len(rows)
    if True in flips and order != list(range(at)):
        return None
    kept = () if order == list(range(at)) else tuple(order)
    return Delta(tuple(strips), True in flips, names), kept
