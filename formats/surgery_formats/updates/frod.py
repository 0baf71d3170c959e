# SPDX-License-Identifier: Apache-2.0
"""FRoD: ``W' = U (S + diag(l)) V^T``, U such that the base is ``U diag(n) V^T`` (doi:10.1609/aaai.v40i31.39813)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, array_of, cast, namespace, to_cpu, to_device
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.groups import in_groups
from surgery_formats.updates.sparse import check_places
from surgery_formats.updates.spectrum import all_blocks

__all__ = ["FRoD"]

_NOTHING = 1e-12  # columns of this length and less have no direction in PEFT


@dataclass(frozen=True, slots=True)
class FRoD:
    """What is between two bases of a weight, trained: a diagonal, and a few elements beside it.

    The columns of ``W V^-T`` have the lengths n and the directions U. So the weight is mapped from the right, by
    ``V^-T diag(1 / n) (S + diag(l)) V^T``: rows stay independent, and the signs of V's columns cancel out.

    Attributes:
        V: ``(in, in)``, of all modules of one name; stored, and not trained.
        diagonal: ``frod_lambda_l``, ``(in,)``.
        values: ``frod_lambda_s_values``, ``(n,)``.
        places: ``(2, n)``, row and column of each value in S; not trained.
        sizes: Stored tensors that say how large S is.
        outputs: Rows of the weight; 0 until `fitted`.
    """

    kind: ClassVar[str] = "FRoD"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "maps"
    together: ClassVar[bool] = True
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None

    V: Factor
    diagonal: Factor
    values: Factor
    places: Tensor
    sizes: tuple[Tensor, ...] = ()
    outputs: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.outputs, self.V.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The trained ones, then the others."""
        return (*self.diagonal.tensors, *self.values.tensors, *self.untrained)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """V's, the places, and what says how large S is."""
        return (*self.V.tensors, self.places, *self.sizes)

    @property
    def group(self) -> int:
        """All columns are mixed."""
        return self.V.shape[0]

    @property
    def held_numbers(self) -> int:
        """V, its inverse, and what they are multiplied to."""
        return 5 * self.V.shape[0] ** 2

    def fitted(self, fit: Fit) -> FRoD:
        """The rows of the weight."""
        return replace(self, outputs=fit.shape[0])

    def factors(self) -> dict[str, Factor]:
        """``V``, ``diagonal`` and ``values``."""
        return {"V": self.V, "diagonal": self.diagonal, "values": self.values}

    def low_rank(self) -> None:
        """None: it maps the weight."""

    def parts(self) -> tuple[tuple[int, FRoD], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """One pass over the weight for the lengths n; each block costs one product with the map.

        All of it is float64: where all weights of a name together have fewer rows than columns, some lengths are what V's
        rounding left, a ten-millionth of the others, and the map has numbers as large as their inverses.
        """
        V = self.V.load(DType.F64, weight.device)
        xp = namespace(V)
        into = self._inverse(V).T
        squares = xp.zeros(len(V), dtype=xp.float64, device=V.device)
        for block, _, cols in all_blocks(weight, self.shape, self.tensors[0]):
            if not isinstance(cols, range):
                block = xp.take(block, xp.argsort(array_of(list(cols), DType.I64, block)), axis=1)
            squares += xp.sum((cast(block, DType.F64) @ into) ** 2, axis=0)
        lengths = xp.sqrt(squares)
        known = lengths > _NOTHING
        into = into * xp.where(known, 1 / xp.where(known, lengths, 1.0), 0.0)
        turned = into @ self._between(weight.device) @ V.T

        def turn(block: Array, rows: Index, cols: Index) -> Array:
            return cast(cast(block, DType.F64) @ turned, weight.dtype)

        return in_groups(self.group, turn)

    def _between(self, device: str) -> Array:
        """``S + diag(l)`` in float64."""
        import numpy

        size = self.V.shape[0]
        rows, cols = to_cpu(self.places.read()).astype(numpy.int64)
        check_places(rows, cols, (size, size), self.places)
        between = numpy.diag(to_cpu(self.diagonal.load(DType.F64)))
        numpy.add.at(between, (rows, cols), to_cpu(self.values.load(DType.F64)))
        return to_device(between, device)

    def _inverse(self, V: Array) -> Array:
        """``V^-1``; of a V without one the pseudoinverse, as in PEFT."""
        import numpy

        try:
            return namespace(V).linalg.inv(V)
        except (numpy.linalg.LinAlgError, RuntimeError):  # torch's error is a RuntimeError
            return to_device(numpy.linalg.pinv(to_cpu(V), rtol=1e-6), str(V.device))
