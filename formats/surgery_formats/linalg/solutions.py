# SPDX-License-Identifier: Apache-2.0
"""A small memory of solutions that are expensive to find, because factors of one update are written one by one."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, get_ident
from typing import Generic, TypeVar

__all__ = ["RecentSolutions"]

_LIMIT = 256 << 20
_GROUPS = 8

Solution = TypeVar("Solution")


class RecentSolutions(Generic[Solution]):
    """The last solutions, as far as memory allows, and the errors of all. Threads that ask for one solution share it.

    Solutions of one group are asked for together, by the factors of one weight: once others are, they are done with. Of those only
    the last few are kept, so that what is held does not grow with the adapter.

    Attributes:
        errors: Errors by key, of every solution ever found.
    """

    def __init__(self, nbytes: Callable[[Solution], int], limit: int = _LIMIT, groups: int | None = _GROUPS) -> None:
        """Remember up to `limit` bytes, but always the last solution; `nbytes` measures one.

        Of `groups` the last are kept, and those that other threads asked for last; with None, all.
        """
        self._groups: dict[str, dict[str, tuple[Solution, int]]] = {}  # the one that was asked for last comes last
        self._held = 0
        self._asked: dict[int, str] = {}  # by thread: the group that it asked for last
        self._nbytes, self._limit, self._kept = nbytes, limit, groups
        self._guard, self._solving = Lock(), dict[str, Lock]()
        self.errors: dict[str, float] = {}

    def of(self, key: str, solve: Callable[[], tuple[Solution, float]], group: str | None = None) -> Solution:
        """Return the solution `key`, calling `solve` for it and its error unless it is remembered.

        Args:
            key: Names the solution.
            solve: Finds it.
            group: Names what it is asked for together with; by default it is a group of its own.
        """
        group = key if group is None else group
        with self._guard:
            self._asked[get_ident()] = group
            self._groups[group] = self._groups.pop(group, {})
            once = self._solving.setdefault(key, Lock())
        with once:
            with self._guard:
                if key in self._groups.get(group, {}):
                    return self._groups[group][key][0]
            solution, error = solve()
            with self._guard:
                nbytes = self._nbytes(solution)
                self._groups.setdefault(group, {})[key], self.errors[key] = (solution, nbytes), error
                self._held += nbytes
                self._forget_groups()
                self._forget_oldest(key)
            return solution

    def error_of(self, key: str, solve: Callable[[], tuple[Solution, float]]) -> float:
        """The error of the solution `key`, which is solved for only if it never was."""
        if key not in self.errors:
            self.of(key, solve)
        return self.errors[key]

    def _forget_groups(self) -> None:
        """Those that are done with, but for the last few."""
        if self._kept is None or len(self._groups) <= self._kept:
            return
        used = set(self._asked.values())
        done = [group for group in self._groups if group not in used]
        for group in done[: len(self._groups) - self._kept]:
            self._held -= sum(nbytes for _, nbytes in self._groups.pop(group).values())

    def _forget_oldest(self, last: str) -> None:
        """The oldest, until the rest fits into memory; not `last`."""
        for group, solutions in list(self._groups.items()) if self._held > self._limit else ():
            for key in list(solutions):
                if self._held > self._limit and key != last:
                    self._held -= solutions.pop(key)[1]
            if not solutions:
                del self._groups[group]
