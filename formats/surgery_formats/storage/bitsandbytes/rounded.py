# SPDX-License-Identifier: Apache-2.0
"""A weight as bitsandbytes makes it when it loads a model in 4 bits: rounded to codes, and read back.

Nothing is stored: codes and scales are worked out of the release's values when they are read.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import PartBytes, Storage, StoredPart, read_values
from surgery_formats.storage.bitsandbytes.absmax import BlockScales
from surgery_formats.storage.bitsandbytes.four_bit import FourBitGrid, levels_of
from surgery_formats.storage.flat_blocks import FlatBlocks, rows_of_whole_blocks
from surgery_formats.tensors.tensor import StoredTensor

if TYPE_CHECKING:
    import numpy

__all__ = ["RULES", "Rounded"]

RULES = ("nf4", "nf4-double", "fp4", "fp4-double")
"""Names of what bitsandbytes does to a model that is loaded in 4 bits; ``double``: the scales become codes too."""

_SIZE, _NESTED = 64, 256  # elements of a block, and scales of a block of these
_ELEMENTS = 1 << 19  # read at a time for the greatest value of each block
_EXPONENTS = 7  # decades of the scales' levels
_HELD = threading.local()


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight of the release, and what 4 bits make of it.

    Attributes:
        stored: As the release has it.
        rule: One of `RULES`.
    """

    stored: Storage
    rule: str

    dtype = DType.F32
    elements = None
    is_float = True

    @property
    def name(self) -> str:
        """The release's."""
        return self.stored.name

    @property
    def kind(self) -> str:
        """``NF4`` or ``FP4``."""
        return self.rule.partition("-")[0].upper()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The release's."""
        return self.stored.sizes

    @property
    def shape(self) -> tuple[int, int]:
        """The release's."""
        return self.stored.shape

    @property
    def transposed(self) -> bool:
        """The release's."""
        return self.stored.transposed

    @property
    def group(self) -> int:
        """The release's, which is what is written."""
        return self.stored.group

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """The release's."""
        return self.stored.sources

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """The release's."""
        return self.stored.parts(name)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """As the release stores it."""
        return self.stored.put(start, block, rounded)

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage.read_into`."""
        rows, columns = self.shape
        height = rows_of_whole_blocks(columns, _SIZE)
        first = start // height * height
        last = min(-(-(start + len(block)) // height) * height, rows)
        values = read_values(self.stored, first, last, DType.F32)
        blocks = FlatBlocks(first, last - first, columns, _SIZE)
        largest, levels = blocks.largest(values), levels_of(self.rule[:3])
        codes = FourBitGrid(levels, blocks, BlockScales(largest, largest)).nearest(values)
        if self.rule.endswith("-double"):  # codes are chosen before the scales become some
            largest = self._nested().of(largest, blocks.first)
        values = FourBitGrid(levels, blocks, BlockScales(largest, largest)).values(codes)
        block[...] = values[start - first : start - first + len(block)]

    def _nested(self) -> _NestedScales:
        """The second level of scales, which all blocks decide; a thread holds the last one."""
        held: tuple[Rounded, _NestedScales] | None = getattr(_HELD, "nested", None)
        if held is None or held[0] is not self:
            held = _HELD.nested = self, _NestedScales.among(self._largest())
        return held[1]

    def _largest(self) -> numpy.ndarray:
        import numpy as np

        rows, columns = self.shape
        height = rows_of_whole_blocks(columns, _SIZE)
        height *= max(1, _ELEMENTS // max(columns * height, 1))
        found = []
        for start in range(0, rows, height):
            values = read_values(self.stored, start, min(start + height, rows), DType.F32)
            found.append(FlatBlocks(start, len(values), columns, _SIZE).largest(values))
        return np.concatenate(found)


@dataclass(frozen=True, slots=True, eq=False)
class _NestedScales:
    """Scales as codes, with an offset and a scale for every 256 of them."""

    offset: numpy.float32
    second: numpy.ndarray
    levels: numpy.ndarray

    @classmethod
    def among(cls, largest: numpy.ndarray) -> _NestedScales:
        """The second level of all scales of a weight."""
        import numpy as np

        offset = np.float32(largest.mean(dtype=np.float32))
        padded = np.zeros(-(-len(largest) // _NESTED) * _NESTED, np.float32)
        padded[: len(largest)] = abs(largest - offset)
        return cls(offset, padded.reshape(-1, _NESTED).max(axis=1), _dynamic_levels())

    def of(self, largest: numpy.ndarray, first: int) -> numpy.ndarray:
        """What is read back of some scales, the first of which is number `first`."""
        import numpy as np

        second = np.repeat(self.second, _NESTED)[first : first + len(largest)]
        wanted = np.divide(largest - self.offset, second, out=np.zeros_like(second), where=second > 0)
        lower = np.maximum(np.searchsorted(self.levels, wanted, side="right") - 1, 0)
        upper = np.minimum(lower + 1, len(self.levels) - 1)
        nearer = abs(wanted - self.levels[upper]) < abs(wanted - self.levels[lower])
        scales: numpy.ndarray = np.where(nearer, self.levels[upper], self.levels[lower]) * second + self.offset
        return scales


def _dynamic_levels() -> numpy.ndarray:
    """The 256 numbers of a code with a sign, a power of ten, and a fraction that takes the bits which that leaves.

    Dettmers et al. 2022, arXiv:2110.02861, section 2.1: the finer the greater the number.
    """
    import numpy as np

    positive: list[numpy.ndarray] = []
    for power in range(_EXPONENTS):
        count = 2**power
        step = float(np.float32(1) - np.float32(0.1)) / count  # a power of two: exact
        steps = np.arange(count + 1)
        low, high = float(np.float32(0.1)) + step * steps, 1 - step * (count - steps)
        bounds = np.where(steps < (count + 1) // 2, low, high).astype(np.float32)  # from the nearer end, rounded once
        positive.append(np.float32(10.0 ** (power - _EXPONENTS + 1)) * ((bounds[:-1] + bounds[1:]) / np.float32(2)))
    numbers = np.concatenate(positive)
    ends = np.asarray([0, 1], np.float32)
    return np.sort(np.concatenate([-numbers, numbers, ends]))
