# SPDX-License-Identifier: Apache-2.0
"""A weight as DequantizeLinear takes it: numbers of 8 bits, float8_e4m3fn, a scale in float32 for an output or a block of inputs.

A value is the product of both in float32, so that a weight in the fp8 of another program goes in as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery_formats.arrays import Array, cast, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import Encoding, PartBytes, StoredPart
from surgery_formats.storage.block_format import BlockFormat
from surgery_formats.storage.nbits import NBits
from surgery_formats.storage.small_floats import E4M3
from surgery_formats.storage.turned_stacks import across, by_outputs, rows_at_once
from surgery_formats.tensors.tensor import as_bytes

if TYPE_CHECKING:
    from typing import TypeGuard

    from surgery_formats.storage.quantised import Quantised

__all__ = ["Float8Codes", "fitting_block", "is_of_graphs"]

_ONE = 0x38  # the code of 1
_LEAST = 2.0**-126  # the least scale that divides without a loss of its own
_PROBED = 128  # rows that are looked at: a whole block where rows are inputs


@dataclass(frozen=True, slots=True, eq=False)
class Float8Codes:
    """The encoding of a matrix of weights, or of a stack of such.

    Attributes:
        sizes: ``(out, in)``, or ``(in, out)`` if `turned`; of a stack the matrices lie under each other.
        form: How codes are stored.
        turned: Whether rows are inputs: scales are of outputs, so that all of it has to be put together.
        exact: A weight of fp8 whose codes and scales are taken as they are, but for outputs that are no such numbers.
        count: Matrices of a stack, one under the other.
    """

    dtype: ClassVar[DType] = DType.F32
    elements: ClassVar[None] = None

    sizes: tuple[int, ...]
    form: BlockFormat
    turned: bool = False
    exact: Quantised | None = None
    count: int = 1

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
        """Codes and scales: a vector of them where an output has one."""
        outputs, inputs = self.outputs
        scales = (outputs, self.form.blocks(inputs)) if self.form.block else (outputs,)
        return (
            StoredPart(f"{name}.codes", DType.F8_E4M3, (outputs, inputs)),
            StoredPart(f"{name}.scales", DType.F32, scales),
        )

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `Encoding.put`."""
        import numpy as np

        values = cast(to_cpu(block), DType.F32)
        values = across(values, self.group) if self.turned else values
        scales = _scales(values, self.form.block)
        codes = E4M3.nearest(values / _spread(scales, self.form.block, values.shape[1]))
        if self.exact is not None:
            own, stored = _own(self.exact, start, len(block), self.form.block, self.turned)
            fits = (_values(own, stored, self.form.block) == values).all(1)
            codes[fits], scales[fits] = own[fits], stored[fits]
        numbers = _values(codes, scales, self.form.block)
        rounded[...] = across(numbers, self.shape[1]) if self.turned else numbers
        first = start // self.group * self.shape[1] if self.turned else start
        return tuple(
            PartBytes(part, first * (array.nbytes // max(len(codes), 1)), as_bytes(np.ascontiguousarray(array)))
            for part, array in enumerate((codes, scales))
        )


def fitting_block(source: Quantised, *, turned: bool) -> int | None:
    """Inputs that share a scale in a weight of fp8, 0 for all; None if its codes are no such numbers. Some rows are read."""
    if source.bits != 8 or len(source.sizes) != 2:
        return None
    shared, inputs = (source.block[0], source.shape[0]) if turned else (source.block[1], source.shape[1])
    block = 0 if shared >= inputs else shared
    rows = min(source.shape[0], max(_PROBED, source.group))
    rows = rows // source.group * source.group or source.shape[0]
    values = source.grid(0, rows).values(source.codes(0, rows))
    codes, scales = _own(source, 0, rows, block, turned)
    found = _values(codes, scales, block)
    return block if (found == (values.T if turned else values)).all() else None


def is_of_graphs(encoding: Encoding) -> TypeGuard[NBits | Float8Codes]:
    """Whether a weight becomes codes of a graph, on a grid of its own."""
    return isinstance(encoding, NBits | Float8Codes)


def _own(source: Quantised, start: int, count: int, block: int, turned: bool) -> tuple[Array, Array]:
    """Codes ``(out, in)`` and scales ``(out, blocks)`` of rows of a weight, if its codes are such numbers."""
    import numpy as np

    codes, grid = source.codes(start, start + count), source.grid(start, start + count)
    codes = np.ascontiguousarray(codes).view(np.uint8)
    ones = grid.values(np.full_like(codes, _ONE))
    if turned:
        codes, ones = codes.T, ones.T
    return np.ascontiguousarray(codes), np.ascontiguousarray(ones[:, :: block or ones.shape[1]])


def _scales(values: Array, block: int) -> Array:
    """Those at which the greatest value of a block is the greatest code."""
    import numpy as np

    starts = np.arange(0, values.shape[1], block or values.shape[1])
    most = np.maximum.reduceat(np.abs(values), starts, axis=1)
    return np.where(most > 0, np.maximum(most / np.float32(E4M3.largest), np.float32(_LEAST)), np.float32(1))


def _values(codes: Array, scales: Array, block: int) -> Array:
    numbers: Array = E4M3.decode(codes)
    numbers *= _spread(scales, block, codes.shape[1])
    return numbers


def _spread(scales: Array, block: int, inputs: int) -> Array:
    """Scales as they meet the columns; one for all is broadcast."""
    import numpy as np

    return np.repeat(scales, block, 1)[:, :inputs] if block else scales
