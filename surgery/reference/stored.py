# SPDX-License-Identifier: Apache-2.0
"""What a graph stores between its operators: how large it gets, and what is left of it in a type of 16 bits.

Operators compute inside in float32 and store their results, and read their weights, in the graph's type. onnxruntime's CPU provider
runs graphs of float16 in float32 from end to end, so that what overflows on a GPU stays finite there: it is found here instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ["LARGEST_HALF", "Stored", "stored", "watched"]

LARGEST_HALF = 65504.0
"""The greatest number of float16."""


class Stored:
    """What was seen of stored values.

    Attributes:
        largest: The greatest magnitude that was finite, before rounding.
        where: The weight, norm or sum it came from.
        beyond: The first of them with a value that is not finite, or the empty string.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.largest, self.where, self.beyond = 0.0, "", ""
        self._dtype = dtype

    def of(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """`values` as they are stored."""
        rounded = values if self._dtype is None else values.to(self._dtype).to(values.dtype)
        if values.numel():
            peak = float(values.abs().max())  # NaN if any is
            if self.largest < peak < torch.inf:
                self.largest, self.where = peak, name
            if not self.beyond and not bool(torch.isfinite(rounded).all()):
                self.beyond = name
        return rounded


_watching: ContextVar[Stored | None] = ContextVar("watching", default=None)


@contextmanager
def watched(dtype: torch.dtype | None = None) -> Iterator[Stored]:
    """Inside, what the reference computes is seen, and rounded to `dtype` where a graph of that type would store it."""
    seen = Stored(dtype)
    token = _watching.set(seen)
    try:
        yield seen
    finally:
        _watching.reset(token)


def stored(values: torch.Tensor, name: str) -> torch.Tensor:
    """`values` that a graph stores, the result of what `name` says."""
    seen = _watching.get()
    return values if seen is None else seen.of(values, name)
