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

_WIDE = (2**32 - 1) // 20
"""The number of things from which on torch shuffles them by words of 64 bits."""


class TorchDraws:
    """A generator that gives what ``torch.Generator("cpu").manual_seed(seed)`` would, in the same order."""

    def __init__(self, seed: int) -> None:
        import numpy

        self._words = numpy.random.RandomState(seed % 2**32)

    def _drawn(self, count: int) -> numpy.ndarray:
        import numpy

        return numpy.frombuffer(self._words.bytes(4 * count), "<u4")

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Array:
        """``torch.empty(shape).uniform_(low, high)``, float32: 24 bits of each word, rounded once."""
        import numpy

        first, last = numpy.float32(low), numpy.float32(high)
        drawn = self._drawn(math.prod(shape)) & 0xFFFFFF
        return (drawn * 2.0**-24 * float(last - first) + float(first)).astype(numpy.float32).reshape(shape)

    def first_of_shuffled(self, total: int, count: int) -> Array:
        """``torch.randperm(total)[:count]``, int64, in time and memory of `count`."""
        import numpy

        steps = min(count, total - 1)
        if total < _WIDE:
            drawn = self._drawn(steps).astype(numpy.uint64)
        else:
            high, low = self._drawn(2 * steps).astype(numpy.uint64).reshape(-1, 2).T
            drawn = (high << numpy.uint64(32)) | low
        moved: dict[int, int] = {}  # what stands at a place, where that is not the place's own number
        shuffled = []
        for place, word in enumerate(drawn.tolist()):
            chosen = place + word % (total - place)
            shuffled.append(moved.get(chosen, chosen))
            moved[chosen] = moved.get(place, place)
        if count > steps:  # the last one has no choice left
            shuffled.append(moved.get(total - 1, total - 1))
        return numpy.asarray(shuffled, numpy.int64)
