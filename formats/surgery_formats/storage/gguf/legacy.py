# SPDX-License-Identifier: Apache-2.0
"""The types of blocks of 32 codes: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 (ggml, ``ggml-common.h``, ``ggml-quants.c``)."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.arrays import Array
from surgery_formats.tensors.ggml import BY_NAME, GgmlType

__all__ = ["LEGACY"]


@dataclass(frozen=True, slots=True)
class _Legacy:
    """A half scale, a half minimum if `has_min`, the fifth bits of the codes if there are 5, and codes.

    With a minimum codes count from 0, else they are signed.
    """

    type: GgmlType
    bits: int
    has_min: bool
    group: int = 32
    levels: tuple[int, ...] = ()

    @property
    def low(self) -> int:
        """0, or the most negative."""
        return 0 if self.has_min else -(1 << (self.bits - 1)) + (self.bits == 8)

    @property
    def high(self) -> int:
        """The other end."""
        return (1 << self.bits) - 1 if self.has_min else (1 << (self.bits - 1)) - 1

    def unpack(self, blocks: Array) -> Array:
        """See `AffineCodec.unpack`."""
        import numpy as np

        at = 4 if self.has_min else 2
        if self.bits == 8:
            return np.ascontiguousarray(blocks[..., at:]).view(np.int8)
        packed = blocks[..., -16:]
        codes = np.empty((*blocks.shape[:-1], 32), np.uint8)
        np.bitwise_and(packed, 15, out=codes[..., :16])
        np.right_shift(packed, 4, out=codes[..., 16:])
        if self.bits == 5:
            fifth = np.unpackbits(blocks[..., at : at + 4], axis=-1, bitorder="little")
            fifth <<= 4
            codes |= fifth
        if not self.has_min:
            codes -= np.uint8(1 << (self.bits - 1))  # wraps around, and is signed then
        return codes.view(np.int8)

    def pack(self, codes: Array, blocks: Array) -> None:
        """See `AffineCodec.pack`."""
        import numpy as np

        at = 4 if self.has_min else 2
        if self.bits == 8:
            blocks[..., at:] = codes.view(np.uint8)
            return
        unsigned = codes.view(np.uint8) if self.has_min else codes.view(np.uint8) + np.uint8(1 << (self.bits - 1))
        if self.bits == 5:
            blocks[..., at : at + 4] = np.packbits(unsigned >> 4, axis=-1, bitorder="little")
            unsigned = unsigned & 15
        blocks[..., -16:] = unsigned[..., :16] | (unsigned[..., 16:] << 4)

    def scales(self, blocks: Array) -> tuple[Array, Array | None]:
        """See `AffineCodec.scales`."""
        import numpy as np

        heads = np.ascontiguousarray(blocks[..., : 4 if self.has_min else 2]).view("<f2").astype(np.float32)
        return heads[..., :1], heads[..., 1:] if self.has_min else None

    def fit(self, values: Array) -> Array:
        """The range of the values over that of the codes, in float16 (``quantize_row_q4_0_ref`` and its likes)."""
        import numpy as np

        blocks = np.zeros((*values.shape[:-1], self.type.nbytes), np.uint8)
        if self.has_min:
            low = values.min(axis=-1)
            heads = np.stack([(values.max(axis=-1) - low) / np.float32(self.high), low], axis=-1)
        elif self.bits == 8:
            heads = abs(values).max(axis=-1, keepdims=True) / np.float32(self.high)
        else:
            greatest = abs(values).argmax(axis=-1)[..., None]
            heads = np.take_along_axis(values, greatest, axis=-1) / np.float32(self.low)
        with np.errstate(over="ignore"):
            blocks[..., : 2 * heads.shape[-1]] = heads.astype("<f2").view(np.uint8)
        return blocks


LEGACY = (
    _Legacy(BY_NAME["Q4_0"], 4, has_min=False),
    _Legacy(BY_NAME["Q4_1"], 4, has_min=True),
    _Legacy(BY_NAME["Q5_0"], 5, has_min=False),
    _Legacy(BY_NAME["Q5_1"], 5, has_min=True),
    _Legacy(BY_NAME["Q8_0"], 8, has_min=False),
)
