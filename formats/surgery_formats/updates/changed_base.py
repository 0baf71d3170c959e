# SPDX-License-Identifier: Apache-2.0
"""Raw PiSSA, raw OLoRA and KaSA: ``W' = W - W_r + s B A``, W_r a part of the base (arXiv:2404.02948, 2406.01775, 2412.06071).

Before training, each takes a part of rank r away from the base: PiSSA the part along its r largest singular values, KaSA
along its r smallest, OLoRA ``s Q_r R_r`` of its QR decomposition. The base on disk still has that part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery_formats.arrays import Array, cast, namespace
from surgery_formats.products import add_product
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.lora import LoRA
from surgery_formats.updates.spectrum import Part, part_of, whole_weight

__all__ = ["ChangedBase"]


@dataclass(frozen=True, slots=True)
class ChangedBase:
    """A LoRA on a base of which a part was taken away.

    Attributes:
        lora: The LoRA; of KaSA with its singular values multiplied into B.
        taken: The part that is taken away, of the LoRA's rank.
    """

    kind: ClassVar[str] = "LoRA on a changed base"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "maps"
    of_base: ClassVar[bool] = True

    lora: LoRA
    taken: Part

    @property
    def rank(self) -> int:
        """Of the LoRA, and of the part."""
        return self.lora.rank

    @property
    def alpha(self) -> float | None:
        """The LoRA's."""
        return self.lora.alpha

    @property
    def scale(self) -> float:
        """The LoRA's."""
        return self.lora.scale

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.lora.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The LoRA's."""
        return self.lora.tensors

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """What the scale was read from."""
        return self.lora.untrained

    @property
    def held_numbers(self) -> int:
        """The weight, and the Gram matrix of its short side with its vectors."""
        out, inputs = self.shape
        return 2 * out * inputs + 3 * min(out, inputs) ** 2

    def factors(self) -> dict[str, Factor]:
        """``A`` and ``B``."""
        return self.lora.factors()

    def low_rank(self) -> None:
        """None: what is taken away depends on the weight."""

    def parts(self) -> tuple[tuple[int, ChangedBase], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Take the weight apart in float64 once; each block costs one product of rank 2 r."""
        left, right = part_of(whole_weight(weight, self.shape, self.tensors[0]), self.taken, self.rank)
        times = self.scale if self.taken == "first columns" else 1.0
        xp = namespace(left)
        A = xp.concat([self.lora.A.load(weight.dtype, weight.device), cast(right, weight.dtype)], axis=0)
        B = self.lora.B.load(weight.dtype, weight.device) * self.scale
        B = xp.concat([B, cast(-times * left, weight.dtype)], axis=1)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            return add_product(block, positions(B, 0, rows), positions(A, 1, cols))

        return apply
