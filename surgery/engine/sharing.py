# SPDX-License-Identifier: Apache-2.0
"""How work is shared out: the same wherever it is asked, so that nothing but a number has to travel."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.errors import FitError

__all__ = ["check_share", "shared_out"]


def shared_out(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """The share, of `count`, that each piece of work is in: the largest first, each to the share that has least."""
    loads, shares = [0] * count, [0] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        share = shares[piece] = loads.index(min(loads))
        loads[share] += sizes[piece]
    return tuple(shares)


def check_share(index: int, count: int) -> None:
    """Refuse a share that there is not.

    Raises:
        FitError: there is no share `index` of `count`.
    """
    if not 0 <= index < count:
        raise FitError(f"there is no share {index} of {count}", hint="shares are counted from 0")
