# SPDX-License-Identifier: Apache-2.0
"""What became of the codes of one weight, summed over a fixed sample of its outputs."""

from __future__ import annotations

import numpy

from surgery.engine.ledger import CodeChange
from surgery.engine.quantised.listening import Span
from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.linalg.survival import Survival

__all__ = ["CodeTally"]


class CodeTally:
    """Sums over every eighth row, or every eighth column where rows are inputs; over all of a small weight."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._codes = self._moved = 0
        self._inside = Survival()
        self._listened = False
        self._sums: tuple[Array, Array] | None = None  # of the span that is under way, where rows are inputs

    def note(self, span: Span, start: int, values: tuple[Array, Array, Array], codes: tuple[Array, Array]) -> None:
        """A block of rows.

        Args:
            span: That it belongs to.
            start: Its first row.
            values: As they were stored, as they are wanted, and as a reader will get them.
            codes: Before and after.
        """
        sample = (slice(None), slice(None, None, self._step)) if span.transposed else (slice(None, None, self._step),)
        before, after = (each[sample] for each in codes)
        self._codes += before.size
        self._moved += int(numpy.count_nonzero(before != after))
        if span.directions is None:
            return
        self._listened = True
        stored, wanted, rounded = (each[sample] for each in values)
        directions = cast(span.directions, DType.F32)
        update, change = wanted - stored, rounded - stored
        if not span.transposed:
            self._add(update @ directions.T, change @ directions.T)
            return
        first = start - span.start
        mine = directions[:, first : first + len(update)]
        sums = mine @ update, mine @ change
        self._sums = sums if self._sums is None else (self._sums[0] + sums[0], self._sums[1] + sums[1])

    def close(self) -> None:
        """A span is complete."""
        if self._sums is not None:
            self._add(*self._sums)
            self._sums = None

    def _add(self, update: Array, change: Array) -> None:
        self._inside = Survival.total((self._inside, Survival.of(cast(update, DType.F64), cast(change, DType.F64))))

    def result(self, rounding: str, scales: str) -> CodeChange:
        """The sums."""
        inside = self._inside if self._listened else None
        return CodeChange(self._codes, self._moved, rounding, scales, *(inside or ()))
