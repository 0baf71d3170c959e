# SPDX-License-Identifier: Apache-2.0
"""Codes in the order of inputs, a scale and a zero point for a group of these: how GPTQ and AWQ store a linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import PartBytes, StoredPart, parts_named
from surgery_formats.storage.fitting import Fit, stored_scales
from surgery_formats.storage.grouped_grid import GroupedGrid, finite_scales, groups_of
from surgery_formats.storage.packing import pack, unit, unpack, words_of
from surgery_formats.storage.quantised import Grid, check_rows, put_quantised
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

__all__ = ["GroupedRows", "Packing"]


@dataclass(frozen=True, slots=True)
class Packing:
    """How codes and zero points become words.

    Attributes:
        bits: Of a code.
        axis: Along which codes are packed: 0 along the inputs, 1 along the outputs. Zero points always are along these.
        order: Of the codes of a word, see `packing.unpack`.
        shift: What is added to a stored zero point, modulo ``2**bits``.
        carries: Whether it is added to whole words, so that a zero point that overflows adds one to the next.
    """

    bits: int
    axis: int
    order: tuple[int, ...] = ()
    shift: int = 0
    carries: bool = False

    @property
    def unit(self) -> int:
        """Rows that share words."""
        return unit(self.bits) if self.axis == 0 else 1

    def zeros(self, words: Array, columns: int) -> Array:
        """Zero points ``(groups, columns)`` as they count, uint8."""
        import numpy as np

        if self.carries:
            return unpack(words.view(np.uint32) + np.uint32(self._ones), self.bits, columns, 1, self.order)
        zeros = unpack(words, self.bits, columns, 1, self.order)
        zeros += self.shift
        zeros &= (1 << self.bits) - 1
        return zeros

    def zero_words(self, zeros: Array) -> Array:
        """The words of zero points, uint32."""
        import numpy as np

        if self.carries:
            return pack(zeros, self.bits, 1, self.order) - np.uint32(self._ones)
        return pack((cast(zeros, DType.I32) - self.shift) & (1 << self.bits) - 1, self.bits, 1, self.order)

    @property
    def _ones(self) -> int:
        """A word of zero points that are `shift`."""
        return sum(self.shift << place for place in range(0, 32, self.bits))


@dataclass(frozen=True, slots=True)
class GroupedRows:
    """A weight as a matrix ``(in, out)`` of codes, with scales ``(groups, out)`` and packed zero points.

    Attributes:
        name: Of the weight.
        kind: ``GPTQ4``, ``AWQ4``.
        shape: ``(in, out)``.
        transposed: Whether the model's code has it as ``(out, in)``, as all linear layers but GPT-2's.
        qweight: I32, see `Packing.words`.
        qzeros: I32 ``(groups, words)``.
        scales: F16, BF16 or F32 ``(groups, out)``.
        g_idx: I32 ``(in,)``, the group of every input; None where they are in order.
        packing: Of codes and zero points.
        size: Inputs of a group.
        fitting: How its program chooses scales.
    """

    dtype: ClassVar[DType] = DType.F32
    elements: ClassVar[None] = None
    is_float: ClassVar[bool] = True

    name: str
    kind: str
    shape: tuple[int, int]
    transposed: bool
    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    g_idx: StoredTensor | None
    packing: Packing
    size: int
    fitting: Fit

    @property
    def sizes(self) -> tuple[int, ...]:
        """See `transposed`."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.packing.bits

    @property
    def block(self) -> tuple[int, int]:
        """A group of inputs of one output."""
        return self.size, 1

    @property
    def group(self) -> int:
        """Rows that share words, and scales if these are not the whole column's."""
        return math.lcm(self.packing.unit, self.size if self.size < self.shape[0] else 1)

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """The tensors of a module in the order of the fields."""
        own = (self.qweight, self.qzeros, self.scales)
        return own if self.g_idx is None else (*own, self.g_idx)

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
        bits, columns = self.bits, self.shape[1]
        if self.packing.axis == 1:
            return unpack(self.qweight.read(start, stop), bits, columns, 1, self.packing.order)
        first = start // self.packing.unit * self.packing.unit
        words = self.qweight.read(words_of(first, bits), words_of(stop + -stop % self.packing.unit, bits))
        return unpack(words, bits, stop - first, 0, self.packing.order)[start - first :]

    def grid(self, start: int, stop: int) -> GroupedGrid:
        """See `Quantised.grid`."""
        index = self._scattered(start, stop)
        first, last = (0, self.scales.shape[0]) if index is not None else (start // self.size, -(-stop // self.size))
        scales = finite_scales(self.scales, first, last)
        zeros = self.packing.zeros(self.qzeros.read(first, last), self.shape[1])
        return self._grid(scales, cast(zeros, DType.F32), start - first * self.size, index)

    def held_columns(self) -> Callable[[int, int], Array]:
        """What reads columns as rows, with the codes of the whole matrix in memory as they are stored."""
        words, grid = self.qweight.read(), self.grid(0, self.shape[0])
        if grid.index is not None:
            return lambda start, stop: _scattered_columns(words, grid, self.packing, start, stop)
        return lambda start, stop: _columns(words, grid, self.packing, start, stop, self.shape[0])

    def fit(self, start: int, values: Array) -> GroupedGrid | None:
        """See `Quantised.fit`; None too where the rows are a part of a group, or belong to scattered ones."""
        stop = start + len(values)
        whole = start % self.size == 0 and (stop % self.size == 0 or stop == self.shape[0])
        if not whole or self._scattered(start, stop) is not None:
            return None
        import numpy as np

        each = [self.fitting(part, self.bits, self.packing.shift) for part in groups_of(values, self.size)]
        scales = stored_scales(np.concatenate([fitted.scales for fitted in each]), self.scales.dtype)
        return self._grid(scales, np.concatenate([fitted.offsets for fitted in each]), fitted=True)

    def pack(self, start: int, codes: Array, grid: Grid) -> tuple[PartBytes, ...]:
        """See `Quantised.pack`."""
        stop = start + len(codes)
        check_rows(self, start, stop)
        words = pack(codes, self.bits, self.packing.axis, self.packing.order)
        first, last = -(-start // self.size), -(-stop // self.size)
        if isinstance(grid, GroupedGrid) and grid.fitted and grid.zeros is not None:
            zeros = self.packing.zero_words(cast(grid.zeros, DType.U8))
            scales = cast(grid.scales, self.scales.dtype)
        else:
            zeros, scales = self.qzeros.read(first, last), self.scales.read(first, last)
        row = self.shape[1] * self.scales.dtype.bits // 8
        written = (
            PartBytes(0, words_of(start, self.bits) * 4 * self.shape[1], as_bytes(words))
            if self.packing.axis == 0
            else PartBytes(0, start * words.shape[1] * 4, as_bytes(words)),
            PartBytes(1, first * self.qzeros.shape[1] * 4, as_bytes(zeros)),
            PartBytes(2, first * row, as_bytes(scales)),
        )
        if self.g_idx is None:
            return written
        return (*written, PartBytes(3, start * 4, as_bytes(self.g_idx.read(start, stop))))

    @property
    def _largest(self) -> int:
        return (1 << self.bits) - 1

    def _grid(
        self, scales: Array, zeros: Array, origin: int = 0, index: Array | None = None, fitted: bool = False
    ) -> GroupedGrid:
        return GroupedGrid(scales, zeros, None, self.size, 0, self._largest, origin, index, fitted)

    def _scattered(self, start: int, stop: int) -> Array | None:
        """The group of each row, unless they are in order.

        Raises:
            MalformedError: there is no such group.
        """
        if self.g_idx is None:
            return None
        import numpy as np

        index = self.g_idx.read(start, stop)
        if np.array_equal(index, np.arange(start, stop) // self.size):
            return None
        if index.min() < 0 or index.max() >= self.scales.shape[0]:
            raise MalformedError(
                f"names a group that is not among {self.scales.shape[0]}", file=self.g_idx.path, tensor=self.g_idx.name
            )
        return index


def _scattered_columns(words: Array, grid: GroupedGrid, packing: Packing, start: int, stop: int) -> Array:
    """Columns of which each input has its own group: whole rows of scales are looked up faster than their places."""
    assert grid.index is not None
    across = slice(start, stop)
    codes = unpack(words[:, across], packing.bits, len(grid.index), 0)
    own = replace(grid, scales=grid.scales[:, across], zeros=None if grid.zeros is None else grid.zeros[:, across])
    return own.values(codes).T


def _columns(words: Array, grid: GroupedGrid, packing: Packing, start: int, stop: int, rows: int) -> Array:
    """Columns as rows: words are turned round before they are unpacked, so that few bytes move."""
    import numpy as np

    turned = [
        None if each is None else np.ascontiguousarray(each[:, start:stop].T) for each in (grid.scales, grid.zeros)
    ]
    own = replace(grid, scales=turned[0], zeros=turned[1], axis=1)
    if packing.axis == 0:
        codes = unpack(np.ascontiguousarray(words[:, start:stop].T), packing.bits, rows, 1)
        return own.values(codes)
    count = len(packing.order)
    first, last = start // count * count, -(-stop // count) * count
    across = slice(words_of(first, packing.bits), words_of(last, packing.bits))
    codes = unpack(np.ascontiguousarray(words[:, across].T), packing.bits, last - first, 0, packing.order)
    return own.values(codes[start - first : stop - first])
