# SPDX-License-Identifier: Apache-2.0
"""Rows of token ids, and the side on which they are padded.

With GroupQueryAttention a row's length is the sum of its mask, so padding must be on the right: a mask with zeros on
the left is silently taken for a shorter row. Attention-23 looks at each element of the mask, but positions are indices:
padding on the right shifts every later token. Callers that pass rows need not care; a wrong mask is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from surgery_formats.errors import FitError

__all__ = ["Rows", "pad", "unpad"]

Rows = Sequence[Sequence[int]]
Ids = npt.NDArray[np.int64]
Side = Literal["right", "left", "any"]


def pad(rows: Rows, side: Side, filler: int = 0) -> tuple[Ids, Ids]:
    """Pad rows: ``(ids, mask)``, each ``(B, S)`` with ``S`` the longest row.

    Raises:
        FitError: no rows, or an empty one.
    """
    if not rows or not all(len(row) for row in rows):
        raise FitError("a row is empty", hint="give at least one token: most models have one for the beginning")
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), filler, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, span] = row
        mask[number, span] = 1
    return ids, mask


def unpad(ids: npt.NDArray[Any], mask: npt.NDArray[Any], side: Side) -> list[list[int]]:
    """Return the rows of a padded batch.

    Raises:
        FitError: padded on a side that the graph does not support, or a mask that is not one run of ones.
    """
    if ids.shape != mask.shape or ids.ndim != 2:
        raise FitError(f"input_ids are {list(ids.shape)}, attention_mask is {list(mask.shape)}")
    rows = []
    for row, marks in zip(ids.tolist(), mask.tolist(), strict=True):
        length = sum(marks)
        right, left = [1] * length + [0] * (len(marks) - length), [0] * (len(marks) - length) + [1] * length
        if marks == right and side in ("right", "any"):
            rows.append(row[:length])
        elif marks == left and side in ("left", "any"):
            rows.append(row[len(row) - length :])
        else:
            actual = "left" if marks == left else "right" if marks == right else "not at one end"
            where = f"on the {actual}" if actual in ("left", "right") else actual
            raise FitError(
                f"a row is padded {where}, but this graph takes padding on the {side}",
                hint="pass rows of different length: the runner pads them",
            )
    return rows
