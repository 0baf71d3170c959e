# SPDX-License-Identifier: Apache-2.0
"""How work is shared out: the same wherever it is asked, so that nothing but a number has to travel."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypeVar

from surgery_formats.errors import FitError

__all__ = ["one_of_shares", "shared_out"]

Share = TypeVar("Share")


def shared_out(sizes: Sequence[int], count: int) -> list[list[int]]:
    """The numbers of the pieces in each of `count` shares: the largest piece first, each to the share that has least."""
    loads = [(0, index) for index in range(count)]  # a heap: of several that have least, the first
    shares: list[list[int]] = [[] for _ in range(count)]
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        load, index = loads[0]
        heapq.heapreplace(loads, (load + sizes[piece], index))
        shares[index].append(piece)
    return shares


def one_of_shares(shares: Sequence[Share], index: int) -> Share:
    """The share `index`.

    Raises:
        FitError: there is none.
    """
    if not 0 <= index < len(shares):
        raise FitError(f"there is no share {index} of {len(shares)}", hint="shares are counted from 0")
    return shares[index]
