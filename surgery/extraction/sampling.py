# SPDX-License-Identifier: Apache-2.0
"""Some rows of a matrix, enough to estimate what all of them would show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from surgery_formats.arrays import Array, cast, empty, namespace, wide
from surgery_formats.storage.base import Storage

__all__ = ["at_rows", "read_runs", "sample_runs"]

_LOOKED_AT = 1 << 18
"""Elements of a target that survival is computed from, in `_RUNS` runs of rows: its standard error is then
below 1 %."""
_RUNS = 16


def read_runs(weight: Storage, first: int, runs: Sequence[tuple[int, int]]) -> Array:
    """Runs ``(start, stop)`` of rows, counted from `first`, stacked, in float32 (or float64 where it is stored so)."""
    count = sum(stop - start for start, stop in runs)
    block, at = empty((count, weight.shape[1]), weight.dtype), 0
    for start, stop in runs:
        weight.read_into(block[at : at + stop - start], first + start)
        at += stop - start
    return cast(block, wide(weight.dtype))


def at_rows(values: Array, runs: Sequence[tuple[int, int]], axis: int = -2) -> Array:
    """The same rows of matrices in memory ``(..., rows, cols)``: one large product keeps threads busier than many small."""
    if len(runs) == 1 and runs[0] == (0, values.shape[axis]):
        return values
    after = (slice(None),) * (-axis - 1)
    return namespace(values).concat([values[(..., slice(start, stop), *after)] for start, stop in runs], axis=axis)


def sample_runs(rows: int, cols: int, share: int = 1) -> Iterator[tuple[int, int]]:
    """Runs of rows, spread evenly; all rows of a small matrix. `share` such matrices are sampled together."""
    some = max(1, _LOOKED_AT // max(cols * share, 1))
    if some >= rows:
        yield 0, rows
        return
    runs = min(_RUNS, some)
    for number in range(runs):
        start = math.floor(number * rows / runs)
        yield start, min(start + some // runs, rows)
