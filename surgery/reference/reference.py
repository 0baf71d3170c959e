# SPDX-License-Identifier: Apache-2.0
"""A model to compute: its recipe, its weights, and the precision of the arithmetic."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from surgery.engine.plan import Plan
from surgery.reference.stored import stored
from surgery.reference.weights import ReferenceWeights, planned_weights, stored_weights
from surgery_formats.models.component import Component
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.families.recipe import Model

__all__ = ["Reference", "open_reference"]


@dataclass(frozen=True)
class Reference:
    """A model to compute.

    Attributes:
        model: Its recipe.
        weights: Its tensors.
        dtype: Precision of the arithmetic: float32 or float64.
    """

    model: Model
    weights: ReferenceWeights
    dtype: torch.dtype = torch.float32

    def load(self, name: str) -> torch.Tensor:
        """Load a whole tensor in the reference's precision; exact for all stored types."""
        return stored(self.weights.load(name).to(self.dtype), name)


def open_reference(
    component: Component, plan: Plan | None = None, dtype: torch.dtype = torch.float32, task: str = ""
) -> Reference:
    """Open the reference of a checkpoint's network, or of the network that `plan` would write.

    `task` is what the model is used for; by default what it was saved for.

    Raises:
        FitError: no recipe for the model.
    """
    if plan is None:
        weights = stored_weights(component)
        return Reference(model_of(component.config, weights.names, task), weights, dtype)
    weights = planned_weights(plan, component.name)
    name = f"{component.name}/config.json" if component.name else "config.json"
    rewritten = next((file.data for file in plan.side_files if file.name == name and file.data), b"")
    config = json.loads(rewritten) if rewritten else component.config
    return Reference(model_of(config, weights.names, task), weights, dtype)
