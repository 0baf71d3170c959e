# SPDX-License-Identifier: Apache-2.0
"""A small memory of solutions that are expensive to find, because factors of one update are written one by one."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

__all__ = ["RecentSolutions"]

_LIMIT = 256 << 20

Solution = TypeVar("Solution")


class RecentSolutions(Generic[Solution]):
    """The last solutions, as far as memory allows, and the errors of all. Threads that ask for one solution share it.

    Attributes:
        errors: Errors by key, of every solution ever found.
    """

    def __init__(self, nbytes: Callable[[Solution], int], limit: int = _LIMIT) -> None:
        """Remember up to `limit` bytes, but always the last solution; `nbytes` measures one."""
        self._recent: dict[str, Solution] = {}
        self._nbytes, self._limit = nbytes, limit
        self._guard, self._solving = Lock(), dict[str, Lock]()
        self.errors: dict[str, float] = {}

    def of(self, key: str, solve: Callable[[], tuple[Solution, float]]) -> Solution:
        """Return the solution `key`, calling `solve` for it and its error unless it is remembered."""
        with self._guard:
            once = self._solving.setdefault(key, Lock())
        with once:
            with self._guard:
                if key in self._recent:
                    return self._recent[key]
            solution, error = solve()
            with self._guard:
                self._recent[key], self.errors[key] = solution, error
                while len(self._recent) > 1 and sum(map(self._nbytes, self._recent.values())) > self._limit:
                    self._recent.pop(next(iter(self._recent)))
            return solution
