# SPDX-License-Identifier: Apache-2.0
"""The weights of a GGUF: of elements, of blocks that are read and written, and of blocks that are only read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, assign, cast, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.storage.base import Encoding, PartBytes, StoredPart
from surgery_formats.storage.gguf.affine import AffineCodec, AffineGrid, affine_values
from surgery_formats.storage.gguf.library import dequantise
from surgery_formats.storage.gguf.seat import AsElements, Seat
from surgery_formats.storage.quantised import Grid, check_rows, put_quantised
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["GgufBlocks", "GgufElements", "GgufLibrary"]

_FITTED = 1 << 18
"""Elements whose scales are searched for together: a search holds seven numbers for each, and is quickest in a core's cache."""


@dataclass(frozen=True, slots=True)
class _Seated:
    """What every weight of a GGUF has by its place alone.

    Attributes:
        seat: Where it lies.
    """

    seat: Seat
    container: ClassVar[str] = "gguf"

    @property
    def name(self) -> str:
        """As the model's code has it."""
        return self.seat.place.name

    @property
    def sizes(self) -> tuple[int, ...]:
        """As the model's code has them."""
        return self.seat.place.sizes

    @property
    def shape(self) -> tuple[int, int]:
        """See `Encoding.shape`."""
        return self.seat.place.shape

    @property
    def transposed(self) -> bool:
        """See `Storage.transposed`."""
        return self.seat.place.transposed

    @property
    def group(self) -> int:
        """See `Seat.group`."""
        return self.seat.group

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """The stored tensor."""
        return (self.seat.tensor,)

    def check_place(self, name: str, sizes: tuple[int, ...]) -> None:
        """See `Seat.check_place`."""
        self.seat.check_place(name, sizes)


