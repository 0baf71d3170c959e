# SPDX-License-Identifier: Apache-2.0
"""How the change of each part of a network spreads over directions, beside what rounding alone would look like."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.extraction.factorise import FactorisedMatrix, TargetFactors

__all__ = ["RoleSpectrum", "role_spectra"]


@dataclass(frozen=True, slots=True)
class RoleSpectrum:
    """The singular values of the changes of all matrices of one role.

    Attributes:
        role: ``attention``, ``mlp`` ...
        matrices: How many there are.
        values: Of each direction the median over the matrices, relative to the largest value that rounding alone would have
            in that matrix, or to its own first value if there is no rounding (`by_edge`). As many as every matrix has.
        above: How many values of a matrix are above that edge, as the median.
        by_edge: Whether `values` are relative to the edge of noise.
    """

    role: str
    matrices: int
    values: tuple[float, ...]
    above: float
    by_edge: bool


def role_spectra(factored: Mapping[str, TargetFactors], role: Callable[[str], str]) -> tuple[RoleSpectrum, ...]:
    """The spectra of the targets by role, in order of first appearance; `role` tells it of a path."""
    matrices: dict[str, list[FactorisedMatrix]] = {}
    for path, target in factored.items():
        matrices.setdefault(role(path), []).extend(matrix for matrix in target.matrices if matrix.values)
    by_edge = all(matrix.edge > 0 for group in matrices.values() for matrix in group)
    return tuple(_spectrum(name, group, by_edge=by_edge) for name, group in matrices.items() if group)


def _spectrum(role: str, matrices: Sequence[FactorisedMatrix], *, by_edge: bool) -> RoleSpectrum:
    columns = _columns(
        [matrix.values for matrix in matrices], [matrix.edge if by_edge else matrix.values[0] for matrix in matrices]
    )
    above = statistics.median(matrix.signal for matrix in matrices)
    return RoleSpectrum(role, len(matrices), tuple(map(statistics.median, columns)), above, by_edge)


def _columns(spectra: Sequence[Sequence[float]], units: Sequence[float]) -> Iterator[list[float]]:
    for index in range(min(map(len, spectra))):
        yield [values[index] / unit for values, unit in zip(spectra, units, strict=True) if unit]
