# SPDX-License-Identifier: Apache-2.0
"""DEFT: ``W' = W - Q P^T W + Q s R`` (NeurIPS 2025); PaRa, without R (Chen et al. 2024, arXiv:2406.05641)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, cast, namespace, to_cpu, to_device
from surgery_formats.dtypes import DType
from surgery_formats.products import add_product
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.spectrum import all_blocks

__all__ = ["DEFT"]


@dataclass(frozen=True, slots=True)
class DEFT:
    """What a weight has in a subspace of its outputs is taken away, and a trained matrix is put there.

    Attributes:
        P: ``deft_P``, ``(out, rank)``.
        R: ``deft_R``, ``(rank, in)``; None for PaRa, which only takes away.
        orthonormal: Whether Q is that of P's QR decomposition and projects orthogonally; else Q is P and projects by
            ``relu(P)``.
        scale: On R; ``alpha / rank``, or 1 without alpha.
        inputs: Columns of the weight; 0 until `fitted` where there is no R.
    """

    kind: ClassVar[str] = "DEFT"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "maps"
    together: ClassVar[bool] = True
    alpha: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    P: Factor
    R: Factor | None
    orthonormal: bool
    scale: float = 1.0
    inputs: int = 0

    @property
    def rank(self) -> int:
        """Of the subspace."""
        return self.P.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.P.shape[0], self.R.shape[1] if self.R else self.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """P's, then R's."""
        return (*self.P.tensors, *(self.R.tensors if self.R else ()))

    def fitted(self, fit: Fit) -> DEFT:
        """The width of the weight where the file does not tell."""
        return self if self.R else replace(self, inputs=fit.shape[1])

    def factors(self) -> dict[str, Factor]:
        """``P``, and ``R`` where there is one."""
        return {"P": self.P, **({"R": self.R} if self.R else {})}

    def low_rank(self) -> None:
        """None: what is taken away depends on the weight."""

    def parts(self) -> tuple[tuple[int, DEFT], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """One pass over the weight for what it has in the subspace, ``(rank, in)`` in float64; blocks cost one product.

        The columns of Q have the signs that Householder's reflections give them (LAPACK's, like PEFT's): R was trained
        for these.
        """
        import numpy

        P = to_cpu(self.P.load(DType.F64))
        Q = numpy.linalg.qr(P)[0] if self.orthonormal else P
        right = to_device(Q if self.orthonormal else P.clip(min=0), weight.device)
        xp = namespace(right)
        held = xp.zeros((self.rank, self.shape[1]), dtype=xp.float64, device=right.device)
        for block, rows, cols in all_blocks(weight, self.shape, self.tensors[0]):
            at = slice(cols.start, cols.stop, cols.step) if isinstance(cols, range) else list(cols)
            held[:, at] += positions(right, 0, rows).T @ cast(block, DType.F64)
        fill = self.scale * self.R.load(DType.F64, weight.device) if self.R else 0.0
        A, B = cast(fill - held, weight.dtype), cast(to_device(Q, weight.device), weight.dtype)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            return add_product(block, positions(B, 0, rows), positions(A, 1, cols))

        return apply
