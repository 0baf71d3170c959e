# SPDX-License-Identifier: Apache-2.0
"""Solutions that are expensive to find and are asked for again at once: the factors of one update are written one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["RecentSolutions"]

_LIMIT = 256 << 20

Solution = TypeVar("Solution")


class RecentSolutions(Generic[Solution]):
    """The last solutions, as far as memory goes, and the errors of all.

    Attributes:
        errors: By key; kept for every solution that was ever found.
    """

    def __init__(self, nbytes: Callable[[Solution], int], limit: int = _LIMIT) -> None:
        """Remember up to `limit` bytes, but always the last solution; `nbytes` is the size of one."""
        self._recent: dict[str, Solution] = {}
        self._nbytes, self._limit = nbytes, limit
        self.errors: dict[str, float] = {}

    def of(self, key: str, solve: Callable[[], tuple[Solution, float]]) -> Solution:
        """The solution called `key`; `solve` returns it and its error, and is called if it is not remembered."""
        if key not in self._recent:
            solution, self.errors[key] = solve()
            self._recent[key] = solution
            while len(self._recent) > 1 and sum(map(self._nbytes, self._recent.values())) > self._limit:
                self._recent.pop(next(iter(self._recent)))
        return self._recent[key]
