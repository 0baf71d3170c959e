# SPDX-License-Identifier: Apache-2.0
"""What every kind of update offers, and the factors it is made of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.apply import Apply
from surgery_formats.tensors.tensor import StoredTensor, Tensor, all_finite
from surgery_formats.tensors.views import Index

if TYPE_CHECKING:
    import torch

    from surgery_formats.updates.lora import LoRA

    View = Callable[..., torch.Tensor]

__all__ = ["Apply", "Effect", "Factor", "Fit", "Linear", "Mixing", "Unsized", "Update", "Weight"]

Effect = Literal["adds", "sets", "maps"]
"""What an update does to a weight ``W``.

``adds``
    ``W' = W + delta``, and delta is the same whatever ``W`` is. Such updates commute with each other, can be scaled and summed
    without a base, and satisfy `Linear`.
``sets``
    Some elements get new values and the others stay, whatever ``W`` is.
``maps``
    The result depends on ``W``: without the base nobody knows how large the change is.
"""


@dataclass(frozen=True, slots=True)
class Factor:
    """A trained matrix or vector, read when it is needed.

    Attributes:
        tensors: The stored tensors it is made of.
        shape: As the equation of its update wants it.
        view: From the stored values (float32 or float64) to the factor; None if they are the factor.
        terms: What the factor was computed from, if a format stores that instead (the two sides of a product, a core and a side).
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

        def view(*stored: torch.Tensor) -> torch.Tensor:
            ends = list(accumulate(counts))
            values = (term.show(stored[end - n : end]) for term, n, end in zip(terms, counts, ends, strict=True))
            return equation(*values)

        return cls(tuple(tensor for term in terms for tensor in term.tensors), shape, view, tuple(terms))

    def show(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """The factor, given the values of `tensors`."""
        return (stored[0] if self.view is None else self.view(*stored)).reshape(self.shape)

    def load(self, dtype: torch.dtype | None, device: str = "cpu") -> torch.Tensor:
        """The values in `dtype` (None keeps the type they are read in), of `shape`, on `device`.

        Raises:
            FitError: a value is not finite, or the stored type is not floating point.
        """
        if self.view is None:
            return _read(self.tensors[0], dtype).reshape(self.shape).to(device)
        values = self.view(*(_read_shared(tensor, dtype) for tensor in self.tensors))
        return values.reshape(self.shape).clone().to(device)


def _read(tensor: Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """All values of a trained tensor, checked."""
    if not tensor.dtype.is_float and tensor.dtype not in (DType.F8_E4M3, DType.F8_E5M2):
        raise FitError(f"trained values of type {tensor.dtype.label}", file=tensor.path, tensor=tensor.name)
    values = tensor.read() if dtype is None else tensor.read().to(dtype)
    if not all_finite(values):
        raise FitError("holds NaN or Inf", file=tensor.path, tensor=tensor.name, hint="train it again")
    return values


def _read_shared(tensor: Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """As `_read`, remembering this thread's last two: the experts of a stack are parts of the same two tensors."""
    place = (tensor.file.identity, tensor.offset, tensor.nbytes) if isinstance(tensor, StoredTensor) else tensor
    key = (place, dtype)
    kept: dict[object, torch.Tensor] = getattr(_recent, "values", {})
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
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> str: ...

    def blocks(self) -> Iterator[tuple[torch.Tensor, Index, Index]]:
        """``(block, rows, cols)`` in storage order, covering every element once, in memory bounded by the block size."""


class Update(Protocol):
    """What was trained for one weight (or bias) of a base. Implementations are frozen dataclasses.

    Verbs, writers and reports ask an update about itself through these members, and know no list of kinds.

    Attributes:
        kind: Name in the field: ``LoRA``, ``DoRA`` ...
        shape: Logical ``(out, in)`` of the weight it fits; ``(n, 1)`` for a bias. 0 is a size that its file does not tell (`Unsized`).
        tensors: Every stored tensor it consumes.
        untrained: Those of `tensors` that hold no trained values: alphas, random projections.
        needs_weight: Whether `prepare` looks at the weight, so that the weight is read twice.
        effect: Whether it adds to a weight, sets values of it, or maps it.
        rank: Inner size of its low-rank product; None for a kind without one.
        alpha: As written in its file; None where the format or the kind has none.
        scale: Number on what it adds; None for a kind without one.
    """

    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def tensors(self) -> tuple[Tensor, ...]: ...
    @property
    def untrained(self) -> tuple[Tensor, ...]: ...
    @property
    def needs_weight(self) -> bool: ...
    @property
    def effect(self) -> Effect: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def alpha(self) -> float | None: ...
    @property
    def scale(self) -> float | None: ...

    def factors(self) -> Mapping[str, Factor]:
        """Everything its equation takes from its file, by the names of the equation: ``A``, ``B``, ``magnitude``."""

    def low_rank(self) -> LoRA | None:
        """The same update as one LoRA, exactly; None if there is none, or sizes are not known yet (`Unsized`).

        A stack of experts has none of its own: ask each of its `parts`.
        """

    def parts(self) -> tuple[tuple[int, Update], ...]:
        """``(first logical row, update)`` of which this one is made: itself at row 0 unless it is stacked."""

    def prepare(self, weight: Weight) -> Apply:
        """Load the factors once and return the equation for blocks of `weight`."""


@runtime_checkable
class Linear(Update, Protocol):
    """An update that adds something: half of it is half as far."""

    def scaled(self, weight: float) -> Linear:
        """The update that moves a weight `weight` times as far."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What binding knows of the weight an update meets, and an adapter's file may not.

    Attributes:
        shape: Logical ``(out, in)``.
        kernel: Columns per input channel: the size of a convolution's kernel, else 1.
        widest: ``(out, in)``, each the greatest of all weights for which the adapter has an update of this kind.
    """

    shape: tuple[int, int]
    kernel: int = 1
    widest: tuple[int, int] = (0, 0)


@runtime_checkable
class Unsized(Update, Protocol):
    """An update whose file does not tell all sizes of its weight: a vector along one axis, one block for a whole diagonal."""

    def fitted(self, fit: Fit) -> Update:
        """The update with its sizes. Where they contradict the file's, `shape` says so and binding refuses.

        Raises:
            FitError: it cannot act on such a weight.
        """


@runtime_checkable
class Mixing(Update, Protocol):
    """An update that mixes columns in groups: `apply` is given whole groups, even where a weight is stored transposed.

    Attributes:
        group: Columns per group; groups begin at multiples of it.
    """

    @property
    def group(self) -> int: ...