@dataclass(frozen=True, slots=True)
class GgufElements(_Seated):
    """A weight of elements.

    Attributes:
        stored_dtype: Type of the elements.
    """

    stored_dtype: DType
    coded: ClassVar[bool] = False

    @property
    def dtype(self) -> DType:
        """The elements' type; of norms with 1 added float32."""
        return DType.F32 if self.seat.place.plus_one else self.stored_dtype

    @property
    def kind(self) -> str:
        """Name of the elements' type."""
        return self.stored_dtype.label

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.stored_dtype.is_float

    @property
    def elements(self) -> StoredTensor | None:
        """The stored tensor under the weight's name, unless its elements are in another order, or not its values."""
        place, tensor = self.seat.place, self.seat.tensor
        if place.transposed or place.head > 1 or place.plus_one or tensor.shape != place.sizes:
            return None
        return replace(tensor, name=place.name)

    def check_written(self) -> None:
        """It is."""

    def in_elements(self, dtype: DType) -> Encoding:
        """In `dtype`; vectors and what else llama.cpp expects in float32 stay as they are."""
        if self.seat.place.in_full or not self.is_float or dtype is self.stored_dtype:
            return self
        return AsElements(self.seat, dtype)

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """One tensor."""
        return self.seat.parts(name, self.stored_dtype, self.seat.tensor.shape)

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage.read_into`."""
        values = self._stored(start, start + len(block))
        if self.seat.place.plus_one:
            assign(block, values)
            block -= 1
        else:
            block[...] = values

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """The rows rounded to the stored type; norms that did not change keep their bits."""
        if not self.seat.place.plus_one:
            return AsElements(self.seat, self.stored_dtype).put(start, block, rounded)
        import numpy as np

        old = self._stored(start, start + len(block))
        values = cast(to_cpu(block), DType.F32)
        self.read_into(rounded, start)
        new = np.where(rounded == values, old, cast(values + np.float32(1), self.stored_dtype))
        assign(rounded, new)
        rounded -= 1
        return self.seat.rows.written(start, new)

    def _stored(self, start: int, stop: int) -> Array:
        raw = self.seat.rows.read(start, stop)
        return raw.view(self.stored_dtype.numpy).reshape(stop - start, self.shape[1])


@dataclass(frozen=True, slots=True)
class GgufBlocks(_Seated):
    """A weight of blocks of codes with scales.

    Attributes:
        codec: The type of the blocks.
    """

    codec: AffineCodec
    coded: ClassVar[bool] = True
    dtype: ClassVar[DType] = DType.F32
    elements: ClassVar[None] = None
    is_float: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        """Name of the type."""
        return self.codec.type.name

    @property
    def bits(self) -> int:
        """See `Quantised.bits`."""
        return self.codec.bits

    @property
    def block(self) -> tuple[int, int]:
        """See `Quantised.block`."""
        return 1, self.codec.group

    def check_written(self) -> None:
        """It is."""

    def in_elements(self, dtype: DType) -> Encoding:
        """In `dtype`."""
        return AsElements(self.seat, dtype)

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """One tensor of bytes."""
        return self.seat.parts(name, DType.U8, self.seat.tensor.shape)

    def codes(self, start: int, stop: int) -> Array:
        """See `Quantised.codes`."""
        return self.codec.unpack(self._blocks(start, stop)).reshape(stop - start, self.shape[1])

    def grid(self, start: int, stop: int) -> Grid:
        """See `Quantised.grid`."""
        return self._grid(self._blocks(start, stop))

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage.read_into`."""
        if not len(block):
            return
        blocks = self._blocks(start, start + len(block))
        grid = self._grid(blocks)
        codes = self.codec.unpack(blocks).reshape(*grid.scale.shape, self.codec.group)
        affine_values(self.codec, codes, grid.scale, grid.offset, block.reshape(codes.shape))

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `put_quantised`."""
        return put_quantised(self, start, block, rounded)

    def fit(self, start: int, values: Array) -> Grid | None:
        """See `Quantised.fit`; as llama.cpp's reference quantiser does without an importance matrix.

        Raises:
            FitError: a value is too large for a half scale.
        """
        import numpy as np

        check_rows(self, start, start + len(values))
        values = values.reshape(len(values), -1, self.codec.type.block)
        height = max(1, _FITTED // self.shape[1])
        pieces = []
        for first in range(0, max(1, len(values)), height):
            if (blocks := self.codec.fit(values[first : first + height])) is None:
                return None
            pieces.append(blocks)
        return self._grid(np.concatenate(pieces), "after the update a value is too large for the scales of")

    def pack(self, start: int, codes: Array, grid: Grid) -> tuple[PartBytes, ...]:
        """See `Quantised.pack`."""
        import numpy as np

        assert isinstance(grid, AffineGrid)
        blocks = grid.blocks.copy()
        self.codec.pack(np.ascontiguousarray(codes).reshape(*blocks.shape[:-1], self.codec.type.block), blocks)
        return self.seat.rows.written(start, blocks.reshape(len(codes), -1))

    def _blocks(self, start: int, stop: int) -> Array:
        return self.seat.rows.read(start, stop).reshape(stop - start, -1, self.codec.type.nbytes)

    def _grid(self, blocks: Array, fault: str = "a scale or minimum is NaN or infinite in") -> AffineGrid:
        import numpy as np

        grid = AffineGrid.of(self.codec, blocks)
        if not (np.isfinite(grid.scale).all() and (grid.offset is None or np.isfinite(grid.offset).all())):
            raise FitError(f"{fault} {self.kind}", file=self.seat.tensor.path, tensor=self.seat.tensor.name)
        return grid


@dataclass(frozen=True, slots=True)
class GgufLibrary(_Seated):
    """A weight of blocks that the package ``gguf`` reads, and nothing here writes.

    Attributes:
        kind: Name of the type.
    """

    kind: str
    coded: ClassVar[bool] = True
    dtype: ClassVar[DType] = DType.F32
    elements: ClassVar[None] = None
    is_float: ClassVar[bool] = True

    def check_written(self) -> None:
        """Raise FitError: it is not."""
        raise FitError(
            f"{self.kind} is read, but not written: its codes come from a search in llama.cpp over a codebook",
            file=self.seat.tensor.path,
            tensor=self.seat.tensor.name,
            hint='`quantized="dequantize"` stores 16 bits, which llama-quantize can quantise again',
        )

    def in_elements(self, dtype: DType) -> Encoding:
        """In `dtype`."""
        return AsElements(self.seat, dtype)

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """One tensor of bytes."""
        return self.seat.parts(name, DType.U8, self.seat.tensor.shape)

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage.read_into`."""
        import numpy as np

        if not len(block):
            return
        with np.errstate(all="ignore"):
            values = dequantise(self.seat.rows.read(start, start + len(block)), self.kind)
        if not np.isfinite(values).all():
            raise FitError(
                f"a scale is NaN or infinite in {self.kind}", file=self.seat.tensor.path, tensor=self.seat.tensor.name
            )
        block[...] = values

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `check_written`."""
        self.check_written()
        return ()
