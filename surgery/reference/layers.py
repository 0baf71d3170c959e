# SPDX-License-Identifier: Apache-2.0
"""One layer: attention, MLP, and the norms around them."""

from __future__ import annotations

import torch

from surgery.reference.attention import Mask, attend
from surgery.reference.primitives import Load, activate, normalise, project
from surgery_formats.models.families.recipe import MLP, Branch, Layer

__all__ = ["run_layer"]


def _mlp(values: torch.Tensor, mlp: MLP, load: Load) -> torch.Tensor:
    made = [project(values, one, load) for one in mlp.inputs]
    if mlp.gated and len(made) == 1:
        made = list(made[0].chunk(2, dim=-1))
    inner = activate(made[0], mlp.activation) * made[1] if mlp.gated else activate(made[0], mlp.activation)
    return project(inner, mlp.output, load)


def _joined(values: torch.Tensor, made: torch.Tensor, branch: Branch, load: Load) -> torch.Tensor:
    made = normalise(made, branch.after, load) * branch.multiplier
    return normalise(values + made, branch.on_sum, load)


def run_layer(
    values: torch.Tensor,
    layer: Layer,
    load: Load,
    mask: Mask,
    past: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One layer.

    Args:
        values: ``(B, S, D)``.
        layer: Its record.
        load: Gives its weights.
        mask: Who sees whom, and where everybody is.
        past: Keys and values ``(B, kv_heads, P, head_dim)`` of earlier tokens, or None.

    Returns:
        ``(B, S, D)``, and keys and values of all tokens so far.
    """
    own, other = layer.attention_branch, layer.mlp_branch
    read = normalise(values, own.before, load)
    attended, cache = attend(read, layer.attention, load, mask, past)
    if layer.parallel:
        beside = read if other == Branch() else normalise(values, other.before, load)
        added = normalise(_mlp(beside, layer.mlp, load), other.after, load) * other.multiplier
        return _joined(values, attended, own, load) + added, cache
    values = _joined(values, attended, own, load)
    made = _mlp(normalise(values, other.before, load), layer.mlp, load)
    return _joined(values, made, other, load), cache
