# SPDX-License-Identifier: Apache-2.0
"""Codes of 1 to 8 bits in words of 32 bits, packed along one axis, lowest bits first.

Most programs write a stream: a code of 3 bits may begin in one word and end in the next, so that 32 codes take as many
words as a code has bits (GPTQ, MLX, compressed-tensors). Codes of 1, 2, 4 and 8 bits never do. Some programs leave the
bits unused that do not make a whole code (`padded`), or permute the codes of a word (`order`, AWQ).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy

__all__ = ["pack", "unit", "unpack", "words_of"]

_WORD = 32


def unit(bits: int, padded: bool = False) -> int:
    """The fewest codes that fill whole words."""
    return _WORD // (bits if padded else math.gcd(_WORD, bits))


def words_of(count: int, bits: int, padded: bool = False) -> int:
    """Words that `count` codes take; the last is filled up with zeros."""
    return -(-count // (_WORD // bits)) if padded else -(-count * bits // _WORD)


def unpack(
    words: numpy.ndarray, bits: int, count: int, axis: int = -1, order: Sequence[int] = (), padded: bool = False
) -> numpy.ndarray:
    """The codes of words.

    Args:
        words: int32 or uint32, `words_of` of them or more along `axis`; those behind are ignored.
        bits: Of a code, 1 to 8.
        count: Codes along `axis`.
        axis: Along which they are packed.
        order: ``order[k]`` is the place that the k-th code from the lowest bits of a word has among the word's codes;
            `count` is then a multiple of their number.
        padded: No code spans two words.

    Returns:
        uint8, `count` long along `axis`, in memory of the caller's own.
    """
    import numpy as np

    axis %= words.ndim
    size, per = unit(bits, padded), _words_per_unit(bits, padded)
    units = _units(count, size, order)
    outer, inner = words.shape[:axis], words.shape[axis + 1 :]
    before, behind = math.prod(outer), math.prod(inner)
    words = _whole_units(words.view(np.uint32), axis, words_of(count, bits, padded), units * per)
    codes = np.empty((before, units, size, behind), np.uint8)
    if behind == 1 and not order and size * bits == per * _WORD:
        _spread(np.ascontiguousarray(words).reshape(-1).view(np.uint8), bits, codes.reshape(-1))
    elif 8 % bits == 0:
        _split_planes(words.reshape(before, units, behind), bits, codes, order)
    else:
        _split_words(words.reshape(before, units, per, behind), bits, codes, order, padded)
    codes = codes.reshape(*outer, units * size, *inner)
    if units * size == count:
        return codes
    return np.ascontiguousarray(codes[(*[slice(None)] * axis, slice(count))])


def pack(
    codes: numpy.ndarray, bits: int, axis: int = -1, order: Sequence[int] = (), padded: bool = False
) -> numpy.ndarray:
    """The words of codes, see `unpack`.

    Args:
        codes: Of an integer type, from 0 to ``2**bits - 1``.
        bits: Of a code, 1 to 8.
        axis: See `unpack`.
        order: See `unpack`.
        padded: See `unpack`.

    Returns:
        uint32, `words_of` of them along `axis`.
    """
    import numpy as np

    axis %= codes.ndim
    count = codes.shape[axis]
    size, per = unit(bits, padded), _words_per_unit(bits, padded)
    units = _units(count, size, order)
    outer, inner = codes.shape[:axis], codes.shape[axis + 1 :]
    before, behind = math.prod(outer), math.prod(inner)
    codes = _whole_units(codes.astype(np.uint8, copy=False), axis, count, units * size)
    if behind == 1 and not order and size * bits == per * _WORD:
        words = _squeezed(np.ascontiguousarray(codes).reshape(-1), bits).view(np.uint32)
    else:
        words = _joined_words(codes.reshape(before, units, size, behind), bits, per, order, padded)
    words = words.reshape(*outer, units * per, *inner)
    needed = words_of(count, bits, padded)
    return words if words.shape[axis] == needed else np.ascontiguousarray(words[(*[slice(None)] * axis, slice(needed))])


class _Place(NamedTuple):
    """Where a code lies in a unit.

    Attributes:
        code: Its place among the unit's codes.
        word: The word that has its lowest bits.
        shift: By how many bits, in that word.
        spilled: How many of its bits are the next word's.
    """

    code: int
    word: int
    shift: int
    spilled: int


def _units(count: int, size: int, order: Sequence[int]) -> int:
    if order and (sorted(order) != list(range(size)) or count % size):
        raise ValueError(f"{list(order)} is no order of {count} codes, {size} in a word")
    return -(-count // size)


def _places(bits: int, order: Sequence[int], padded: bool) -> Iterator[_Place]:
    for k in range(unit(bits, padded)):
        word, shift = divmod(k * bits, _WORD)
        yield _Place(order[k] if order else k, word, shift, max(shift + bits - _WORD, 0))


def _words_per_unit(bits: int, padded: bool) -> int:
    if not 1 <= bits <= 8:
        raise ValueError(f"a code has 1 to 8 bits, not {bits}")
    return 1 if padded else bits // math.gcd(_WORD, bits)


def _whole_units(array: numpy.ndarray, axis: int, used: int, whole: int) -> numpy.ndarray:
    """The first `used` elements along `axis`, with zeros behind up to `whole`."""
    import numpy as np

    if array.shape[axis] == whole and used == whole:
        return array
    filled = np.zeros((*array.shape[:axis], whole, *array.shape[axis + 1 :]), array.dtype)
    first = (*[slice(None)] * axis, slice(used))
    filled[first] = array[first]
    return filled


def _halvings(bits: int) -> Iterator[tuple[int, int, int]]:
    """How eight codes of a stream become eight bytes: the upper half of every lane moves to a lane of its own.

    ``(bits to move by, mask of the lower halves, mask of the upper halves)``, for lanes of 64, 32 and 16 bits.
    """
    for lane in (64, 32, 16):
        half = lane * bits // 16
        lower = sum((1 << half) - 1 << start for start in range(0, 64, lane))
        yield lane // 2 - half, lower, lower << half


def _spread(packed: numpy.ndarray, bits: int, codes: numpy.ndarray) -> None:
    """Bytes of a stream into codes, both flat: eight at a time, in words of 64 bits."""
    import numpy as np

    if bits == 8:
        codes[...] = packed
        return
    padded = np.empty(packed.size + 8, np.uint8)  # the last word reaches beyond its own bytes
    padded[: packed.size] = packed
    words = codes.view(np.uint64)
    words[...] = np.ndarray(words.shape, np.uint64, padded.data, 0, (bits,))
    words &= np.uint64((1 << 8 * bits) - 1)
    moved = np.empty_like(words)
    for shift, lower, upper in _halvings(bits):
        np.bitwise_and(words, np.uint64(upper), out=moved)
        moved <<= np.uint64(shift)
        words &= np.uint64(lower)
        words |= moved


def _squeezed(codes: numpy.ndarray, bits: int) -> numpy.ndarray:
    """The bytes of a stream of codes, flat."""
    import numpy as np

    if bits == 8:
        return codes.copy()
    words = codes.view(np.uint64).copy()
    moved = np.empty_like(words)
    for shift, lower, upper in reversed(list(_halvings(bits))):
        np.right_shift(words, np.uint64(shift), out=moved)
        moved &= np.uint64(upper)
        words &= np.uint64(lower)
        words |= moved
    packed = np.empty((words.size, bits), np.uint8)
    eights = words.view(np.uint8).reshape(-1, 8)
    for place in range(bits):
        packed[:, place] = eights[:, place]
    return packed.reshape(-1)


def _split_planes(words: numpy.ndarray, bits: int, codes: numpy.ndarray, order: Sequence[int]) -> None:
    """Codes of which whole ones make a byte, along another axis or permuted: most steps are on a byte of every word."""
    import numpy as np

    mask = (1 << bits) - 1
    byte = np.empty(words.shape, np.uint8)
    for place in _places(bits, order, False):
        if place.shift % 8 == 0:
            np.copyto(byte, words >> np.uint32(place.shift) if place.shift else words, casting="unsafe")
        codes[:, :, place.code] = (byte >> (place.shift % 8)) & mask if bits < 8 else byte


def _split_words(words: numpy.ndarray, bits: int, codes: numpy.ndarray, order: Sequence[int], padded: bool) -> None:
    import numpy as np

    mask = np.uint32((1 << bits) - 1)
    for place in _places(bits, order, padded):
        values = words[:, :, place.word] >> np.uint32(place.shift)
        if place.spilled:
            values |= words[:, :, place.word + 1] << np.uint32(bits - place.spilled)
        values &= mask
        codes[:, :, place.code] = values


def _joined_words(codes: numpy.ndarray, bits: int, per: int, order: Sequence[int], padded: bool) -> numpy.ndarray:
    import numpy as np

    before, units, _, behind = codes.shape
    words = np.zeros((before, units, per, behind), np.uint32)
    for place in _places(bits, order, padded):
        values = codes[:, :, place.code].astype(np.uint32)
        words[:, :, place.word] |= values << np.uint32(place.shift)
        if place.spilled:
            words[:, :, place.word + 1] |= values >> np.uint32(bits - place.spilled)
    return words
