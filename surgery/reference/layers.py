# SPDX-License-Identifier: Apache-2.0
"""One layer: attention, MLP, and the norms around them."""

from __future__ import annotations

import torch

from surgery.reference.attention import Mask, attend
from surgery.reference.primitives import Load, activate, normalise, project
from surgery_formats.models.families.recipe import MLP, Branch, Layer

__all__ = ["run_layer"]


def _mlp(values: torch.Tensor, mlp: MLP, load: Load) -> torch.Tensor:
    projected = [project(values, projection, load) for projection in mlp.inputs]
    if mlp.gated and len(projected) == 1:
        projected = list(projected[0].chunk(2, dim=-1))
    inner = (
        activate(projected[0], mlp.activation) * projected[1] if mlp.gated else activate(projected[0], mlp.activation)
    )
    return project(inner, mlp.output, load)


def _residual(values: torch.Tensor, added: torch.Tensor, branch: Branch, load: Load) -> torch.Tensor:
    added = normalise(added, branch.after, load) * branch.multiplier
    return normalise(values + added, branch.on_sum, load)


def run_layer(
    values: torch.Tensor,
    layer: Layer,
    load: Load,
    mask: Mask,
    past: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One layer of `values`, ``(B, S, D)``, and keys and values of all tokens so far.

    `past` are those of earlier tokens, ``(B, kv_heads, P, head_dim)``.
    """
    first, second = layer.attention_branch, layer.mlp_branch
    normed = normalise(values, first.before, load)
    attended, cache = attend(normed, layer.attention, load, mask, past)
    if layer.parallel:
        mlp_input = normed if second == Branch() else normalise(values, second.before, load)
        added = normalise(_mlp(mlp_input, layer.mlp, load), second.after, load) * second.multiplier
        return _residual(values, attended, first, load) + added, cache
    values = _residual(values, attended, first, load)
    transformed = _mlp(normalise(values, second.before, load), layer.mlp, load)
    return _residual(values, transformed, second, load), cache
