# SPDX-License-Identifier: Apache-2.0
"""Weights of the reference: from a checkpoint, or from a plan that has not been executed."""

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
    """Named tensors, read on demand."""

    @property
    def names(self) -> Collection[str]:
        """All names."""
        ...

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Load rows ``[start, stop)`` in the stored type, into new memory.

        Raises:
            FitError: there is no such tensor.
        """
        ...


class _StoredWeights:
    """Tensors of a checkpoint; names of other versions are resolved by the family's renames."""

    def __init__(self, tensors: Mapping[str, StoredTensor], names: Names | None = None) -> None:
        self._tensors = tensors
        self._resolver = names

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        tensor = self._tensors.get(name)
        if tensor is None and self._resolver is not None and len(slices := self._resolver.resolve(name)) == 1:
            tensor = self._tensors.get(slices[0].parameter.name)
        if tensor is None:
            raise FitError("the model needs a tensor that the checkpoint lacks", tensor=name)
        if not tensor.dtype.is_float:
            raise FitError(f"weights of type {tensor.dtype.label} cannot be read without scales", tensor=name)
        return tensor.read(start, stop)


class _PlannedWeights:
    """Tensors of a plan: copied ones from their source, computed ones from the updates, rounded as stored."""

    def __init__(self, tensors: Mapping[str, PlannedTensor]) -> None:
        self._tensors = tensors
        self._last: tuple[str, torch.Tensor] | None = None

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if (tensor := self._tensors.get(name)) is None:
            raise FitError("the model needs a tensor that the plan lacks", tensor=name)
        if isinstance(tensor.step, Copy):
            return _StoredWeights({name: tensor.step.source}).load(name, start, stop)
        if self._last is None or self._last[0] != name:
            self._last = (name, _computed(tensor))
        return self._last[1][start:stop].clone()


def _computed(tensor: PlannedTensor) -> torch.Tensor:
    raw = bytearray(tensor.nbytes)

    def write(offset: int, block: memoryview) -> None:
        raw[offset : offset + len(block)] = block

    compute(tensor, write, lambda: False)
    return torch.frombuffer(raw, dtype=tensor.dtype.torch).reshape(tensor.shape)


def stored_weights(component: Component) -> ReferenceWeights:
    """The weights of a checkpoint's network as stored."""
    return _StoredWeights(component.tensors, component.names)


def tensor_weights(tensors: Mapping[str, StoredTensor], names: Names) -> ReferenceWeights:
    """Weights of any origin, under the names that `names` resolves."""
    return _StoredWeights(tensors, names)


def planned_weights(plan: Plan, component: str = "") -> ReferenceWeights:
    """The weights that `plan` would write for one network, including its rounding."""
    return _PlannedWeights({tensor.name: tensor for tensor in plan.tensors if tensor.component == component})
