# SPDX-License-Identifier: Apache-2.0
"""Weights of the reference: from a checkpoint, or from a plan that has not been executed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch

from surgery.engine.arithmetic import compute
from surgery.engine.plan import Compute, Copy, Plan
from surgery_formats.arrays import as_torch, empty
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.models.names import Names
from surgery_formats.storage.base import Storage, read_rows
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.tensor import StoredTensor

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
    """Weights of a checkpoint; names of other versions are resolved by the family's renames."""

    def __init__(self, weights: Mapping[str, Storage], names: Names | None = None) -> None:
        self._weights = weights
        self._resolver = names

    @property
    def names(self) -> Collection[str]:
        return self._weights.keys()

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        weight = self._weights.get(name)
        if weight is None and self._resolver is not None and len(slices := self._resolver.resolve(name)) == 1:
            weight = self._weights.get(slices[0].parameter.name)
        if weight is None:
            raise FitError("the model needs a tensor that the checkpoint lacks", tensor=name)
        if not weight.is_float:
            raise FitError(f"weights of type {weight.kind} cannot be read without scales", tensor=name)
        return as_torch(read_rows(weight, start, stop))


class _PlannedWeights:
    """Weights of a plan: copied ones from the base, computed ones from the updates, rounded as stored."""

    def __init__(self, plan: Plan, component: str) -> None:
        self._steps = {tensor.weight: tensor.step for tensor in plan.weights if tensor.component == component}
        self._last: tuple[str, torch.Tensor] | None = None

    @property
    def names(self) -> Collection[str]:
        return self._steps.keys()

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if (step := self._steps.get(name)) is None:
            raise FitError("the model needs a tensor that the plan lacks", tensor=name)
        if isinstance(step, Copy):
            return _StoredWeights({name: step.weight}).load(name, start, stop)
        if self._last is None or self._last[0] != name:
            self._last = (name, _computed(name, step))
        return self._last[1][start:stop].clone()


def _computed(name: str, step: Compute) -> torch.Tensor:
    values = empty(step.target.shape, step.target.dtype)
    compute(name, step, lambda *_: None, lambda: False, values=values)
    return as_torch(values.reshape(step.target.sizes))


def stored_weights(component: Component) -> ReferenceWeights:
    """The weights of a checkpoint's network by value.

    Raises:
        FitError: codes in a format that is not read.
    """
    component.check_read()
    return _StoredWeights({name: weight.storage for name, weight in component.parameters.items()}, component.names)


def tensor_weights(tensors: Mapping[str, StoredTensor], names: Names) -> ReferenceWeights:
    """Tensors of any origin, under the names that `names` resolves."""
    return _StoredWeights({name: Plain.of(tensor) for name, tensor in tensors.items()}, names)


def planned_weights(plan: Plan, component: str = "") -> ReferenceWeights:
    """The weights that `plan` would write for one network, including its rounding."""
    return _PlannedWeights(plan, component)
