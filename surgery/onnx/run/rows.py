# SPDX-License-Identifier: Apache-2.0
"""Rows of token ids, and the side they are padded on.

With GroupQueryAttention a row's length is the sum of its mask, so only padding on the right can be meant: a mask with zeros on the left
is taken for a shorter row, in silence. With Attention-23 the mask is looked at place by place, but places are positions: padding on the
right shifts every later token. Whoever hands over rows need not care; whoever hands over a mask is told.
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
    """``(ids, mask)``, each ``(B, S)`` with ``S`` the longest row.

    Raises:
        FitError: no row, or an empty one.
    """
    if not rows or not all(len(row) for row in rows):
        raise FitError("a row without a token", hint="give at least one token: most models have one for the beginning")
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), filler, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, place] = row
        mask[number, place] = 1
    return ids, mask


def unpad(ids: npt.NDArray[Any], mask: npt.NDArray[Any], side: Side) -> list[list[int]]:
    """The rows of a padded batch.

    Raises:
        FitError: padded on a side this graph does not take, or a mask that is not zeros and ones in one run.
    """
    if ids.shape != mask.shape or ids.ndim != 2:
        raise FitError(f"input_ids are {list(ids.shape)}, attention_mask is {list(mask.shape)}")
    found = []
    for row, marks in zip(ids.tolist(), mask.tolist(), strict=True):
        length = sum(marks)
        right, left = [1] * length + [0] * (len(marks) - length), [0] * (len(marks) - length) + [1] * length
        if marks == right and side in ("right", "any"):
            found.append(row[:length])
        elif marks == left and side in ("left", "any"):
            found.append(row[len(row) - length :])
        else:
            other = "left" if marks == left else "right" if marks == right else "not at one end"
            where = f"on the {other}" if other in ("left", "right") else other
            raise FitError(
                f"a row is padded {where}, this graph takes padding on the {side}",
                hint="hand over rows of different length: the runner pads them",
            )
    return found
