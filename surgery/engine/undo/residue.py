# SPDX-License-Identifier: Apache-2.0
"""What rounding lost of a block: the stored values before a merge, given an estimate of them.

A merged value is ``round(w + d)``. Taking the update back gives ``w + e`` with an error e of at most half a unit in the
last place of the *merged* value, so that rounding finds w again wherever its own unit is no smaller. Only where the sum
grew into a higher power of two are bits lost, ``k`` of them if its unit is ``2^k`` times that of the estimate: there the
difference in units is stored, apart for every k, because each k has frequencies of its own.

The estimate is computed in float64, whose last bits differ between processors. Where that could decide how it is rounded
(the estimate lies within `MARGIN` of the middle between two neighbours) the value itself is stored. So any processor
reads what another one wrote. Few values differ that lost no bit: they are listed with their differences; where they are
many (float32, in which a merge rounds more than once) every value has a class.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from surgery.engine.undo.coding import Packer, Unpacker
from surgery_formats.arrays import Array, assign
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError

__all__ = ["LINE", "MARGIN", "Line", "decode", "encode", "nearest_bits"]

MARGIN = 2.0**-38
"""Of the greatest value of a block: many times what the order of additions changes in float64."""

_PIECE = 1 << 16  # elements that are looked at together, in cache
_MANY = 6  # one value of so many differs without having lost a bit: then each gets a class
_CLASSES = 8  # differences of as many or more lost bits are stored together


class Line:
    """How the bits of a type count along the line of its values."""

    def __init__(self, unsigned: str, mantissa: int, bias: int) -> None:
        import numpy

        self.unsigned = numpy.dtype(unsigned)
        self.mantissa, self.bias = mantissa, bias
        self.sign = 1 << (self.unsigned.itemsize * 8 - 1)
        self._signed = numpy.dtype(f"<i{self.unsigned.itemsize}")
        self._wide = numpy.int32 if self.unsigned.itemsize == 2 else numpy.int64

    def order(self, bits: Array) -> Array:
        """Bits as whole numbers that grow with the value; minus zero comes right before zero.

        Of negative numbers all bits but the sign are turned over. The result has room for differences.
        """
        return self._turned(bits.view(self._signed)).astype(self._wide)

    def bits(self, order: Array) -> Array:
        """The bits of `order`.

        Raises:
            MalformedError: a number beyond the type.
        """
        if order.size and not (-self.sign <= int(order.min()) and int(order.max()) < self.sign):
            raise MalformedError("a difference leads beyond the type of the weight")
        return self._turned(order.astype(self._signed)).view(self.unsigned)

    def _turned(self, signed: Array) -> Array:
        """Its own inverse."""
        mask = signed >> (self.unsigned.itemsize * 8 - 1)
        mask &= self._signed.type(self.sign - 1)
        mask ^= signed
        return mask

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

    bits = numpy.empty(values.shape, LINE(dtype).unsigned)
    _round(values, dtype, bits, numpy.empty(values.shape, numpy.float32))
    return bits


def _round(values: Array, dtype: DType, bits: Array, single: Array) -> None:
    """`nearest_bits` into `bits`, by way of `single`."""
    import numpy

    if dtype is DType.F64:
        bits[...] = values.view(numpy.uint64)
        return
    with numpy.errstate(over="ignore"):
        numpy.copyto(single, values, casting="same_kind")
    if dtype is DType.F32:
        bits[...] = single.view(numpy.uint32)
    else:
        assign(bits.view(dtype.numpy), single)


class _Scratch:
    """A thread's arrays for one piece, made once: fresh memory would cost more than what is done with it."""

    def __init__(self, dtype: DType) -> None:
        import numpy

        self.wide = numpy.empty(_PIECE, numpy.float64)
        self.single = numpy.empty(_PIECE, numpy.float32)
        self.low, self.high, self.exponents, self.others = (numpy.empty(_PIECE, LINE(dtype).unsigned) for _ in range(4))
        self.coarse, self.plain, self.doubtful = (numpy.empty(_PIECE, numpy.bool_) for _ in range(3))


_kept = threading.local()


def _buffers(dtype: DType) -> _Scratch:
    made: dict[DType, _Scratch] = _kept.__dict__.setdefault("made", {})
    if dtype not in made:
        made[dtype] = _Scratch(dtype)
    return made[dtype]


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _PIECE, size)) for start in range(0, size, _PIECE))


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

    found = _scan(before, estimate, merged, types, margin, every=False)
    if every := _joined(found.wrong).size * _MANY > before.size:
        found = _scan(before, estimate, merged, types, margin, every=True)
    packer = Packer()
    for places in (_joined(found.doubtful), _joined(found.wrong)):
        packer.add(numpy.diff(places, prepend=0).astype(numpy.uint32))
    packer.add(before[_joined(found.doubtful)])
    packer.add(_joined(found.wrong_steps))
    by, ends = _by_class(_joined(found.classes))
    steps = _joined(found.steps)[by]
    for start, end in pairwise([0, *ends]):
        packer.add(steps[start:end])
    return bytes([every]) + packer.data()


class _Found(NamedTuple):
    """What pieces of a block have to say, as lists of arrays."""

    doubtful: list[Array]  # places of values that are stored whole
    wrong: list[Array]  # places of the others that differ and have no class
    wrong_steps: list[Array]
    classes: list[Array]  # of the rest that may differ
    steps: list[Array]


