# SPDX-License-Identifier: Apache-2.0
"""Codes in the order of outputs, a scale and an offset for a group of inputs: how MLX stores a layer, and AWQ's gemv."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import PartBytes, StoredPart, parts_named
from surgery_formats.storage.fitting import Fit, stored_scales
from surgery_formats.storage.grouped_grid import GroupedGrid, finite_scales
from surgery_formats.storage.packing import pack, unpack
from surgery_formats.storage.quantised import Grid, put_quantised
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

__all__ = ["GroupedColumns"]


@dataclass(frozen=True, slots=True)
class GroupedColumns:
    """A weight as a matrix ``(out, in)`` of codes, packed along its rows.

    Attributes:
        name: Of the weight.
        kind: ``MLX4``, ``AWQ4 gemv``.
        sizes: ``(out, in)``, or ``(experts, out, in)``.
        words: I32 or U32 ``(..., out, words)``.
        scales: F16, BF16 or F32 ``(..., out, groups)``, or wider: what is behind the last group is kept.
        offsets: Zero points, I32 words as `words`; or, of a floating-point type, what is added to each value.
        places: In which order the program stores words, scales and offsets.
        bits: Of a code.
        size: Inputs of a group.
        fitting: How its program chooses scales.
    """

    dtype: ClassVar[DType] = DType.F32
    elements: ClassVar[None] = None
    is_float: ClassVar[bool] = True
    transposed: ClassVar[bool] = False
    group: ClassVar[int] = 1

    name: str
    kind: str
    sizes: tuple[int, ...]
    words: StoredTensor
    scales: StoredTensor
    offsets: StoredTensor
    places: tuple[int, int, int]
    bits: int
    size: int
    fitting: Fit

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``, experts under each other."""
        return self.words.numel // self.words.shape[-1], self.sizes[-1]

    @property
    def block(self) -> tuple[int, int]:
        """A group of inputs of one output."""
        return 1, self.size

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """The three tensors, as the program orders them."""
        own = (self.words, self.scales, self.offsets)
        return tuple(own[place] for place in self.places)

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """See `Encoding.parts`."""
        return parts_named(self, name)

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage.read_into`."""
        if len(block):
            stop = start + len(block)
            self.grid(start, stop).values_into(block, self.codes(start, stop))

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `Encoding.put`."""
        return put_quantised(self, start, block, rounded)

    def codes(self, start: int, stop: int) -> Array:
        """See `Quantised.codes`; uint8."""
        return unpack(_matrix(self.words).read(start, stop), self.bits, self.shape[1])

    def grid(self, start: int, stop: int) -> GroupedGrid:
        """See `Quantised.grid`."""
        scales = finite_scales(_matrix(self.scales), start, stop)[:, : self._groups]
        if not self._packed:
            return self._grid(scales, None, finite_scales(_matrix(self.offsets), start, stop)[:, : self._groups])
        zeros = unpack(_matrix(self.offsets).read(start, stop), self.bits, self._groups)
        return self._grid(scales, cast(zeros, DType.F32), None)

    def fit(self, start: int, values: Array) -> GroupedGrid:
        """See `Quantised.fit`."""
        groups = values.reshape(-1, self.size, 1)
        scales, offsets = (each.reshape(len(values), -1) for each in self.fitting(groups, self.bits, 0))
        scales = stored_scales(scales, self.scales.dtype)
        if self._packed:
            return self._grid(scales, offsets, None, fitted=True)
        return self._grid(scales, None, cast(cast(offsets, self.offsets.dtype), DType.F32), fitted=True)

    def pack(self, start: int, codes: Array, grid: Grid) -> tuple[PartBytes, ...]:
        """See `Quantised.pack`."""
        stop = start + len(codes)
        scales, offsets = (_matrix(each).read(start, stop) for each in (self.scales, self.offsets))
        if isinstance(grid, GroupedGrid) and grid.fitted:
            scales[:, : self._groups] = cast(grid.scales, self.scales.dtype)
            if grid.zeros is not None:
                words = pack(cast(grid.zeros, DType.U8), self.bits)
                offsets[:, : words.shape[1]] = words.view(offsets.dtype)
            else:
                offsets[...] = cast(grid.biases, self.offsets.dtype)
        own = (pack(codes, self.bits), scales, offsets)
        return tuple(
            PartBytes(number, start * own[place].shape[1] * own[place].dtype.itemsize, as_bytes(own[place]))
            for number, place in enumerate(self.places)
        )

    @property
    def _groups(self) -> int:
        return self.shape[1] // self.size

    @property
    def _packed(self) -> bool:
        return not self.offsets.dtype.is_float

    def _grid(self, scales: Array, zeros: Array | None, biases: Array | None, fitted: bool = False) -> GroupedGrid:
        return GroupedGrid(scales, zeros, biases, self.size, 1, (1 << self.bits) - 1, fitted=fitted)


def _matrix(tensor: StoredTensor) -> StoredTensor:
    """Experts under each other."""
    if len(tensor.shape) == 2:
        return tensor
    return replace(tensor, shape=(tensor.numel // tensor.shape[-1], tensor.shape[-1]))
