# SPDX-License-Identifier: Apache-2.0
"""BOFT: ``W' = diag(s) W R^T``, R a product of block-diagonal rotations between shuffles (Liu et al. 2023, arXiv:2311.06243)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery_formats.arrays import Array, array_of, cast, namespace
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.groups import in_groups

__all__ = ["BOFT"]


@dataclass(frozen=True, slots=True)
class BOFT:
    """Butterfly rotations of the inputs of a layer, and lengths for its outputs.

    Factor i turns blocks of columns after a shuffle within groups of ``2^i`` blocks: of the halves of the blocks in a
    group, first those of even number, then those of odd number. Factor 0 is not shuffled.

    Attributes:
        generators: ``boft_R``, ``(factors, blocks, n, n)``: each block is made skew-symmetric, ``Q = (X - X^T) / 2``, and
            turned into the rotation ``(I - Q)(I + Q)^-1``.
        lengths: ``s``, ``(out,)``.
    """

    kind: ClassVar[str] = "BOFT"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    generators: Factor
    lengths: Factor

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.lengths.shape[0], self.generators.shape[1] * self.block

    @property
    def block(self) -> int:
        """Side of a block."""
        return self.generators.shape[3]

    @property
    def group(self) -> int:
        """Columns that are mixed with each other, over all factors."""
        return int(self.block * 2 ** (self.generators.shape[0] - 1))

    @property
    def held_numbers(self) -> int:
        """The rotations, and what they are made of."""
        return 5 * self.generators.shape[0] * self.shape[1] * self.block

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The generators', then the lengths'."""
        return (*self.generators.tensors, *self.lengths.tensors)

    def factors(self) -> dict[str, Factor]:
        """``generators`` and ``lengths``."""
        return {"generators": self.generators, "lengths": self.lengths}

    def low_rank(self) -> None:
        """None: it rotates the weight."""

    def parts(self) -> tuple[tuple[int, BOFT], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Make the rotations in float64 once; each block costs `block` multiplications per element and factor."""
        gain = self.lengths.load(weight.dtype, weight.device)
        turning = self._turning(cast(self._rotations(weight.device).mT, weight.dtype))

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            block = turning(block, rows, cols)
            block *= positions(gain, 0, rows)[:, None]
            return block

        return apply

    def _rotations(self, device: str) -> Array:
        """``(factors, blocks, n, n)`` in float64."""
        X = self.generators.load(DType.F64, device)
        xp = namespace(X)
        Q = (X - X.mT) / 2
        identity = xp.eye(self.block, dtype=Q.dtype, device=Q.device)
        # (I - Q)(I + Q)^-1 is the transpose of (I - Q)^-1 (I + Q), because Q^T = -Q
        return xp.linalg.solve(identity - Q, identity + Q).mT

    def _turning(self, factors: Array) -> Apply:
        """Multiply columns by each of `factors` in turn, from the right, its shuffle around it."""
        side, size = self.block, self.group

        def turn(block: Array, rows: Index, cols: Index) -> Array:
            xp = namespace(block)
            first, last, groups = cols[0] // side, (cols[-1] + 1) // side, len(cols) // size
            for number, factor in enumerate(factors):
                order = [start + at for start in range(0, size, side << number) for at in _shuffle(side, number)]
                if number:
                    back = sorted(range(size), key=order.__getitem__)
                    block = xp.take(block.reshape(len(block), groups, size), array_of(back, DType.I64, block), axis=2)
                parts = xp.permute_dims(block.reshape(len(block), last - first, side), (1, 0, 2)) @ factor[first:last]
                block = xp.permute_dims(parts, (1, 0, 2)).reshape(len(block), groups, size)
                if number:
                    block = xp.take(block, array_of(order, DType.I64, block), axis=2)
                block = block.reshape(len(block), len(cols))
            return block

        return in_groups(size, turn)


def _shuffle(side: int, number: int) -> list[int]:
    """Where the columns of one group of factor `number` come from: halves of blocks, the even ones first."""
    half = side // 2
    if number == 0:
        return list(range(side))
    halves = [*range(0, 2 << number, 2), *range(1, 2 << number, 2)]
    return [chosen * half + inside for chosen in halves for inside in range(half)]
