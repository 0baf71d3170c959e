# SPDX-License-Identifier: Apache-2.0
"""What rounding lost of a block: the stored values before a merge, given an estimate of them.

A merged value is ``round(w + d)``. Taking the update back gives ``w + e`` with an error e of at most half a unit in the
last place of the *merged* value, so that rounding finds w again wherever its own unit is no smaller. Only where the sum
grew into a higher power of two are bits lost, ``k`` of them if its unit is ``2^k`` times that of the estimate: there the
difference in units is stored, apart for every k, because each k has frequencies of its own.

The estimate is computed in float64, whose last bits differ between processors. Where that could decide how it is rounded
(the estimate lies within `MARGIN` of the middle between two neighbours), and where the difference is not what k makes
likely, the value itself is stored. So any processor reads what another one wrote.
"""

from __future__ import annotations

from surgery.engine.undo.coding import Packer, Unpacker
from surgery_formats.arrays import Array, assign
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError

__all__ = ["LINE", "MARGIN", "Line", "decode", "encode", "nearest_bits"]

MARGIN = 2.0**-38
"""Of the greatest value of a block: many times what the order of additions changes in float64."""

_CLASSES = 8  # differences of as many or more lost bits are stored together


class Line:
    """How the bits of a type count along the line of its values."""

    def __init__(self, unsigned: str, mantissa: int, bias: int) -> None:
        import numpy

        self.unsigned = numpy.dtype(unsigned)
        self.mantissa, self.bias = mantissa, bias
        self.sign = 1 << (self.unsigned.itemsize * 8 - 1)

    def order(self, bits: Array) -> Array:
        """Bits as int64 that grow with the value; minus zero comes right before zero."""
        import numpy

        wide = bits.astype(numpy.int64)
        return numpy.where(bits & self.unsigned.type(self.sign) != 0, -1 - (wide & (self.sign - 1)), wide)

    def bits(self, order: Array) -> Array:
        """The bits of `order`.

        Raises:
            MalformedError: a number beyond the type.
        """
        import numpy

        if order.size and not (-self.sign <= int(order.min()) and int(order.max()) < self.sign):
            raise MalformedError("a difference leads beyond the type of the weight")
        size = numpy.where(order < 0, -1 - order, order).astype(self.unsigned)
        return numpy.where(order < 0, size | self.unsigned.type(self.sign), size)

    def unit(self, bits: Array) -> Array:
        """The power of two of the last place, as int16."""
        import numpy

        exponents = (bits >> self.unsigned.type(self.mantissa)).astype(numpy.int16)
        exponents &= (self.sign >> self.mantissa) - 1
        numpy.maximum(exponents, 1, out=exponents)
        exponents -= self.bias + self.mantissa
        return exponents


def LINE(dtype: DType) -> Line:  # a constant per type, made when numpy is there
    """The line of a type of plain numbers.

    Raises:
        KeyError: another type.
    """
    shapes = {
        DType.F64: ("<u8", 52, 1023),
        DType.F32: ("<u4", 23, 127),
        DType.F16: ("<u2", 10, 15),
        DType.BF16: ("<u2", 7, 127),
    }
    if dtype not in _lines:
        _lines[dtype] = Line(*shapes[dtype])
    return _lines[dtype]


_lines: dict[DType, Line] = {}


def nearest_bits(values: Array, dtype: DType) -> Array:
    """The bits of float64 values rounded to float32 and then to `dtype`, to nearest even both times."""
    import numpy

    if dtype is DType.F64:
        return values.copy().view(numpy.uint64)
    with numpy.errstate(over="ignore"):
        single = values.astype(numpy.float32)
    if dtype is DType.F32:
        return single.view(numpy.uint32)
    narrow = numpy.empty(single.shape, dtype.numpy)
    assign(narrow, single)
    return narrow.view(numpy.uint16)


def encode(before: Array, estimate: Array, merged: Array, types: tuple[DType, DType], margin: float) -> bytes:
    """What `decode` needs to find `before`.

    Args:
        before: Bits of the values before the merge, unsigned and flat.
        estimate: Of their values, float64, finite.
        merged: Bits of the values after it.
        types: Before, and after.
        margin: How far the estimate may lie elsewhere on another processor; 0 for never.
    """
    import numpy

    line = LINE(types[0])
    low = nearest_bits(estimate - margin if margin else estimate, types[0])
    high = nearest_bits(estimate + margin, types[0]) if margin else low
    lost = _lost_bits(low, merged, types)
    coarse = lost > 0
    plain = low != high
    plain |= (before != low) & ~coarse
    coarse &= ~plain
    packer = Packer()
    places = numpy.flatnonzero(plain)
    packer.add(numpy.diff(places, prepend=0).astype(numpy.uint32))
    packer.add(before[places])
    places = numpy.flatnonzero(coarse)
    classes = numpy.minimum(lost[places], _CLASSES)
    steps = line.order(before[places]) - line.order(low[places])
    folded = numpy.where(steps < 0, -2 * steps - 1, 2 * steps).astype(numpy.uint64)  # 0 -1 1 -2 2 ... -> 0 1 2 3 4
    for number in range(1, _CLASSES + 1):
        packer.add(folded[classes == number])
    return packer.data()


def decode(data: bytes | bytearray | memoryview, estimate: Array, merged: Array, types: tuple[DType, DType]) -> Array:
    """The bits before the merge; see `encode`.

    Raises:
        MalformedError: `data` was made for another block.
    """
    import numpy

    line = LINE(types[0])
    found = nearest_bits(estimate, types[0])
    unpacker = Unpacker(data)
    places = numpy.cumsum(unpacker.take(found.size).astype(numpy.int64))
    stored = unpacker.take(found.size)
    if len(places) != len(stored) or (places.size and not 0 <= int(places.min()) <= int(places[-1]) < found.size):
        raise MalformedError("a place lies outside of its block")
    lost = _lost_bits(found, merged, types)
    lost[places] = 0
    coarse = numpy.flatnonzero(lost > 0)
    classes = numpy.minimum(lost[coarse], _CLASSES)
    folded = numpy.empty(coarse.size, numpy.int64)
    for number in range(1, _CLASSES + 1):
        here = classes == number
        steps = unpacker.take(found.size)
        if len(steps) != int(here.sum()):
            raise MalformedError("it was made for other merged values")
        folded[here] = steps.astype(numpy.int64)
    unpacker.end()
    steps = numpy.where(folded & 1, -(folded >> 1) - 1, folded >> 1)
    found[coarse] = line.bits(line.order(found[coarse]) + steps)
    found[places] = stored.astype(line.unsigned)
    return found


def _lost_bits(estimate: Array, merged: Array, types: tuple[DType, DType]) -> Array:
    """How many bits finer the estimate is than the merged value; none of float64, whose values are stored whole."""
    lost = LINE(types[1]).unit(merged) - LINE(types[0]).unit(estimate)
    return lost * 0 if types[0] is DType.F64 else lost
