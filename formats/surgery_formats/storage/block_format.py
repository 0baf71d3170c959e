# SPDX-License-Identifier: Apache-2.0
"""How codes in blocks of inputs are stored: bits, block, zero points, type of scales. Imported without numpy."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.dtypes import DType

__all__ = ["BITS", "FLOAT8", "BlockFormat"]

BITS = {"int4": 4, "int8": 8}
"""Bits of a code, by the name that a caller gives."""
FLOAT8 = "fp8"
"""The name for codes that are numbers of 8 bits, float8_e4m3fn."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How codes are stored, and how scales are chosen.

    Attributes:
        bits: Of a code: 4 or 8.
        block: Inputs that share a scale; 0 for all.
        symmetric: Whether the zero point is the middle code, and not stored.
        search: Whether scales are looked for that leave the least squared error.
        scale_type: Type of the stored scales.
        floats: Whether codes are floating-point numbers, see `surgery_formats.storage.float8_codes`.
    """

    bits: int
    block: int
    symmetric: bool = True
    search: bool = False
    scale_type: DType = DType.F16
    floats: bool = False

    @property
    def said(self) -> str:
        """For people."""
        if not self.floats:
            return f"{self.bits} bits, blocks of {self.block}"
        return f"{FLOAT8}, " + (f"blocks of {self.block}" if self.block else "a scale for each output")

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
        return -(-inputs // self.block) if self.block else 1

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of codes, scales and zero points of a weight."""
        count = self.blocks(inputs)
        if self.floats:
            return outputs * (inputs + count * self.scale_type.bits // 8)
        zeros = 0 if self.symmetric else -(-count * self.bits // 8)
        return outputs * (count * (self.block * self.bits // 8 + self.scale_type.bits // 8) + zeros)
