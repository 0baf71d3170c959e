# SPDX-License-Identifier: Apache-2.0
"""A weight stored as codes with scales in blocks: what fp8, NVFP4, MXFP4 and compressed-tensors have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery_formats.arrays import Array, assign, cast, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.storage.code_rows import CodeRows, raw_rows
from surgery_formats.storage.quantised import Grid, check_rows, put_quantised
from surgery_formats.storage.scale_choice import Choose
from surgery_formats.storage.scaled_grid import Numbers, ScaledGrid, extremes
from surgery_formats.storage.scales import Scales, Zeros
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

if TYPE_CHECKING:
    import numpy

__all__ = ["ScaledWeight"]


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """The weight; it satisfies `Quantised`.

    Attributes:
        name: See `Storage.name`.
        kind: See `Storage.kind`.
        sizes: See `Encoding.sizes`.
        shape: See `Encoding.shape`.
        rows_of_codes: Where its codes lie.
        numbers: What they stand for.
        scales: One for every block; None if all are 1.
        zeros: One for every block, or None.
        order: The block of every column, where blocks are not neighbouring columns.
        shape_in: The tensor that says the weight's sizes, if there is one.
        choose: How the format's program chooses scales.
        others: Tensors that go with the weight, such as the scale of its layer's input.
        transposed: See `Storage.transposed`.
    """

    name: str
    kind: str
    sizes: tuple[int, ...]
    shape: tuple[int, int]
    rows_of_codes: CodeRows
    numbers: Numbers
    scales: Scales | None = None
    zeros: Zeros | None = None
    order: StoredTensor | None = None
    shape_in: StoredTensor | None = None
    choose: Choose | None = None
    others: tuple[StoredTensor, ...] = ()
    transposed: bool = False

    dtype = DType.F32
    elements = None
    is_float = True

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.numbers.bits

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        return self.shape if self.scales is None else self.scales.blocks.size

    @property
    def group(self) -> int:
        """Rows of whole blocks, of whole bytes, and of whole words of zeros."""
        high = 1 if self.scales is None else self.scales.blocks.group
        return math.lcm(high, self.rows_of_codes.group, 1 if self.zeros is None else self.zeros.group)

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """Codes, scales, zeros, order, the overall scale, others."""
        scales = () if self.scales is None else (self.scales.tensor,)
        zeros = () if self.zeros is None else (self.zeros.tensor,)
        return (self.rows_of_codes.tensor, *scales, *zeros, *self._kept)

    @property
    def _kept(self) -> tuple[StoredTensor, ...]:
        overall = None if self.scales is None else self.scales.overall
        return (*(tensor for tensor in (self.order, self.shape_in, overall) if tensor is not None), *self.others)

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """The sources, called after the weight."""
        return tuple(StoredPart(_renamed(s.name, self.name, name), s.dtype, s.shape) for s in self.sources)

    def codes(self, start: int, stop: int) -> Array:
        """See `Quantised.codes`."""
        return self.rows_of_codes.read(start, stop)

    def grid(self, start: int, stop: int) -> ScaledGrid:
        """See `Quantised.grid`."""
        if self.scales is None or stop <= start:
            return ScaledGrid(self.numbers, None, None, None, self.shape[1])
        touched = self.scales.blocks.touched(start, stop)
        stored = [self.scales.read(touched)]
        if self.zeros is not None:
            stored.append(self.zeros.read(touched))
        return self._grid(start, stop, stored)

    def _grid(self, start: int, stop: int, stored: list[numpy.ndarray]) -> ScaledGrid:
        assert self.scales is not None
        blocks = self.scales.blocks
        zeros = None if self.zeros is None else self.zeros.values(stored[1])
        scales, rows = self.scales.values(stored[0], blocks.touched(start, stop)), blocks.rows(start, stop)
        return ScaledGrid(self.numbers, scales, zeros, rows, blocks.size[1], self._order(), tuple(stored))

    def _order(self) -> numpy.ndarray | None:
        if self.order is None:
            return None
        order: numpy.ndarray = self.order.read()
        assert self.scales is not None
        if (order == -1).any():  # as it was made, before calibration
            return None
        if order.min(initial=0) < 0 or order.max(initial=0) >= self.scales.blocks.counts[1]:
            raise MalformedError(
                f"a column belongs to group {order.max(initial=0)} of {self.scales.blocks.counts[1]}",
                file=self.order.path,
                tensor=self.order.name,
            )
        return order

    def fit(self, start: int, values: Array) -> Grid | None:
        """See `Quantised.fit`; an overall scale stays as it is."""
        import numpy as np

        stop = start + len(values)
        scales, choose = self.scales, self.choose
        if scales is None or choose is None or not len(values) or not scales.blocks.are_whole(start, stop):
            return None
        if (order := self._order()) is not None:
            if (np.bincount(order, minlength=scales.blocks.counts[1]) != scales.blocks.size[1]).any():
                return None
            values = values[:, np.argsort(order, kind="stable")]
        touched = scales.blocks.touched(start, stop)
        starts = np.array([scales.blocks.first_row(row) - start for row in touched])
        chosen, zeros = choose(*extremes(values, starts, scales.blocks.size[1]))
        stored = [scales.stored(chosen, touched)]
        if self.zeros is not None and zeros is not None:
            stored.append(self.zeros.codes(zeros))
        return self._grid(start, stop, stored)

    def pack(self, start: int, codes: Array, grid: Grid) -> tuple[PartBytes, ...]:
        """See `Quantised.pack`; scales are written with the first row of their block, all else with the first row."""
        assert isinstance(grid, ScaledGrid)
        pieces = [PartBytes(0, self.rows_of_codes.offset(start), _bytes(self.rows_of_codes.packed_rows(codes)))]
        if self.scales is not None and len(codes):
            blocks, stop = self.scales.blocks, start + len(codes)
            begun = blocks.begun(start, stop)
            row = blocks.touched(start, stop).start + (begun.start or 0)
            scales = grid.stored[0][begun]
            pieces.append(PartBytes(1, row * blocks.counts[1] * scales.itemsize, _bytes(scales)))
            if self.zeros is not None:
                zeros = self.zeros.packed(grid.stored[1][begun])
                pieces.append(PartBytes(2, self.zeros.offset(row), _bytes(zeros)))
        if start == 0:
            first = len(self.sources) - len(self._kept)
            kept = enumerate(self._kept, first)
            pieces += [PartBytes(i, 0, _bytes(raw_rows(tensor, 0, 1, 1))) for i, tensor in kept if tensor.numel]
        return tuple(pieces)

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage.read_into`."""
        if not len(block):
            return
        stop = start + len(block)
        numbers = self.rows_of_codes.decode(self.numbers, start, stop, block)
        self.grid(start, stop).scaled(numbers)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `Encoding.put`: on the scales that are stored, as `put_quantised` does it."""
        import numpy as np

        stop = start + len(block)
        check_rows(self, start, stop)
        grid = self.grid(start, stop)
        if not grid.keeps_codes or (self.zeros is not None and self.zeros.tensor.dtype is DType.F8_E4M3):
            return put_quantised(self, start, block, rounded)
        values = cast(to_cpu(block), DType.F32)
        codes = grid.nearest(values)
        if self.numbers.signs_zero:
            zeros = np.flatnonzero(values == 0)  # which have two codes
            stored = self.codes(start, stop).reshape(-1)[zeros]
            keep = self.numbers.decode(stored) == 0
            codes.reshape(-1)[zeros[keep]] = stored[keep]
        if rounded.flags.c_contiguous:
            grid.scaled(self.numbers.decode(codes, rounded))
        else:
            assign(rounded, grid.values(codes))
        return self.pack(start, codes, grid)


def _bytes(values: numpy.ndarray) -> memoryview:
    import numpy as np

    return as_bytes(np.ascontiguousarray(values))


def _renamed(part: str, weight: str, name: str) -> str:
    """The name of a part if the weight is called `name`."""
    if name == weight:
        return part
    stem, new = weight.removesuffix(".weight"), name.removesuffix(".weight")
    return new + part[len(stem) :] if part.startswith(stem) else f"{new}.{part.rpartition('.')[2]}"
