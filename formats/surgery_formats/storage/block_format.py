# SPDX-License-Identifier: Apache-2.0
"""How codes in blocks of inputs are stored: bits, block, zero points, type of scales. Imported without numpy."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.dtypes import DType

__all__ = ["BITS", "BlockFormat"]

BITS = {"int4": 4, "int8": 8}
"""Bits of a code, by the name that a caller gives."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How codes are stored, and how scales are chosen.

    Attributes:
        bits: Of a code: 4 or 8.
        block: Inputs that share a scale.
        symmetric: Whether the zero point is the middle code, and not stored.
        search: Whether scales are looked for that leave the least squared error.
        scale_type: Type of the stored scales.
    """

    bits: int
    block: int
    symmetric: bool = True
    search: bool = False
    scale_type: DType = DType.F16

    @property
    def middle(self) -> int:
        """The zero point where none is stored."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """The greatest code."""
        return (1 << self.bits) - 1

    def blocks(self, inputs: int) -> int:
        """Blocks of a row."""
        return -(-inputs // self.block)

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of codes, scales and zero points of a weight."""
        count = self.blocks(inputs)
        zeros = 0 if self.symmetric else -(-count * self.bits // 8)
        return outputs * (count * (self.block * self.bits // 8 + self.scale_type.bits // 8) + zeros)
