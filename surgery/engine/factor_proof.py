# SPDX-License-Identifier: Apache-2.0
"""Two updates of one kind, compared by their factors: no delta is formed, and no base is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from surgery_formats.adapters.format import Rendering
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import ProofError
from surgery_formats.linalg.factored import factored_norm, relative_error
from surgery_formats.updates import DoRA, Factor, LoRA, Offset, Replacement, Seed, Stacked, TokenRows, Update

__all__ = ["approximation_errors", "distance", "settings", "tensor_error"]


def settings(update: Update) -> dict[str, Any]:
    """Everything but the trained numbers: scales, sizes, switches, and the shapes of factors."""
    found: dict[str, Any] = {"kind": update.kind}
    for field in fields(update):  # type: ignore[arg-type]
        value = getattr(update, field.name)
        if isinstance(value, Factor):
            found[field.name] = value.shape
        elif value is None or isinstance(value, bool | int | float | str | Seed):
            found[field.name] = value
    return found


def tensor_error(update: Update, other: Update) -> float:
    """The greatest difference of their stored tensors, relative to the greatest value of each; infinite if shapes differ."""
    worst = 0.0
    if len(update.tensors) != len(other.tensors):
        return math.inf
    for mine, theirs in zip(update.tensors, other.tensors, strict=True):
        if mine.shape != theirs.shape:
            return math.inf
        left, right = mine.read().to(torch.float64), theirs.read().to(torch.float64)
        size, difference = float(left.abs().max()), float((right - left).abs().max())
        worst = max(worst, math.inf if math.isnan(difference) else difference / size if size else difference)
    return worst


def approximation_errors(rendering: Rendering, written: Adapter, tolerance: float) -> dict[Site, float]:
    """``||delta - written|| / ||delta||`` of every site that a writer approximated; of several updates, the worst.

    Args:
        rendering: What was meant, with the errors that its writer states.
        written: As read back; it has the source's sites.
        tolerance: What rounding may add to the stated error.

    Raises:
        ProofError: an update is missing, of another kind, or further away than stated.
    """
    errors: dict[Site, float] = {}
    for site, stated in rendering.stated.items():
        chain, twins = rendering.held[site], written.updates.get(site, ())
        if [update.kind for update in chain] != [update.kind for update in twins]:
            raise ProofError(
                "the written update is of a different kind than the source's", file=written.path, tensor=str(site)
            )
        for update, twin, allowed in zip(chain, twins, stated(), strict=True):
            error = distance(update, twin)
            if not error <= allowed * (1 + tolerance) + tolerance:
                raise ProofError(
                    f"differs from the source by {error:.2e} of its change, its writer stated {allowed:.2e}",
                    file=written.path.name,
                    tensor=str(site),
                )
            errors[site] = max(errors.get(site, 0.0), error)
    return errors


def distance(update: Update, twin: Update) -> float:
    """``||delta - delta'|| / ||delta||`` of two updates of one kind, by their factors; infinite where anything else is not equal."""
    if type(update) is not type(twin) or update.shape != twin.shape:
        return math.inf
    if isinstance(update, LoRA) and isinstance(twin, LoRA):
        return relative_error(_factors(update), _factors(twin))
    if isinstance(update, DoRA) and isinstance(twin, DoRA):
        same = update.per_row == twin.per_row and _equal(update.magnitude, twin.magnitude)
        return distance(update.direction, twin.direction) if same else math.inf
    if isinstance(update, Stacked) and isinstance(twin, Stacked):
        if len(update.if_transposed) != len(twin.if_transposed):
            return math.inf
        return max(_of_experts(update.experts, twin.experts), _of_experts(update.if_transposed, twin.if_transposed))
    if isinstance(update, TokenRows) and isinstance(twin, TokenRows):
        same = (update.indices, update.vocabulary) == (twin.indices, twin.vocabulary)
        return 0.0 if same and _equal(update.value, twin.value) else math.inf
    if isinstance(update, Offset) and isinstance(twin, Offset):
        return 0.0 if update.scale == twin.scale and _equal(update.value, twin.value) else math.inf
    if isinstance(update, Replacement) and isinstance(twin, Replacement):
        alike = update.stored.shape == twin.stored.shape and update.stored.dtype is twin.stored.dtype
        return 0.0 if alike and torch.equal(update.stored.read(), twin.stored.read()) else math.inf
    return math.inf


def _of_experts(experts: Sequence[LoRA], twins: Sequence[LoRA]) -> float:
    """All experts together."""
    if len(experts) != len(twins):
        return math.inf
    norms = [factored_norm(*_factors(expert)) for expert in experts]
    errors = [distance(expert, twin) for expert, twin in zip(experts, twins, strict=True)]
    lost = [error * norm if norm else error for error, norm in zip(errors, norms, strict=True)]
    whole = math.hypot(*norms)
    return math.hypot(*lost) / whole if whole else max(lost, default=0.0)


def _factors(lora: LoRA) -> tuple[torch.Tensor, torch.Tensor]:
    return lora.B.load(torch.float64) * lora.scale, lora.A.load(torch.float64)


def _equal(factor: Factor, twin: Factor) -> bool:
    return torch.equal(factor.load(torch.float64), twin.load(torch.float64))
