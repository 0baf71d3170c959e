# SPDX-License-Identifier: Apache-2.0
"""Where the reference takes its weights from: a checkpoint, or the plan of an operation that was not (or need not be) carried out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Protocol

import torch

from surgery.engine.arithmetic import compute
from surgery.engine.plan import Copy, Plan, PlannedTensor
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import StoredTensor

if TYPE_CHECKING:
    from surgery_formats.models.checkpoint import Component
    from surgery_formats.models.names import Names

__all__ = ["ReferenceWeights", "planned_weights", "stored_weights", "tensor_weights"]


class ReferenceWeights(Protocol):
    """Named tensors, read when asked for."""

    @property
    def names(self) -> Collection[str]:
        """Every name there is."""
        ...

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``[start, stop)`` in the stored type, in memory of the caller's own.

        Raises:
            FitError: no tensor of that name.
        """
        ...


class _FromCheckpoint:
    """Tensors of a checkpoint; those of another era are found by the family's renames."""

    def __init__(self, tensors: Mapping[str, StoredTensor], names: Names | None = None) -> None:
        self._tensors = tensors
        self._resolver = names

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        found = self._tensors.get(name)
        if found is None and self._resolver is not None and len(places := self._resolver.resolve(name)) == 1:
            found = self._tensors.get(places[0].parameter.name)
        if found is None:
            raise FitError("the model needs a tensor that the checkpoint does not have", tensor=name)
        if not found.dtype.is_float:
            raise FitError(f"weights of type {found.dtype.label} need scales to be read", tensor=name)
        return found.read(start, stop)


class _Planned:
    """Tensors of a plan: copied ones from their source, computed ones by the updates, as they would be stored."""

    def __init__(self, tensors: Mapping[str, PlannedTensor]) -> None:
        self._tensors = tensors
        self._last: tuple[str, torch.Tensor] | None = None

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if (found := self._tensors.get(name)) is None:
            raise FitError("the model needs a tensor that the plan does not have", tensor=name)
        if isinstance(found.step, Copy):
            return _FromCheckpoint({name: found.step.source}).load(name, start, stop)
        if self._last is None or self._last[0] != name:
            self._last = (name, _computed(found))
        return self._last[1][start:stop].clone()


def _computed(tensor: PlannedTensor) -> torch.Tensor:
    raw = bytearray(tensor.nbytes)

    def write(offset: int, part: memoryview) -> None:
        raw[offset : offset + len(part)] = part

    compute(tensor, write, lambda: False)
    return torch.frombuffer(raw, dtype=tensor.dtype.torch).reshape(tensor.shape)


def stored_weights(component: Component) -> ReferenceWeights:
    """The weights of a checkpoint's network as they are."""
    return _FromCheckpoint(component.tensors, component.names)


def tensor_weights(tensors: Mapping[str, StoredTensor], names: Names) -> ReferenceWeights:
    """Weights of any origin, under the names that `names` resolves."""
    return _FromCheckpoint(tensors, names)


def planned_weights(plan: Plan, component: str = "") -> ReferenceWeights:
    """The weights that `plan` would write for one network, rounded as it would round them."""
    return _Planned({tensor.name: tensor for tensor in plan.tensors if tensor.component == component})
