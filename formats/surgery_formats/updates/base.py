# SPDX-License-Identifier: Apache-2.0
"""Factors of updates, and the facts about a weight that updates receive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, Protocol

from surgery_formats.arrays import Array, all_finite, cast, namespace, to_device
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.storage.parameter import Parameter
from surgery_formats.tensors.apply import Apply
from surgery_formats.tensors.tensor import StoredTensor, Tensor
from surgery_formats.tensors.views import Index

View = Callable[..., Array]

__all__ = ["Apply", "Effect", "Factor", "Fit", "Weight"]

Effect = Literal["adds", "sets", "maps"]
"""What an update does to a weight ``W``.

``adds``
    ``W' = W + delta``, and delta is the same whatever ``W`` is. Such updates commute, can be scaled and summed without
    a base, and satisfy `Linear`.
``sets``
    Some elements get new values and the others stay, whatever ``W`` is.
``maps``
    The result depends on ``W``: the size of the change is unknown without the base.
"""


@dataclass(frozen=True, slots=True)
class Factor:
    """A trained matrix or vector, read when it is needed.

    Attributes:
        tensors: The stored tensors it is made of.
        shape: As the equation of its update wants it.
        view: From the stored values (float32 or float64) to the factor; None if they are the factor.
        terms: The factors it was computed from, if a format stores those (the two sides of a product, a core and a
            side).
    """

    tensors: tuple[Tensor, ...]
    shape: tuple[int, ...]
    view: View | None = None
    terms: tuple[Factor, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor) -> Factor:
        """A stored tensor as it is."""
        return cls((tensor,), tensor.shape)

    @classmethod
    def computed(cls, terms: Sequence[Factor], shape: tuple[int, ...], equation: View) -> Factor:
        """A factor that `equation` computes from the values of `terms`."""
        counts = [len(term.tensors) for term in terms]

        def view(*stored: Array) -> Array:
            ends = list(accumulate(counts))
            values = (term.show(stored[end - n : end]) for term, n, end in zip(terms, counts, ends, strict=True))
            return equation(*values)

        return cls(tuple(tensor for term in terms for tensor in term.tensors), shape, view, tuple(terms))

    def show(self, stored: Sequence[Array]) -> Array:
        """The factor, given the values of `tensors`."""
        return (stored[0] if self.view is None else self.view(*stored)).reshape(self.shape)

    def load(self, dtype: DType | None, device: str = "cpu") -> Array:
        """The values in `dtype` (None keeps the type they are read in), of `shape`, on `device`.

        Raises:
            FitError: a value is not finite, or the stored type is not floating point.
        """
        if self.view is None:
            return to_device(_read(self.tensors[0], dtype).reshape(self.shape), device)
        values = self.view(*(_read_shared(tensor, dtype) for tensor in self.tensors))
        return to_device(namespace(values).asarray(values.reshape(self.shape), copy=True), device)


def _read(tensor: Tensor, dtype: DType | None) -> Array:
    """All values of a trained tensor, checked."""
    if not tensor.dtype.is_float_or_fp8:
        raise FitError(f"trained values of type {tensor.dtype.label}", file=tensor.path, tensor=tensor.name)
    values = tensor.read() if dtype is None else cast(tensor.read(), dtype)
    if not all_finite(values):
        raise FitError("holds NaN or Inf", file=tensor.path, tensor=tensor.name, hint="train it again")
    return values


def _read_shared(tensor: Tensor, dtype: DType | None) -> Array:
    """As `_read`, remembering this thread's last two: the experts of a stack are parts of the same two tensors."""
    place = (tensor.file.identity, tensor.offset, tensor.nbytes) if isinstance(tensor, StoredTensor) else tensor
    key = (place, dtype)
    kept: dict[object, Array] = getattr(_recent, "values", {})
    if key not in kept:
        last = dict(list(kept.items())[-1:])
        _recent.values = kept = {**last, key: _read(tensor, dtype)}
    return kept[key]


_recent = threading.local()


class Weight(Protocol):
    """The weight an update acts on, for equations that look at it first.

    Attributes:
        shape: Logical ``(out, in)``.
        dtype: Precision of the arithmetic: float32, or float64.
        device: Where the arithmetic runs; factors go there.
    """

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def device(self) -> str: ...

    def blocks(self) -> Iterator[tuple[Array, Index, Index]]:
        """``(block, rows, cols)`` in storage order, every element once, in memory bounded by the block size.

        A block may be written into, and is good until the next.
        """


@dataclass(frozen=True, slots=True)
class Fit:
    """Facts about the weight of an update that the base has and the adapter's file may lack.

    Attributes:
        shape: Logical ``(out, in)``.
        kernel: Columns per input channel: the size of a convolution's kernel, else 1.
        convolution: Whether the weight is a convolution's, also of a kernel of 1.
        widest: ``(out, in)``, each the greatest of all weights for which the adapter has an update of this kind.
        beside: Of a bias, the weight of its layer where the base holds that in one piece.
        config: The base's config.json: it tells the heads.
    """

    shape: tuple[int, int]
    kernel: int = 1
    widest: tuple[int, int] = (0, 0)
    beside: Parameter | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    convolution: bool = False
