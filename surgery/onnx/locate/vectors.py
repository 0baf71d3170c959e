# SPDX-License-Identifier: Apache-2.0
"""Biases, weights of norms and other vectors: alone, or one behind the other in a vector of the graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from surgery.onnx.locate.aspect import bits, differing, rounded_bits
from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.locate.pieces import LocatedPiece
from surgery.onnx.locate.wanted import KEY, Wanted
from surgery_formats.dtypes import DType

if TYPE_CHECKING:
    import numpy

__all__ = ["Vectors", "is_uniform", "vectors_in"]

_LONGEST = 1 << 22  # elements of a vector in which others are looked for


class Vectors:
    """The vectors among the weights, whole, in each type that is asked for."""

    def __init__(self, weights: Iterable[Wanted]) -> None:
        self.weights = [weight for weight in weights if weight.is_vector]
        self._of_type: dict[DType, dict[bytes, list[tuple[Wanted, numpy.ndarray]]]] = {}

    def beginning(self, dtype: DType, key: bytes) -> list[tuple[Wanted, numpy.ndarray]]:
        """Those that begin so, with all their bits."""
        if dtype not in self._of_type:
            table = self._of_type[dtype] = {}
            for weight in self.weights:
                values = rounded_bits(weight.block(0, weight.rows).reshape(-1), dtype)
                table.setdefault(values[:KEY].tobytes(), []).append((weight, values))
        return self._of_type[dtype].get(key, [])


def is_uniform(values: numpy.ndarray) -> bool:
    """Whether all values are one."""
    return bool((values == values.flat[0]).all())


def vectors_in(matrix: Matrix, vectors: Vectors) -> list[LocatedPiece]:
    """The vectors that a vector of the graph consists of, bit for bit; those of one value only if they are all of it."""
    import numpy

    if matrix.numel > _LONGEST:
        return []
    there = bits(numpy.ascontiguousarray(matrix.flat(0, matrix.numel)), matrix.dtype)
    found = _all_of_it(matrix, there, vectors)
    if found is not None:
        return [found]
    pieces: list[LocatedPiece] = []
    at = 0
    while at < len(there):
        fits = [
            weight
            for weight, values in vectors.beginning(matrix.dtype, there[at : at + KEY].tobytes())
            if len(values) >= KEY
            and not is_uniform(values)
            and _same(values, there[at : at + len(values)], matrix.dtype)
        ]
        if not fits:
            at += 1
            continue
        stop = at + fits[0].rows * fits[0].cols
        first, *also = fits
        pieces.append(
            LocatedPiece(first, matrix, False, False, range(at, stop), range(stop - at), also=_of_size(also, stop - at))
        )
        at = stop
    return pieces


def _all_of_it(matrix: Matrix, there: numpy.ndarray, vectors: Vectors) -> LocatedPiece | None:
    fits = [
        weight
        for weight, values in vectors.beginning(matrix.dtype, there[:KEY].tobytes())
        if _same(values, there, matrix.dtype)
    ]
    if not fits:
        return None
    whole = range(len(there))
    return LocatedPiece(fits[0], matrix, False, False, whole, whole, also=tuple(fits[1:]))


def _same(mine: numpy.ndarray, there: numpy.ndarray, dtype: DType) -> bool:
    return len(mine) == len(there) and not differing(mine, there, dtype).any()


def _of_size(weights: Iterable[Wanted], size: int) -> tuple[Wanted, ...]:
    return tuple(weight for weight in weights if weight.rows * weight.cols == size)
