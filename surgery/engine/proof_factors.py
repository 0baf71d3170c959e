# SPDX-License-Identifier: Apache-2.0
"""Two updates of one kind, compared by what is stored: for kinds whose effect only a base could show."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from surgery_formats.updates import Factor, Seed, Update

__all__ = ["settings", "tensor_error"]


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


def tensor_error(one: Update, other: Update) -> float:
    """The greatest difference of their stored tensors, relative to the greatest value of each; infinite if shapes differ."""
    import torch

    worst = 0.0
    if len(one.tensors) != len(other.tensors):
        return math.inf
    for mine, theirs in zip(one.tensors, other.tensors, strict=True):
        if mine.shape != theirs.shape:
            return math.inf
        left, right = mine.read().to(torch.float64), theirs.read().to(torch.float64)
        size, difference = float(left.abs().max()), float((right - left).abs().max())
        worst = max(worst, math.inf if math.isnan(difference) else difference / size if size else difference)
    return worst
