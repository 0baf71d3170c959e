# SPDX-License-Identifier: Apache-2.0
"""HRA: ``W' = W (I - 2 u1 u1^T) ... (I - 2 ur ur^T)``, a chain of reflections (Yuan et al. 2024, arXiv:2405.17484)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, cast, namespace
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.products import add_product
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.groups import in_groups

__all__ = ["HRA"]

_DEPENDENT = 1e-4  # of a vector's length: what float32 training cannot tell from 0 after Gram-Schmidt


@dataclass(frozen=True, slots=True)
class HRA:
    """Householder reflections of the inputs of a layer: together an orthogonal matrix ``I - U T U^T``.

    Attributes:
        vectors: ``(in, rank)``, of any length.
        gram_schmidt: Whether the vectors are made orthogonal to those before them, so that the reflections commute.
        outputs: Rows of the weight; 0 until `fitted`.
    """

    kind: ClassVar[str] = "HRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    vectors: Factor
    gram_schmidt: bool
    outputs: int = 0

    @property
    def rank(self) -> int:
        """Number of reflections."""
        return self.vectors.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.outputs, self.vectors.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The vectors'."""
        return self.vectors.tensors

    @property
    def group(self) -> int:
        """All columns are mixed."""
        return self.vectors.shape[0]

    @property
    def held_numbers(self) -> int:
        """The vectors, twice, and what they are made of."""
        return 4 * self.vectors.shape[0] * self.rank

    def fitted(self, fit: Fit) -> HRA:
        """The rows of the weight."""
        return replace(self, outputs=fit.shape[0])

    def factors(self) -> dict[str, Factor]:
        """``vectors``."""
        return {"vectors": self.vectors}

    def low_rank(self) -> None:
        """None: it reflects the weight."""

    def parts(self) -> tuple[tuple[int, HRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Make U and T in float64 once; each block costs two rank-r products."""
        U, T = self._reflections(weight.device)
        return self._reflecting(U, T, weight)

    def lost(self, weight: Weight) -> None:
        """Nothing: reflections are undone in the other order."""

    def inverse(self, weight: Weight, share: float, lost: Array | None) -> Apply:
        """``W' (I - w U T U^T)^-1``, by Woodbury's formula; where a part of W is lost, the smallest that fits."""
        U, T = self._reflections(weight.device)
        xp = namespace(T)
        inverse = T.mT if share == 1.0 else xp.linalg.pinv(U.mT @ U - xp.linalg.inv(share * T))
        return self._reflecting(U, inverse, weight)

    def _reflecting(self, U: Array, T: Array, weight: Weight) -> Apply:
        left, right = cast(-(U @ T), weight.dtype), cast(U.mT, weight.dtype)

        def turn(block: Array, rows: Index, cols: Index) -> Array:
            return add_product(block, block @ left, right)

        return in_groups(self.group, turn)

    def _reflections(self, device: str) -> tuple[Array, Array]:
        """``U (in, rank)`` of columns of length 1 and the upper triangular ``T``, in float64 (compact WY form)."""
        U = self.vectors.load(DType.F64, device)
        xp = namespace(U)
        lengths = xp.linalg.vector_norm(U, axis=0)
        if self.gram_schmidt:
            Q, R = xp.linalg.qr(U)
            more = self.rank > U.shape[0]  # vectors than directions
            if more or bool(xp.any(xp.abs(xp.linalg.diagonal(R)) <= _DEPENDENT * lengths)):
                raise self._error("one of its vectors depends on those before it: Gram-Schmidt has no answer")
            return Q, 2 * xp.eye(self.rank, dtype=U.dtype, device=U.device)
        if not bool(xp.all(lengths > 0)):
            raise self._error("one of its vectors is 0: it has no reflection")
        U = U / lengths
        products, T = U.mT @ U, 2 * xp.eye(self.rank, dtype=U.dtype, device=U.device)
        for j in range(1, self.rank):
            T[:j, j] = -2 * (T[:j, :j] @ products[:j, j])
        return U, T

    def _error(self, why: str) -> FitError:
        stored = self.vectors.tensors[0]
        return FitError(why, file=stored.path, tensor=stored.name, hint="was it trained to the end?")
