# SPDX-License-Identifier: Apache-2.0
"""LLM.int8: ``X.weight`` in int8 with ``X.SCB``, the greatest absolute value of each row (Dettmers et al. 2022).

A value is ``code * SCB * float32(1 / 127)``, multiplied in this order in float32. Outliers are columns of activations,
found when the model runs: a file has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery_formats.arrays import Array, assign
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.storage.quantised import Grid, put_quantised, read_quantised
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

if TYPE_CHECKING:
    import numpy

__all__ = ["FORMAT", "SCALES", "Int8", "Int8Grid", "tiles_of"]

SCALES, FORMAT = ".SCB", ".weight_format"
_WEIGHT = ".weight"
_STEP = 7.874015718698502e-3
_LARGEST = 127
_TILES = {1: "col32", 2: "col_turing", 3: "col_ampere"}


def tiles_of(mark: StoredTensor) -> str:
    """How the codes lie that a ``weight_format`` stands beside, for a GPU of its time; empty if they lie in rows.

    Raises:
        MalformedError: it is not a byte.
    """
    if mark.dtype is not DType.U8 or mark.shape:
        what = f"is {mark.dtype.label} {list(mark.shape)} where bitsandbytes has U8 []"
        raise MalformedError(what, file=mark.path, tensor=mark.name)
    layout = int(mark.read())
    return _TILES.get(layout, f"layout {layout}") if layout else ""


@dataclass(frozen=True, slots=True, eq=False)
class Int8Grid:
    """The greatest absolute values of some rows, float32."""

    scales: numpy.ndarray

    def values(self, codes: Array, first: int = 0) -> Array:
        """See `Grid`."""
        import numpy as np

        values = np.empty(codes.shape, np.float32)
        assign(values, codes)
        values *= self.scales[:, None]
        values *= np.float32(_STEP)
        return values

    def nearest(self, values: Array, first: int = 0) -> Array:
        """See `Grid`; int8, and never -128, which bitsandbytes does not use."""
        import numpy as np

        with np.errstate(over="ignore"):  # below the smallest normal number, steps have no reciprocal
            steps = np.divide(np.float32(_LARGEST), self.scales, out=np.zeros_like(self.scales), where=self.scales > 0)
            scaled = values * np.minimum(steps, np.finfo(np.float32).max)[:, None]
        return np.rint(scaled, out=scaled).clip(-_LARGEST, _LARGEST, out=scaled).astype(np.int8)


@dataclass(frozen=True, slots=True)
class Int8:
    """A weight of LLM.int8.

    Attributes:
        name: Also of the tensor of codes.
        tensor: int8 ``(out, in)``.
        scales: float32 ``(out,)``.
        format: A byte that says that rows lie as they are; old files have none.
    """

    name: str
    tensor: StoredTensor
    scales: StoredTensor
    format: StoredTensor | None

    dtype = DType.F32
    kind = "INT8"
    elements = None
    is_float = True
    transposed = False
    group = 1
    bits = 8

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the codes."""
        return self.tensor.shape

    @property
    def shape(self) -> tuple[int, int]:
        """The same."""
        return self.tensor.matrix

    @property
    def block(self) -> tuple[int, int]:
        """A row."""
        return 1, self.shape[1]

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """Codes, scales, and the byte."""
        return (self.tensor, self.scales, *([self.format] if self.format else []))

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """See `Encoding`."""
        stem = name.removesuffix(_WEIGHT)
        names = (name, stem + SCALES, stem + FORMAT)
        return tuple(
            StoredPart(part, source.dtype, source.shape) for part, source in zip(names, self.sources, strict=False)
        )

    def codes(self, start: int, stop: int) -> Array:
        """See `Quantised`."""
        return self.tensor.read(start, stop)

    def grid(self, start: int, stop: int) -> Int8Grid:
        """See `Quantised`."""
        scales = self.scales.read(start, stop)
        if not (scales >= 0).all() or not (scales < float("inf")).all():
            what = "holds a number that is NaN, infinite or negative"
            raise MalformedError(what, file=self.scales.path, tensor=self.scales.name)
        return Int8Grid(scales)

    def fit(self, start: int, values: Array) -> Int8Grid:
        """The greatest absolute value of each row."""
        return Int8Grid(abs(values).max(axis=1))

    def pack(self, start: int, codes: Array, grid: Grid) -> tuple[PartBytes, ...]:
        """See `Quantised`; the byte comes with the first row."""
        import numpy as np

        assert isinstance(grid, Int8Grid)
        written = [
            PartBytes(0, start * self.shape[1], as_bytes(np.ascontiguousarray(codes, np.int8))),
            PartBytes(1, start * DType.F32.bits // 8, as_bytes(np.ascontiguousarray(grid.scales))),
        ]
        if start == 0 and self.format:
            written.append(PartBytes(2, 0, as_bytes(self.format.read())))
        return tuple(written)

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage`."""
        read_quantised(self, block, start)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `Encoding`."""
        return put_quantised(self, start, block, rounded)
