# SPDX-License-Identifier: Apache-2.0
"""OSF: ``W' = W - W_k + U diag(S) V``, W_k the part along its k smallest singular values (Nayak et al. 2025, arXiv:2504.07097)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery_formats.arrays import Array, cast, namespace
from surgery_formats.products import add_product
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.spectrum import part_of, whole_weight

__all__ = ["OSF"]


@dataclass(frozen=True, slots=True)
class OSF:
    """The lower part of a weight's spectrum, trained in full.

    Attributes:
        U: ``U_low``, ``(out, k)``.
        S: ``S_low``, ``(k,)``.
        V: ``V_low``, ``(k, in)``.
    """

    kind: ClassVar[str] = "OSF"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "maps"
    together: ClassVar[bool] = False
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    U: Factor
    S: Factor
    V: Factor

    @property
    def rank(self) -> int:
        """Of the part that is replaced."""
        return self.S.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.U.shape[0], self.V.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of U, S and V."""
        return (*self.U.tensors, *self.S.tensors, *self.V.tensors)

    @property
    def held_numbers(self) -> int:
        """The weight, its two parts, and the Gram matrix of its short side with its vectors."""
        (out, inputs), short = self.shape, min(self.shape)
        return 2 * out * inputs + 2 * self.rank * (out + inputs) + 3 * short**2

    def factors(self) -> dict[str, Factor]:
        """``U``, ``S`` and ``V``."""
        return {"U": self.U, "S": self.S, "V": self.V}

    def low_rank(self) -> None:
        """None: what is taken away depends on the weight."""

    def parts(self) -> tuple[tuple[int, OSF], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Take the weight apart in float64 once; each block costs one product of rank 2 k."""
        left, right = part_of(whole_weight(weight, self.shape, self.tensors[0]), "minor", self.rank)
        U, S, V = (factor.load(weight.dtype, weight.device) for factor in (self.U, self.S, self.V))
        xp = namespace(left)
        B = xp.concat([U * S, cast(-left, weight.dtype)], axis=1)
        A = xp.concat([V, cast(right, weight.dtype)], axis=0)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            return add_product(block, positions(B, 0, rows), positions(A, 1, cols))

        return apply
