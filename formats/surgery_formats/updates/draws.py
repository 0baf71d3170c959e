# SPDX-License-Identifier: Apache-2.0
"""Numbers as torch's CPU generator draws them, bit for bit, without torch.

Its engine is the Mersenne Twister of numpy's `RandomState`, seeded with the lower half of the seed. Sources: ATen
``CPUGeneratorImpl.h``, ``TransformationHelper.h`` (``uniform_real``) and ``TensorFactories.cpp`` (``randperm_cpu``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from surgery_formats.arrays import Array

if TYPE_CHECKING:
    import numpy

__all__ = ["TorchDraws"]

_MANY = (2**32 - 1) // 20
"""The number of things from which on torch shuffles them in another way, by words of 64 bits."""
_CHUNK = 1 << 20
_BLOCK = 16
"""How many normal numbers torch draws at a time, where there are as many."""


class TorchDraws:
    """A generator that gives what ``torch.Generator("cpu").manual_seed(seed)`` would, in the same order."""

    def __init__(self, seed: int) -> None:
        import numpy

        self._words = numpy.random.RandomState(seed % 2**32)

    def _drawn(self, count: int) -> numpy.ndarray:
        import numpy

        return numpy.frombuffer(self._words.bytes(4 * count), "<u4")

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Array:
        """``torch.empty(shape).uniform_(low, high)``, float32: 24 bits of each word, rounded once; `high` becomes `low`."""
        import numpy

        first, last = numpy.float32(low), numpy.float32(high)
        drawn = self._drawn(math.prod(shape)) & 0xFFFFFF
        values = (drawn * 2.0**-24 * float(last - first) + float(first)).astype(numpy.float32)
        values[values == last] = first
        return values.reshape(shape)

    def normal(self, count: int) -> Array:
        """``torch.empty(count).normal_()`` up to rounding, float64: sixteen at a time, or two where there are fewer.

        Sources: ATen ``DistributionTemplates.h`` (``normal_fill``) and ``DistributionsHelper.h`` (``normal_distribution``).
        """
        import numpy

        if count < _BLOCK:
            words = self._drawn(4 * -(-count // 2)).astype(numpy.uint64).reshape(-1, 2, 2)
            turn, share = (((words[..., 0] << 32 | words[..., 1]) & (1 << 53) - 1) * 2.0**-53).T
            return _normal_pairs(share, turn).T.reshape(-1)[:count]
        values = self.uniform((count,)).astype(float)
        for start in [*range(0, count - _BLOCK + 1, _BLOCK), *([count - _BLOCK] if count % _BLOCK else [])]:
            block = values[start : start + _BLOCK]
            if start % _BLOCK:  # the last ones are drawn again
                block[:] = self.uniform((_BLOCK,))
            block[:] = _normal_pairs(block[:8], block[8:]).reshape(-1)
        return values

    def first_of_shuffled(self, total: int, count: int) -> Array:
        """``torch.randperm(total)[:count]``, int64, in memory of `count`.

        Of less than 214,748,364 things torch puts one after the other in its place, so that the first ones are known
        first. Of more it puts each in the place of one before it, and all have to be drawn.
        """
        return self._shuffled_forwards(total, count) if total < _MANY else self._shuffled_inside_out(total, count)

    def _shuffled_forwards(self, total: int, count: int) -> Array:
        import numpy

        steps = min(count, total - 1)
        moved: dict[int, int] = {}  # what stands at a place, where that is not the place's own number
        shuffled = []
        for place, word in enumerate(self._drawn(steps).tolist()):
            chosen = place + word % (total - place)
            shuffled.append(moved.get(chosen, chosen))
            moved[chosen] = moved.get(place, place)
        if count > steps:  # the last one has no choice left
            shuffled.append(moved.get(total - 1, total - 1))
        return numpy.asarray(shuffled, numpy.int64)

    def _shuffled_inside_out(self, total: int, count: int) -> Array:
        import numpy

        shuffled = numpy.arange(count, dtype=numpy.int64)
        for start in range(0, total, _CHUNK):
            numbers = numpy.arange(start, min(start + _CHUNK, total), dtype=numpy.uint64)
            words = self._drawn(2 * len(numbers)).reshape(-1, 2).astype(numpy.uint64)
            places = (words[:, 0] << numpy.uint64(32) | words[:, 1]) % (numbers + numpy.uint64(1))
            begin = max(0, min(count - start, len(numbers)))
            for number, place in zip(range(start, start + begin), places[:begin].tolist(), strict=True):
                shuffled[number] = shuffled[place]
                shuffled[place] = number
            late = begin + numpy.flatnonzero(places[begin:] < count)
            shuffled[places[late].astype(numpy.int64)] = numbers[late].astype(numpy.int64)  # of several the last
        return shuffled


def _normal_pairs(share: Array, turn: Array) -> Array:
    """Two normal numbers of two uniform ones: ``(2, n)``."""
    import numpy

    radius, angle = numpy.sqrt(-2 * numpy.log1p(-share)), 2 * math.pi * turn
    return numpy.stack([radius * numpy.cos(angle), radius * numpy.sin(angle)])
