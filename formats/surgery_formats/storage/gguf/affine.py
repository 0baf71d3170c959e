# SPDX-License-Identifier: Apache-2.0
"""Blocks of GGML whose values are ``scale * code + offset``: the grid of some rows, and what a type of block has to say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

from surgery_formats.arrays import Array
from surgery_formats.tensors.ggml import GgmlType

__all__ = ["AffineCodec", "AffineGrid", "affine_values"]


class AffineCodec(Protocol):
    """One type of block. Arrays of blocks are uint8 ``(rows, blocks, bytes)``, of codes int8 ``(rows, blocks, codes)``.

    Attributes:
        type: Its name and sizes.
        group: Codes that share a scale.
        low: The least code.
        high: The greatest.
        bits: Of a code.
        levels: The numbers that codes from 0 stand for, where these are no row of integers.
    """

    @property
    def type(self) -> GgmlType: ...
    @property
    def group(self) -> int: ...
    @property
    def low(self) -> int: ...
    @property
    def high(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def levels(self) -> tuple[int, ...]: ...

    def unpack(self, blocks: Array) -> Array:
        """The codes of blocks."""

    def pack(self, codes: Array, blocks: Array) -> None:
        """Write codes into blocks, whose scales stay."""

    def scales(self, blocks: Array) -> tuple[Array, Array | None]:
        """Scale and offset of every group, float32 ``(rows, blocks, groups)``; no offset where the type has none."""

    def fit(self, values: Array) -> Array | None:
        """Blocks whose scales llama.cpp's reference would choose for float32 ``(rows, blocks, codes)``; no codes yet.

        None where such a choice is not offered.
        """


def affine_values(codec: AffineCodec, codes: Array, scale: Array, offset: Array | None, values: Array) -> None:
    """``scale * code + offset`` in float32, rounded after each step.

    Args:
        codec: The type of block.
        codes: ``(..., group)``.
        scale: ``(...)``.
        offset: The same, or None.
        values: ``(..., group)``, contiguous; filled.
    """
    import numpy as np

    if codec.levels:
        np.take(np.array(codec.levels, np.float32), codes, out=values, mode="wrap")
    else:
        np.copyto(values, codes)
    with np.errstate(over="ignore"):  # whoever uses the values looks for what is not finite
        values *= scale[..., None]
        if offset is not None:
            values += offset[..., None]


@cache
def _nearest_levels(levels: tuple[int, ...]) -> tuple[int, Array]:
    """For every half step between integers the code whose level is nearest, and the number of the first half step.

    Levels are integers, so that the middle between two of them is the border of a half step.
    """
    import numpy as np

    least = 2 * min(levels) - 1
    middles = (np.arange(least, 2 * max(levels) + 1) + 0.5) / 2
    return least, abs(middles[:, None] - np.array(levels)).argmin(axis=1).astype(np.int8)


@dataclass(frozen=True, slots=True, eq=False)
class AffineGrid:
    """The scales of some rows.

    Attributes:
        codec: The type of block.
        blocks: ``(rows, blocks, bytes)`` with these scales, and any codes.
        scale: ``(rows, groups)`` of a row, one after the other.
        offset: The same, or None.
    """

    codec: AffineCodec
    blocks: Array
    scale: Array
    offset: Array | None

    @classmethod
    def of(cls, codec: AffineCodec, blocks: Array) -> AffineGrid:
        """The grid that blocks hold."""
        scale, offset = codec.scales(blocks)
        rows = len(blocks)
        width = scale.shape[1] * scale.shape[2]
        return cls(codec, blocks, scale.reshape(rows, width), None if offset is None else offset.reshape(rows, width))

    def values(self, codes: Array, first: int = 0) -> Array:
        """See `Grid.values`."""
        import numpy as np

        rows, columns = codes.shape
        values = np.empty((rows, columns), np.float32)
        if first % self.codec.group == 0 and columns % self.codec.group == 0:
            scale, offset = self._groups(first, columns)
            shape = (*scale.shape, -1)
        else:
            scale, offset = self._columns(first, columns)
            shape = (rows, columns, 1)
        affine_values(self.codec, codes.reshape(shape), scale, offset, values.reshape(shape))
        return values

    def nearest(self, values: Array, first: int = 0) -> Array:
        """See `Grid.nearest`."""
        import numpy as np

        rows, columns = values.shape
        if first % self.codec.group == 0 and columns % self.codec.group == 0:
            scale, offset = (each if each is None else each[..., None] for each in self._groups(first, columns))
            values = values.reshape(rows, -1, self.codec.group)
        else:
            scale, offset = self._columns(first, columns)
        assert scale is not None
        codes = values.astype(np.float32) if offset is None else values - offset
        with np.errstate(over="ignore"):  # far beyond the grid
            codes /= np.where(scale == 0, np.float32(np.inf), scale)  # every code of such a group stands for one number
        if self.codec.levels:
            least, nearest = _nearest_levels(self.codec.levels)
            np.clip(codes, least / 2, (least + len(nearest) - 1) / 2, out=codes)
            codes *= 2
            return nearest[np.floor(codes, out=codes).astype(np.int16) - np.int16(least)].reshape(rows, columns)
        np.rint(codes, out=codes)
        np.clip(codes, self.codec.low, self.codec.high, out=codes)
        return codes.astype(np.int8).reshape(rows, columns)

    def _groups(self, first: int, columns: int) -> tuple[Array, Array | None]:
        chosen = slice(first // self.codec.group, (first + columns) // self.codec.group)
        return self.scale[:, chosen], None if self.offset is None else self.offset[:, chosen]

    def _columns(self, first: int, columns: int) -> tuple[Array, Array | None]:
        import numpy as np

        at = np.arange(first, first + columns) // self.codec.group
        return self.scale[:, at], None if self.offset is None else self.offset[:, at]