def _scan(
    before: Array, estimate: Array, merged: Array, types: tuple[DType, DType], margin: float, *, every: bool
) -> _Found:
    """Look at every value; those that lost no bit have the class 0 if `every` one is to have a class."""
    import numpy

    work = _buffers(types[0])
    found = _Found([], [], [], [], [])
    for piece in _pieces(before.size):
        values, stored, now = estimate[piece], before[piece], merged[piece]
        count = len(values)
        low, high, wide, single = work.low[:count], work.high[:count], work.wide[:count], work.single[:count]
        wrong, doubtful = work.plain[:count], work.doubtful[:count]
        numpy.subtract(values, margin, out=wide)
        _round(wide, types[0], low, single)
        coarse = _is_coarse(low, now, types, work)
        numpy.not_equal(stored, low, out=wrong)
        if types[0] is DType.F64:
            doubtful[...] = wrong
        elif margin:
            numpy.add(values, margin, out=wide)
            _round(wide, types[0], high, single)
            numpy.not_equal(low, high, out=doubtful)
        else:
            doubtful[...] = False
        if every:
            coarse[...] = True
        numpy.greater(coarse, doubtful, out=coarse)
        numpy.greater(wrong, coarse, out=wrong)
        numpy.greater(wrong, doubtful, out=wrong)
        found.doubtful.append(numpy.flatnonzero(doubtful) + piece.start)
        at = numpy.flatnonzero(wrong)
        found.wrong.append(at + piece.start)
        found.wrong_steps.append(_steps(stored[at], low[at], types[0]))
        at = numpy.flatnonzero(coarse)
        found.classes.append(_classes(low[at], now[at], types, least=int(not every)))
        found.steps.append(_steps(stored[at], low[at], types[0]))
    return found


def _by_class(classes: Array) -> tuple[Array, list[int]]:
    """The order that puts equal classes together, and where each ends."""
    import numpy

    counts = numpy.bincount(classes, minlength=_CLASSES + 1)
    return numpy.argsort(classes, kind="stable"), numpy.cumsum(counts).tolist()


def _joined(parts: list[Array]) -> Array:
    import numpy

    return numpy.concatenate(parts) if parts else numpy.empty(0, numpy.int64)


def _steps(stored: Array, low: Array, dtype: DType) -> Array:
    """Differences in units, folded into numbers from 0: 0 -1 1 -2 2 ... are 0 1 2 3 4."""
    import numpy

    steps = LINE(dtype).order(stored)
    steps -= LINE(dtype).order(low)
    negative = steps < 0
    steps <<= 1
    numpy.invert(steps, out=steps, where=negative)
    return steps.view(f"<u{steps.itemsize}")


def decode(data: bytes | bytearray | memoryview, estimate: Array, merged: Array, types: tuple[DType, DType]) -> Array:
    """The bits before the merge; see `encode`.

    Raises:
        MalformedError: `data` was made for another block.
    """
    import numpy

    line, work = LINE(types[0]), _buffers(types[0])
    found = numpy.empty(estimate.size, line.unsigned)
    every, unpacker = bool(data[:1] == b"\x01"), Unpacker(memoryview(data)[1:])
    places, wrong = (numpy.cumsum(unpacker.take(found.size).astype(numpy.int64)) for _ in range(2))
    stored, wrong_steps = unpacker.take(found.size), unpacker.take(found.size)
    for listed, values in ((places, stored), (wrong, wrong_steps)):
        inside = not listed.size or 0 <= int(listed.min()) <= int(listed[-1]) < found.size
        if len(listed) != len(values) or not inside:
            raise MalformedError("a place lies outside of its block")
    kept: list[Array] = []
    classes: list[Array] = []
    for piece in _pieces(found.size):
        bits, now = found[piece], merged[piece]
        _round(estimate[piece], types[0], bits, work.single[: len(bits)])
        coarse = _is_coarse(bits, now, types, work)
        if every:
            coarse[...] = True
        first, last = numpy.searchsorted(places, (piece.start, piece.stop))
        coarse[places[first:last] - piece.start] = False
        at = numpy.flatnonzero(coarse)
        classes.append(_classes(bits[at], now[at], types, least=int(not every)))
        kept.append(at + piece.start)
    by, ends = _by_class(_joined(classes))
    folded = [unpacker.take(found.size) for _ in range(_CLASSES + 1)]
    unpacker.end()
    if list(map(len, folded)) != [end - start for start, end in pairwise([0, *ends])]:
        raise MalformedError("it was made for other merged values")
    for at, steps in ((_joined(kept)[by], _joined(folded)), (wrong, wrong_steps)):
        signed = steps.view(numpy.int64)
        found[at] = line.bits(line.order(found[at]) + ((signed >> 1) ^ -(signed & 1)))
    found[places] = stored.astype(line.unsigned)
    return found


def _is_coarse(estimate: Array, merged: Array, types: tuple[DType, DType], work: _Scratch) -> Array:
    """Where the unit of the merged value is greater than that of the estimate, so that bits are lost.

    Nowhere in float64, whose values are stored whole where they differ.
    """
    import numpy

    coarse = work.coarse[: len(estimate)]
    if types[0] is DType.F64:
        coarse[...] = False
    elif types[0] is types[1]:  # by their exponents as they lie there
        line = LINE(types[0])
        mask = line.unsigned.type(line.sign - (1 << line.mantissa))
        own, others = work.exponents[: len(estimate)], work.others[: len(estimate)]
        numpy.bitwise_and(estimate, mask, out=own)
        numpy.bitwise_and(merged, mask, out=others)
        numpy.greater(others, own, out=coarse)
    else:
        numpy.greater(LINE(types[1]).unit(merged), LINE(types[0]).unit(estimate), out=coarse)
    return coarse


def _classes(estimate: Array, merged: Array, types: tuple[DType, DType], *, least: int) -> Array:
    """How many bits finer estimates are than merged values, from `least` to `_CLASSES`."""
    import numpy

    lost = LINE(types[1]).unit(merged) - LINE(types[0]).unit(estimate)
    return numpy.clip(lost, least, _CLASSES).astype(numpy.uint8)
