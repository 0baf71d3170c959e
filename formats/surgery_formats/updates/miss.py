# SPDX-License-Identifier: Apache-2.0
"""MiSS: ``W'[o, c] = W[o, c] + B[c mod r, o]``, one shard for all of a row (Kang and Yin 2024, arXiv:2409.15371)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, array_of, namespace
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.lora import LoRA

__all__ = ["MiSS"]


@dataclass(frozen=True, slots=True)
class MiSS:
    """A narrow matrix that is repeated along the inputs, and (variant "mini") along the outputs: exactly low rank.

    Attributes:
        block: ``B``, ``(r, out)``, or ``(r, mini r)`` where it is repeated along the outputs.
        repeats: Whether it is.
        scale: Factor on the addition.
        outputs: Rows of the weight; 0 until `fitted` if the block is repeated.
        inputs: Its columns; 0 until `fitted`.
    """

    kind: ClassVar[str] = "MiSS"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    alpha: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    block: Factor
    repeats: bool = False
    scale: float = 1.0
    outputs: int = 0
    inputs: int = 0

    @property
    def rank(self) -> int:
        """Rank of what is added."""
        return min(self.block.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.outputs if self.repeats else self.block.shape[1], self.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The block's."""
        return self.block.tensors

    def scaled(self, weight: float) -> MiSS:
        """The same addition, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def fitted(self, fit: Fit) -> MiSS:
        """The sizes that the block does not have.

        Raises:
            FitError: the weight has fewer columns than the block has rows, or rows that are no multiple of "mini r".
        """
        stored, (r, width) = self.block.tensors[0], self.block.shape
        if fit.shape[1] < r or (self.repeats and fit.shape[0] % width):
            raise FitError(
                f"blocks of {[width, r]} do not fill a weight of {list(fit.shape)}",
                file=stored.path,
                tensor=stored.name,
                hint="is this the base it was trained on?",
            )
        return replace(self, outputs=fit.shape[0] if self.repeats else 0, inputs=fit.shape[1])

    def factors(self) -> dict[str, Factor]:
        """``block``."""
        return {"block": self.block}

    def low_rank(self) -> LoRA | None:
        """The block beside a matrix that repeats it; None until the sizes are known."""
        (out, inputs), (r, width) = self.shape, self.block.shape
        if not out or not inputs:
            return None

        def columns(block: Array) -> Array:
            """``(r or width, in)``: the identity of the shards, or the shards themselves if they are fewer."""
            xp = namespace(block)
            small = block.T if width < r else xp.eye(r, dtype=block.dtype, device=block.device)
            return xp.tile(small, (1, -(-inputs // r)))[:, :inputs]

        def rows(block: Array) -> Array:
            xp = namespace(block)
            small = xp.eye(width, dtype=block.dtype, device=block.device) if width < r else block.T
            return xp.tile(small, (out // width, 1))

        A = Factor.computed((self.block,), (self.rank, inputs), columns)
        return LoRA(A, Factor.computed((self.block,), (out, self.rank), rows), self.scale)

    def parts(self) -> tuple[tuple[int, MiSS], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load the block once; each block of the weight costs an addition."""
        r, width = self.block.shape
        shard = self.block.load(weight.dtype, weight.device).T * self.scale
        xp = namespace(shard)

        def at(index: Index, size: int) -> Array:
            return array_of([position % size for position in index], DType.I64, shard)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            block += xp.take(xp.take(shard, at(rows, width), axis=0), at(cols, r), axis=1)
            return block

        return apply
