# SPDX-License-Identifier: Apache-2.0
"""LoKr: ``W' = W + s kron(C, D)``, a Kronecker product (Yeh et al. 2023, LyCORIS, arXiv:2309.14859)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, array_of, namespace
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.lora import LoRA

__all__ = ["LoKr"]


@dataclass(frozen=True, slots=True)
class LoKr:
    """A Kronecker product of two small matrices, of which an element is one product of two numbers.

    Attributes:
        C: ``lokr_w1``, ``(a, b)``.
        D: ``lokr_w2``, ``(c, d * kernel)``; both may be products of low-rank factors.
        scale: ``alpha / rank``.
        alpha: As written in the file.
        rank: As configured; the shapes of full matrices do not tell it.
        kernel: 1, unless `crossed`.
        crossed: Whether the delta has the order that PEFT gives a Conv1d whose ``lokr_w2`` is stored whole,
            ``(c, d, kernel)``: PEFT takes ``kron`` of a matrix and a 3-D tensor, so that the element of `D`, not of
            `C`, is the slow index of rows and columns.
        noted: Stored tensors that `scale` was read from.
    """

    kind: ClassVar[str] = "LoKr"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"

    C: Factor
    D: Factor
    scale: float
    alpha: float | None = None
    rank: int | None = None
    kernel: int = 1
    crossed: bool = False
    noted: tuple[Tensor, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.C.shape[0] * self.D.shape[0], self.C.shape[1] * self.D.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of both factors."""
        return (*self.C.tensors, *self.D.tensors, *self.noted)

    def scaled(self, weight: float) -> LoKr:
        """The same addition, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """What the scale was read from."""
        return self.noted

    def factors(self) -> dict[str, Factor]:
        """``C`` and ``D``."""
        return {"C": self.C, "D": self.D}

    def low_rank(self) -> None:
        """None: its rank is the product of the factors' ranks, rarely low; see `expanded`."""

    def expanded(self) -> LoRA | None:
        """``kron(C' C'', D' D'') = kron(C', D') kron(C'', D'')``: of the rank of C times the rank of D.

        None where that is no low rank: where neither is a pair, so that only the short sides limit it, above half of the
        weight's directions.
        """
        first, second = _Pair.of(self.C), _Pair.of(self.D)
        rank, kernel, crossed = first.rank * second.rank, self.kernel, self.crossed
        if rank > (min(self.shape) if first.is_low or second.is_low else min(self.shape) // 2):
            return None

        def left(*stored: Array) -> Array:
            x, y = _both(first.left, second.left, (first.rank, second.rank), stored)
            if crossed:  # an element of D is the slow index of the rows
                return y[:, None, None, :] * x[None, :, :, None]
            return x[:, None, :, None] * y[None, :, None, :]

        def right(*stored: Array) -> Array:
            x, y = _both(first.right, second.right, (first.rank, second.rank), stored)
            if crossed:  # its channels outside, its kernel inside the columns of C
                return y.reshape(1, second.rank, -1, 1, kernel) * x.reshape(first.rank, 1, 1, -1, 1)
            return x[:, None, :, None] * y[None, :, None, :]

        out, inputs = self.shape
        sides = [[side for side in pair if side] for pair in zip(first.sides, second.sides, strict=True)]
        B = Factor.computed(sides[0], (out, rank), left)
        return LoRA(Factor.computed(sides[1], (rank, inputs), right), B, self.scale)

    def parts(self) -> tuple[tuple[int, LoKr], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load both once; each element of a block picks one number of each."""
        C = self.C.load(weight.dtype, weight.device) * self.scale
        D = self.D.load(weight.dtype, weight.device)
        (a, b), (c, dk), kernel = self.C.shape, self.D.shape, self.kernel

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            p = array_of(list(rows), DType.I64, block)
            # p = A c + C, and columns B d + D with the kernel inside; crossed p = C a + A, columns (D b + B) kernel + K
            left, right = (C[p % a], D[p // a]) if self.crossed else (C[p // c], D[p % c])
            if cols == range(b * dk):  # whole rows: outer products
                sizes = (len(p), dk // kernel, b, kernel) if self.crossed else (len(p), 1, b, dk)
                delta = left.reshape(len(p), 1, b, 1) * right.reshape(len(p), sizes[1], 1, sizes[3])
                block += delta.reshape(block.shape)
                return block
            q = array_of(list(cols), DType.I64, block)
            if self.crossed:
                left, right = left[:, q // kernel % b], right[:, q // (kernel * b) * kernel + q % kernel]
            else:
                left, right = left[:, q // dk], right[:, q % dk]
            block += left * right
            return block

        return apply


@dataclass(frozen=True, slots=True)
class _Pair:
    """A factor as a product of two.

    Attributes:
        left: ``(rows, rank)``; None for the identity.
        right: ``(rank, cols)``; None for the identity.
        rank: Inner size.
    """

    left: Factor | None
    right: Factor | None
    rank: int

    @classmethod
    def of(cls, factor: Factor) -> _Pair:
        """The stored pair if it is of low rank, else the factor beside an identity of its short side."""
        rows, cols = factor.shape
        if [len(term.shape) for term in factor.terms] == [2, 2]:
            left, right = factor.terms
            if left.shape[1] == right.shape[0] < min(rows, cols) and (left.shape[0], right.shape[1]) == (rows, cols):
                return cls(left, right, left.shape[1])
        return cls(None, factor, rows) if rows <= cols else cls(factor, None, cols)

    @property
    def is_low(self) -> bool:
        """Whether both sides are stored."""
        return self.left is not None and self.right is not None

    @property
    def sides(self) -> tuple[Factor | None, Factor | None]:
        """Left, right."""
        return self.left, self.right


def _both(x: Factor | None, y: Factor | None, ranks: tuple[int, int], stored: Sequence[Array]) -> tuple[Array, Array]:
    """Values of one side of both factors, of which at least one is stored; the identity for the other."""
    values = iter(stored)
    first, second = (None if side is None else next(values) for side in (x, y))
    like = stored[0]
    xp = namespace(like)
    first, second = (
        xp.eye(n, dtype=like.dtype) if v is None else v for v, n in zip((first, second), ranks, strict=True)
    )
    return first, second
