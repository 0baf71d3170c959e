# SPDX-License-Identifier: Apache-2.0
"""The scales of 4-bit blocks: a float32 each, or a byte each with a second level of scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from surgery_formats.arrays import cast
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.bitsandbytes.state import Nesting
from surgery_formats.storage.levels import Levels
from surgery_formats.tensors.tensor import StoredTensor

if TYPE_CHECKING:
    import numpy

__all__ = ["AbsMax", "BlockScales", "FloatAbsMax", "NestedAbsMax"]


class BlockScales(NamedTuple):
    """The scales of some blocks, as they are stored and as float32."""

    stored: numpy.ndarray
    values: numpy.ndarray


class AbsMax(Protocol):
    """The scales of a weight's blocks."""

    @property
    def tensor(self) -> StoredTensor:
        """With an element for each block."""

    @property
    def beside(self) -> tuple[StoredTensor, ...]:
        """Other tensors they are made of, none of which a new fit changes."""

    def read(self, first: int, stop: int) -> BlockScales:
        """The scales of blocks ``[first, stop)``.

        Raises:
            MalformedError: a scale is NaN, infinite, or negative where the format has none.
        """

    def fit(self, first: int, largest: numpy.ndarray) -> BlockScales:
        """The scales from block `first` on for other greatest values."""


@dataclass(frozen=True, slots=True)
class FloatAbsMax:
    """The greatest absolute value of each block."""

    tensor: StoredTensor

    beside = ()

    def read(self, first: int, stop: int) -> BlockScales:
        """See `AbsMax`."""
        scales = self.tensor.read(first, stop)
        if not (scales >= 0).all() or not (scales < float("inf")).all():
            raise _no_scale(self.tensor, "NaN, infinite or negative")
        return BlockScales(scales, scales)

    def fit(self, first: int, largest: numpy.ndarray) -> BlockScales:
        """See `AbsMax`."""
        return BlockScales(largest, largest)


@dataclass(frozen=True, slots=True)
class NestedAbsMax:
    """``nested_quant_map[code] * nested_absmax + offset``, where `nesting.size` scales share a ``nested_absmax``.

    The sum may be a little below zero for a block of small values: bitsandbytes writes and reads such scales.
    """

    tensor: StoredTensor
    second: StoredTensor
    levels: StoredTensor
    nesting: Nesting

    @property
    def beside(self) -> tuple[StoredTensor, ...]:
        """The second level."""
        return self.second, self.levels

    def read(self, first: int, stop: int) -> BlockScales:
        """See `AbsMax`."""
        codes = self.tensor.read(first, stop)
        return self._decoded(codes, self._second(first, stop), self._levels())

    def fit(self, first: int, largest: numpy.ndarray) -> BlockScales:
        """The nearest codes on the second level that is stored."""
        import numpy as np

        second, levels = self._second(first, first + len(largest)), self._levels()
        inverse = np.divide(1, second, out=np.zeros_like(second), where=second > 0)
        codes = levels.nearest((largest - np.float32(self.nesting.offset)) * inverse)
        return self._decoded(codes, second, levels)

    def _decoded(self, codes: numpy.ndarray, second: numpy.ndarray, levels: Levels) -> BlockScales:
        import numpy as np

        # Rounded after each step to the type in which bitsandbytes has the scales, which is float32 but for files that
        # it saved after using them.
        dtype, offset = self.nesting.dtype, np.float32(self.nesting.offset)
        scaled = cast(cast(levels.decode(codes) * second, dtype), DType.F32)
        return BlockScales(codes, cast(cast(scaled + offset, dtype), DType.F32))

    def _second(self, first: int, stop: int) -> numpy.ndarray:
        """The second level's scale of each block."""
        import numpy as np

        size = self.nesting.size
        scales = self.second.read(first // size, -(-stop // size))
        if not (scales >= 0).all() or not (scales < float("inf")).all():
            raise _no_scale(self.second, "NaN, infinite or negative")
        return np.repeat(scales, size)[first % size :][: stop - first]

    def _levels(self) -> Levels:
        values = self.levels.read()
        if not (abs(values) < float("inf")).all():
            raise _no_scale(self.levels, "NaN or infinite")
        return Levels.of(values)


def _no_scale(tensor: StoredTensor, what: str) -> MalformedError:
    return MalformedError(f"holds a number that is {what}", file=tensor.path, tensor=tensor.name)
