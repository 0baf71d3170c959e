# SPDX-License-Identifier: Apache-2.0
"""The proof of what a format only approximates: read back, every update is as far from its source as the writer says, and no further."""

from __future__ import annotations

import math

import torch

from surgery_formats.adapters.format import Rendering
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import ProofError
from surgery_formats.linalg.factored import factored_norm, relative_error
from surgery_formats.updates import DoRA, Factor, LoRA, Offset, Replacement, Stacked, TokenRows, Update

__all__ = ["distance", "measured"]


def measured(rendering: Rendering, written: Adapter, tolerance: float) -> dict[Site, float]:
    """``||delta - written|| / ||delta||`` of every site that the writer approximated; of several updates, the worst.

    Args:
        rendering: What was meant.
        written: As read back; it has the source's sites.
        tolerance: What rounding may add to the error that was stated.

    Raises:
        ProofError: an update is missing, of another kind, or further away than stated.
    """
    found: dict[Site, float] = {}
    for site, stated in rendering.stated.items():
        chain, other = rendering.held[site], written.updates.get(site, ())
        if [update.kind for update in chain] != [update.kind for update in other]:
            raise ProofError("is changed in another way than by the source", file=written.path, tensor=str(site))
        for update, twin, error in zip(chain, other, stated(), strict=True):
            apart = distance(update, twin)
            if not apart <= error * (1 + tolerance) + tolerance:
                raise ProofError(
                    f"is {apart:.2e} of its change away from the source; {error:.2e} was meant",
                    file=written.path.name,
                    tensor=str(site),
                )
            found[site] = max(found.get(site, 0.0), apart)
    return found


def distance(one: Update, other: Update) -> float:
    """``||delta - delta'|| / ||delta||`` of two updates of one kind, by their factors; infinite where anything else is not equal."""
    if type(one) is not type(other) or one.shape != other.shape:
        return math.inf
    if isinstance(one, LoRA) and isinstance(other, LoRA):
        return relative_error(_factors(one), _factors(other))
    if isinstance(one, DoRA) and isinstance(other, DoRA):
        same = one.per_row == other.per_row and _equal(one.magnitude, other.magnitude)
        return distance(one.direction, other.direction) if same else math.inf
    if isinstance(one, Stacked) and isinstance(other, Stacked):
        if len(one.if_transposed) != len(other.if_transposed):
            return math.inf
        return max(_of_experts(one.experts, other.experts), _of_experts(one.if_transposed, other.if_transposed))
    if isinstance(one, TokenRows) and isinstance(other, TokenRows):
        same = (one.indices, one.vocabulary) == (other.indices, other.vocabulary)
        return 0.0 if same and _equal(one.value, other.value) else math.inf
    if isinstance(one, Offset) and isinstance(other, Offset):
        return 0.0 if one.scale == other.scale and _equal(one.value, other.value) else math.inf
    if isinstance(one, Replacement) and isinstance(other, Replacement):
        alike = one.stored.shape == other.stored.shape and one.stored.dtype is other.stored.dtype
        return 0.0 if alike and torch.equal(one.stored.read(), other.stored.read()) else math.inf
    return math.inf


def _of_experts(ones: tuple[LoRA, ...], others: tuple[LoRA, ...]) -> float:
    """All experts together."""
    if len(ones) != len(others):
        return math.inf
    norms = [factored_norm(*_factors(one)) for one in ones]
    errors = [distance(one, other) for one, other in zip(ones, others, strict=True)]
    lost = [error * norm if norm else error for error, norm in zip(errors, norms, strict=True)]
    whole = math.hypot(*norms)
    return math.hypot(*lost) / whole if whole else max(lost, default=0.0)


def _factors(lora: LoRA) -> tuple[torch.Tensor, torch.Tensor]:
    return lora.B.load(torch.float64) * lora.scale, lora.A.load(torch.float64)


def _equal(one: Factor, other: Factor) -> bool:
    return torch.equal(one.load(torch.float64), other.load(torch.float64))
