# SPDX-License-Identifier: Apache-2.0
"""Modules that adapters insert, written from the papers and the library's own forward."""

from __future__ import annotations

import torch

from surgery.reference.primitives import Load, activate, normalise, project
from surgery_formats.models.families.recipe import Activation, Bottleneck, Branch, Coupling, Projection

__all__ = ["couple", "run_inserted", "uncouple"]


def run_inserted(
    values: torch.Tensor, body: torch.Tensor, real: torch.Tensor, branch: Branch, load: Load
) -> torch.Tensor:
    """The result of a branch with inserted networks, of its input `values` and its body's result `body`, ``(B, S, D)``.

    `real`, ``(B, S)``, tells which tokens are no padding.
    """
    state = body
    for network in branch.inserted:
        read, residual = state, state
        if network.form.parallel:
            read = values
        elif network.form.sums_before:
            read = normalise(state + values, branch.on_sum, load)
            residual = {"body": state, "sum": state + values, "read": read}[network.form.residual]
        state = _bottleneck(network, read, residual, real, load)
    last = branch.inserted[-1].form
    if last.parallel:
        state = state + body
    return normalise(state + values, branch.on_sum, load) if last.finishes else state


def _bottleneck(
    network: Bottleneck, read: torch.Tensor, residual: torch.Tensor, real: torch.Tensor, load: Load
) -> torch.Tensor:
    form = network.form
    result = _inner(normalise(read, network.before, load), (network.down, network.up), form.activation, load)
    if network.gate is not None:  # one number for each row of the batch, as if it had no padding
        tokens = real[..., None].to(read.dtype)
        share = torch.sigmoid(project(read, network.gate, load)) * tokens
        result = result * (share.sum(1, keepdim=True) / tokens.sum(1, keepdim=True))
    if form.parallel:
        return normalise(result, network.after, load)
    if form.residual_before_norm:
        return normalise(result + residual, network.after, load)
    return normalise(result, network.after, load) + residual


def _inner(
    values: torch.Tensor, pair: tuple[Projection, Projection], activation: Activation, load: Load
) -> torch.Tensor:
    return project(activate(project(values, pair[0], load), activation), pair[1], load)


def couple(values: torch.Tensor, network: Coupling, load: Load) -> torch.Tensor:
    """The forward of an invertible network."""
    first, second = values[..., : network.width // 2], values[..., network.width // 2 :]
    first = first + _inner(second, network.first, network.activation, load)
    second = second + _inner(first, network.second, network.activation, load)
    return torch.cat((first, second), dim=-1)


def uncouple(values: torch.Tensor, network: Coupling, load: Load) -> torch.Tensor:
    """Its inverse."""
    first, second = values[..., : network.width // 2], values[..., network.width // 2 :]
    second = second - _inner(first, network.second, network.activation, load)
    first = first - _inner(second, network.first, network.activation, load)
    return torch.cat((first, second), dim=-1)
