# SPDX-License-Identifier: Apache-2.0
"""The SVD of a change that is formed in full, and where it is worked out: here, or by who has done it before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy

from surgery_formats.arrays import Array

__all__ = ["HERE", "ChangeSVD", "ListedSVDs", "SVDTask", "SVDs"]


class ChangeSVD(NamedTuple):
    """The best factors of a change, float64.

    Attributes:
        B: ``(out, rank)``.
        A: ``(rank, in)``.
        values: Singular values, descending, ``(rank,)``.
        lost: Frobenius norm of what the factors leave out.
        norm: Of the change.
    """

    B: Array
    A: Array
    values: Array
    lost: float
    norm: float


Solve = Callable[[], ChangeSVD]


class SVDs(Protocol):
    """Where SVDs come from; any thread may ask."""

    def of(self, name: str, shape: tuple[int, int], solve: Solve) -> ChangeSVD:
        """The SVD of the change of the weight `name`, ``(out, in)``, as `solve` would work it out."""
        ...


class _Here:
    """Works them out."""

    def of(self, name: str, shape: tuple[int, int], solve: Solve) -> ChangeSVD:
        return solve()


HERE: SVDs = _Here()


class SVDTask(NamedTuple):
    """An SVD to be worked out.

    Attributes:
        name: The weight.
        shape: ``(out, in)`` of its change.
        solve: Works it out.
    """

    name: str
    shape: tuple[int, int]
    solve: Solve


@dataclass(frozen=True)
class ListedSVDs:
    """Works none out, and lists what is asked for: an empty change stands for each."""

    tasks: list[SVDTask] = field(default_factory=list)

    def of(self, name: str, shape: tuple[int, int], solve: Solve) -> ChangeSVD:
        """See `SVDs`."""
        self.tasks.append(SVDTask(name, shape, solve))
        out, inputs = shape
        return ChangeSVD(numpy.zeros((out, 1)), numpy.zeros((1, inputs)), numpy.zeros(1), 0.0, 0.0)
