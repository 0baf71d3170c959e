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
        of: How many a matrix has, computed or not: the least and the greatest.
        complete: Whether all that are above the edge were computed, of every matrix.
        by_edge: Whether `values` are relative to the edge of noise.
    """

    role: str
    matrices: int
    values: tuple[float, ...]
    above: float
    of: tuple[int, int]
    complete: bool
    by_edge: bool


def role_spectra(factored: Mapping[str, TargetFactors], role: Callable[[str], str]) -> tuple[RoleSpectrum, ...]:
    """The spectra of the targets by role, which `role` tells of a path, in the order of their paths.

    That of `factored` is the one in which threads were done.
    """
    matrices: dict[str, list[tuple[FactorisedMatrix, int]]] = {}
    for path, target in sorted(factored.items()):
        sized = ((matrix, target.target.largest_rank) for matrix in target.matrices if matrix.values)
        matrices.setdefault(role(path), []).extend(sized)
    by_edge = all(matrix.edge > 0 for group in matrices.values() for matrix, _ in group)
    return tuple(_spectrum(name, group, by_edge=by_edge) for name, group in matrices.items() if group)


def _spectrum(role: str, sized: Sequence[tuple[FactorisedMatrix, int]], *, by_edge: bool) -> RoleSpectrum:
    matrices = [matrix for matrix, _ in sized]
    columns = _columns(
        [matrix.values for matrix in matrices], [matrix.edge if by_edge else matrix.values[0] for matrix in matrices]
    )
    above = statistics.median(matrix.signal for matrix in matrices)
    sizes = [size for _, size in sized]
    complete = all(matrix.signal < len(matrix.values) or len(matrix.values) >= size for matrix, size in sized)
    return RoleSpectrum(
        role, len(matrices), tuple(map(statistics.median, columns)), above, (min(sizes), max(sizes)), complete, by_edge
    )


def _columns(spectra: Sequence[Sequence[float]], units: Sequence[float]) -> Iterator[list[float]]:
    for index in range(min(map(len, spectra))):
        yield [values[index] / unit for values, unit in zip(spectra, units, strict=True) if unit]
