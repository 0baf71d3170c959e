# SPDX-License-Identifier: Apache-2.0
"""A weight as MatMulNBits and GatherBlockQuantized take it: codes of 4 or 8 bits, a scale for a block of inputs.

``(code - zero point) * scale``; without zero points these are the middle code, 8 or 128. onnxruntime's operators
(docs/ContribOperators.md, 1.31): codes ``(out, blocks, block * bits / 8)`` with the first in the low half of a byte, scales
``(out, blocks)``, zero points ``(out, bytes of blocks * bits)``. The last block of a row is filled up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from surgery_formats.arrays import Array, cast, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.linalg.feedback import ErrorFeedback, round_columns
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.storage.block_format import BlockFormat
from surgery_formats.storage.block_grids import block_grid
from surgery_formats.storage.grouped_grid import GroupedGrid
from surgery_formats.storage.own_codes import own_codes
from surgery_formats.storage.packing import pack
from surgery_formats.storage.turned_stacks import across, by_outputs, rows_at_once
from surgery_formats.tensors.tensor import as_bytes

if TYPE_CHECKING:
    from surgery_formats.storage.quantised import Quantised

__all__ = ["NBits"]

T = TypeVar("T")


class _Held(Generic[T]):
    """What is known of the inputs of the weight that is being written: made for its first block, given up with the last."""

    def __init__(self, make: Callable[[], T | None] | None) -> None:
        self._make, self._made = make, False
        self._value: T | None = None

    def get(self) -> T | None:
        if not self._made and self._make is not None:
            self._value, self._made = self._make(), True
        return self._value

    def release(self) -> None:
        self._value, self._made = None, False


@dataclass(frozen=True, slots=True, eq=False)
class NBits:
    """The encoding of a matrix of weights, or of a stack of such.

    Attributes:
        sizes: ``(out, in)``, or ``(in, out)`` if `turned`; of a stack the matrices lie under each other.
        form: How codes are stored.
        turned: Whether rows are inputs: codes are of outputs, so that all of it has to be put together.
        inputs: Gives the inputs along which errors are made up for.
        importance: Gives ``(in,)``, what a squared error of an input weighs where scales are looked for.
        exact: A weight of codes whose grid this one holds: its codes and scales are taken as they are, but for
            outputs that it does not hold.
        count: Matrices of a stack, one under the other.
    """

    dtype: ClassVar[DType] = DType.F32
    elements: ClassVar[None] = None

    sizes: tuple[int, ...]
    form: BlockFormat
    turned: bool = False
    inputs: Callable[[], ErrorFeedback | None] | None = None
    importance: Callable[[], Array | None] | None = None
    exact: Quantised | None = None
    count: int = 1
    _feedback: _Held[ErrorFeedback] = field(init=False)
    _weights: _Held[Array] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_feedback", _Held(self.inputs))
        object.__setattr__(self, "_weights", _Held(self.importance))

    @property
    def shape(self) -> tuple[int, int]:
        """As stored in the checkpoint."""
        return self.sizes[0], self.sizes[1]

    @property
    def group(self) -> int:
        """See `rows_at_once`."""
        return rows_at_once(self.sizes, self.count, self.turned)

    @property
    def outputs(self) -> tuple[int, int]:
        """See `by_outputs`."""
        return by_outputs(self.sizes, self.count, self.turned)

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """Codes, scales, and zero points if they are stored."""
        outputs, inputs = self.outputs
        form, count = self.form, self.form.blocks(inputs)
        codes = StoredPart(f"{name}.codes", DType.U8, (outputs, count, form.block * form.bits // 8))
        scales = StoredPart(f"{name}.scales", form.scale_type, (outputs, count))
        zeros = StoredPart(f"{name}.zero_points", DType.U8, (outputs, -(-count * form.bits // 8)))
        return (codes, scales) if form.symmetric else (codes, scales, zeros)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `Encoding.put`."""
        values = cast(to_cpu(block), DType.F32)
        values = across(values, self.group) if self.turned else values
        if self.exact is not None:
            codes, numbers, grid = self._own(self.exact, start, len(block), values)
        else:
            codes, numbers, grid = self._coded(values)
        rounded[...] = across(numbers, self.shape[1]) if self.turned else numbers
        if start + len(block) >= self.shape[0]:
            self._feedback.release()
            self._weights.release()
        return self._packed(start, codes, grid)

    def _own(self, source: Quantised, start: int, count: int, values: Array) -> tuple[Array, Array, GroupedGrid]:
        """The weight's own codes; of outputs that these cannot hold (a scale too small for the type) the nearest."""
        codes, grid, fits = own_codes(source, start, count, self.form, values, turned=self.turned)
        numbers = grid.values(codes)
        if not fits.all():
            codes[~fits], numbers[~fits], anew = self._coded(values[~fits])
            assert grid.zeros is not None
            assert anew.zeros is not None
            grid.scales[~fits], grid.zeros[~fits] = anew.scales, anew.zeros
        return codes, numbers, grid

    def _coded(self, values: Array) -> tuple[Array, Array, GroupedGrid]:
        grid = block_grid(values, self.form, self._weights.get() if self.form.search else None)
        inputs = self._feedback.get()
        if inputs is None:
            codes = grid.nearest(values)
            return codes, grid.values(codes), grid

        def nearest(steps: Array, first: int) -> tuple[Array, Array]:
            found = grid.nearest(steps, first)
            return found, grid.values(found, first)

        return *round_columns(values, inputs, nearest), grid

    def _packed(self, start: int, codes: Array, grid: GroupedGrid) -> tuple[PartBytes, ...]:
        import numpy as np

        outputs, inputs = codes.shape
        form, count = self.form, self.form.blocks(inputs)
        if missing := count * form.block - inputs:
            codes = np.pad(codes, ((0, 0), (0, missing)), constant_values=form.middle)
        raw = [_row_bytes(codes, form.bits), cast(grid.scales, form.scale_type)]
        if not form.symmetric:
            assert grid.zeros is not None
            raw.append(_row_bytes(cast(grid.zeros, DType.U8), form.bits))
        first = start // self.group * self.shape[1] if self.turned else start
        return tuple(
            PartBytes(part, first * (array.nbytes // max(outputs, 1)), as_bytes(np.ascontiguousarray(array)))
            for part, array in enumerate(raw)
        )


def _row_bytes(codes: Array, bits: int) -> Array:
    """Bytes of the codes of every row, the first in the lowest bits; a row begins at a whole byte."""
    import numpy as np

    nbytes = -(-codes.shape[1] * bits // 8)
    return pack(codes, bits).view(np.uint8)[:, :nbytes]
