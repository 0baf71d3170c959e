# SPDX-License-Identifier: Apache-2.0
"""NF4 and FP4: blocks of 4-bit codes, each with the greatest absolute value of its block.

A value is ``level[code] * absmax``, in float32 (Dettmers et al. 2023, QLoRA). Blocks run through the flattened weight,
whatever its rows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from surgery_formats.arrays import Array, cast, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.storage.bitsandbytes.absmax import AbsMax, BlockScales, NestedAbsMax
from surgery_formats.storage.elements import read_bytes
from surgery_formats.storage.flat_blocks import FlatBlocks, rows_of_whole_blocks
from surgery_formats.storage.levels import Levels, join_nibbles, split_nibbles
from surgery_formats.storage.quantised import Grid, check_rows, keep_where, put_quantised
from surgery_formats.tensors.tensor import StoredTensor, as_bytes, matrix_of

__all__ = ["FourBit", "FourBitGrid", "levels_of"]

_SMALLEST = 1e-38  # a scale below it counts as this when values are divided by it
_MAGNITUDE = 7  # the bits of a code of FP4 beside its sign
_TOLERANCE = 1e-4  # of a quant_map; bitsandbytes has FP4's thirds with four digits in places

# The quantiles of the normal distribution that the format's definition fixes.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# Between its two zeros a value that is greater than zero takes the one with the sign bit, as it does in bitsandbytes.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


@functools.cache
def levels_of(quant_type: str) -> Levels:
    """The levels of ``nf4`` or ``fp4``."""
    import numpy as np

    if quant_type == "nf4":
        return Levels.of(_NF4)
    positive = np.asarray(_TWELFTHS, np.float32)
    halves = np.concatenate([positive, np.float32(0) - positive]) / np.float32(12)
    return Levels.of(halves, _FP4_ORDER)


@dataclass(frozen=True, slots=True, eq=False)
class FourBitGrid:
    """The scales of some rows.

    Attributes:
        levels: Of the format.
        blocks: Of the rows.
        scales: Of the blocks.
    """

    levels: Levels
    blocks: FlatBlocks
    scales: BlockScales

    def values(self, codes: Array, first: int = 0) -> Array:
        """See `Grid`."""
        values = self.levels.decode(codes)
        self.blocks.multiply(values, self.scales.values, first)
        return values

    def nearest(self, values: Array, first: int = 0) -> Array:
        """See `Grid`."""
        import numpy as np

        scales = self.scales.values
        divisors = np.copysign(np.maximum(abs(scales), np.float32(_SMALLEST)), scales)
        scaled = np.array(values, np.float32, order="C")
        self.blocks.multiply(scaled, np.float32(1) / divisors, first)
        return self.levels.nearest(scaled)


@dataclass(frozen=True, slots=True)
class FourBit:
    """A weight in NF4 or FP4.

    Attributes:
        name: Also of the tensor of codes.
        quant_type: ``nf4`` or ``fp4``.
        sizes: Shape of the weight.
        size: Elements of a block.
        tensor: The codes, two in a byte, the first in its high half; a last odd one has another beside it.
        absmax: Scales of the blocks.
        levels: ``quant_map``.
        state: See `read_state`.
    """

    name: str
    quant_type: str
    sizes: tuple[int, ...]
    size: int
    tensor: StoredTensor
    absmax: AbsMax
    levels: StoredTensor
    state: StoredTensor

    dtype = DType.F32
    elements = None
    is_float = True
    transposed = False
    bits = 4

    @property
    def kind(self) -> str:
        """``NF4`` or ``FP4``."""
        return self.quant_type.upper()

    @property
    def nested(self) -> bool:
        """Whether the scales are codes, too, as ``bnb_4bit_use_double_quant`` makes them."""
        return isinstance(self.absmax, NestedAbsMax)

    @property
    def shape(self) -> tuple[int, int]:
        """A stack of experts has the rows of all of them."""
        if len(self.sizes) == 3 and not self.name.endswith(".weight"):
            return self.sizes[0] * self.sizes[1], self.sizes[2]
        return matrix_of(self.sizes)

    @property
    def group(self) -> int:
        """Rows that are whole blocks."""
        return rows_of_whole_blocks(self.shape[1], self.size)

    @property
    def block(self) -> tuple[int, int]:
        """One row of a block, or the rows that it fills."""
        columns = self.shape[1]
        return (self.size // columns, columns) if self.size % columns == 0 else (1, self.size)

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """In the order in which bitsandbytes writes them."""
        return self.tensor, self.absmax.tensor, self.levels, *self.absmax.beside, self.state

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """See `Encoding`."""
        stems = [source.name.removeprefix(self.name) for source in self.sources]
        return tuple(
            StoredPart(name + stem, source.dtype, source.shape)
            for stem, source in zip(stems, self.sources, strict=True)
        )

    def codes(self, start: int, stop: int) -> Array:
        """See `Quantised`."""
        columns = self.shape[1]
        first, count = start * columns, (stop - start) * columns
        codes = split_nibbles(read_bytes(self.tensor, first // 2, -(-(first + count) // 2)))
        return codes[first % 2 :][:count].reshape(stop - start, columns)

    def grid(self, start: int, stop: int) -> FourBitGrid:
        """See `Quantised`."""
        blocks = FlatBlocks(start, stop - start, self.shape[1], self.size)
        return FourBitGrid(self._checked_levels(), blocks, self.absmax.read(blocks.first, blocks.stop))

    def fit(self, start: int, values: Array) -> FourBitGrid:
        """The greatest absolute value of each block; of the second level, the nearest code to it."""
        check_rows(self, start, start + len(values))
        blocks = FlatBlocks(start, len(values), self.shape[1], self.size)
        scales = self.absmax.fit(blocks.first, blocks.largest(values))
        return FourBitGrid(self._checked_levels(), blocks, scales)

    def pack(self, start: int, codes: Array, grid: Grid) -> tuple[PartBytes, ...]:
        """See `Quantised`; what all rows share comes with the first."""
        import numpy as np

        assert isinstance(grid, FourBitGrid)
        flat = np.ascontiguousarray(codes, np.uint8).reshape(-1)
        if flat.size % 2:
            last = math.prod(self.sizes) // 2
            flat = np.append(flat, split_nibbles(read_bytes(self.tensor, last, last + 1))[1])
        stored = np.ascontiguousarray(grid.scales.stored)
        first = grid.blocks.first * self.absmax.tensor.dtype.bits // 8
        written = [
            PartBytes(0, start * self.shape[1] // 2, as_bytes(join_nibbles(flat))),
            PartBytes(1, first, as_bytes(stored)),
        ]
        for part, source in enumerate(self.sources[2:] if start == 0 else (), 2):
            written.append(PartBytes(part, 0, as_bytes(source.read())))
        return tuple(written)

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage`: bytes become pairs of numbers, which are scaled where they lie."""
        import numpy as np

        if not block.size:
            return
        grid = self.grid(start, start + len(block))
        first, flat = start * self.shape[1], block.reshape(-1)
        packed = read_bytes(self.tensor, first // 2, -(-(first + flat.size) // 2))
        if 2 * packed.size == flat.size:
            grid.levels.decode_bytes(packed, flat)
        else:
            numbers = np.empty(2 * packed.size, np.float32)
            grid.levels.decode_bytes(packed, numbers)
            flat[:] = numbers[first % 2 :][: flat.size]
        grid.blocks.multiply(block, grid.scales.values)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `Encoding`: on the scales that are stored."""
        stop = start + len(block)
        check_rows(self, start, stop)
        grid = self.grid(start, stop)
        if not (abs(grid.scales.values) > _SMALLEST).all():
            return put_quantised(self, start, block, rounded)  # every code of such a block stands for one number
        values = cast(to_cpu(block), DType.F32)
        codes = grid.nearest(values)
        if self.quant_type == "fp4" and (zero := values == 0).any():  # which has two codes
            stored = self.codes(start, stop)
            keep_where(codes, stored, zero & (stored & _MAGNITUDE == 0))
        rounded[...] = grid.values(codes)
        return self.pack(start, codes, grid)

    def _checked_levels(self) -> Levels:
        levels = levels_of(self.quant_type)
        stored = self.levels.read()
        if not (abs(stored - levels.values) < _TOLERANCE).all():
            raise MalformedError(f"is not the table of {self.kind}", file=self.levels.path, tensor=self.levels.name)
        return levels
