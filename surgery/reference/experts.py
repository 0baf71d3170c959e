# SPDX-License-Identifier: Apache-2.0
"""The transformation of each token by itself: one network, or the mixture of those that its router chooses."""

from __future__ import annotations

import math

import torch

from surgery.reference.primitives import Load, activate, project, xielu
from surgery.reference.stored import stored
from surgery_formats.models.families.recipe import MLP, Experts

__all__ = ["transform"]


def transform(values: torch.Tensor, record: MLP | Experts, load: Load) -> torch.Tensor:
    """``(B, S, D)`` to ``(B, S, D)``."""
    return _mlp(values, record, load) if isinstance(record, MLP) else _mixture(values, record, load)


def _mlp(values: torch.Tensor, mlp: MLP, load: Load) -> torch.Tensor:
    projected = [project(values, projection, load) for projection in mlp.inputs]
    if mlp.activation == "xielu":
        return project(xielu(projected[0], mlp.shape, load), mlp.output, load)
    if not mlp.gated:
        return project(_input_of(mlp, activate(projected[0], mlp.activation)), mlp.output, load)
    if len(projected) == 1:
        both = projected[0]
        projected = [both[..., ::2], both[..., 1::2]] if mlp.interleaved else list(both.chunk(2, dim=-1))
    gate, up = projected[::-1] if mlp.gate_last else projected
    if mlp.limit is not None:
        gate, up = gate.clamp(max=mlp.limit), up.clamp(-mlp.limit, mlp.limit)
    if mlp.sparsity:
        gate = _sparse(gate, mlp.sparsity)
    return project(_input_of(mlp, activate(gate, mlp.activation) * (up + mlp.up_plus)), mlp.output, load)


def _sparse(gate: torch.Tensor, share: float) -> torch.Tensor:
    """What each token's values have above the quantile of a normal distribution of their mean and deviation; else 0."""
    quantile = math.sqrt(2) * torch.erfinv(torch.tensor(2 * share - 1, dtype=torch.float64))
    mean = gate.mean(-1, keepdim=True)
    deviation = (gate - mean).square().mean(-1, keepdim=True).sqrt()
    return (gate - mean - deviation * quantile.to(gate.dtype)).clamp(min=0)


def _input_of(mlp: MLP, values: torch.Tensor) -> torch.Tensor:
    return stored(values, f"the input of {mlp.output.weight}")


def _mixture(values: torch.Tensor, record: Experts, load: Load) -> torch.Tensor:
    """One expert after the other, each for the tokens that chose it."""
    rows = values.reshape(-1, values.shape[-1])
    weights = _weights(rows, record, load)
    kept: dict[str, torch.Tensor] = {}

    def load_stack(name: str) -> torch.Tensor:
        if name not in kept:
            kept[name] = load(name)
        return kept[name]

    result = torch.zeros_like(rows)
    for number, expert in enumerate(record.experts):
        tokens = weights[:, number].nonzero()[:, 0]
        if len(tokens):
            done = _mlp(rows[tokens], expert, load_stack if expert.output.stack else load)
            result[tokens] += done * weights[tokens, number, None]
    if record.shared is not None:
        shared = _mlp(rows, record.shared, load)
        if record.shared_gate is not None:
            shared = shared * torch.sigmoid(project(rows, record.shared_gate, load))
        result = result + shared
    return result.reshape(values.shape)


def _weights(rows: torch.Tensor, record: Experts, load: Load) -> torch.Tensor:
    """The weight of every expert for every token ``(N, experts)``, 0 of those not chosen."""
    logits = project(rows, record.router, load)
    scores = torch.sigmoid(logits) if record.scoring == "sigmoid" else torch.softmax(logits, -1)
    wanted = scores + load(record.correction).reshape(-1) if record.correction else scores
    if record.groups > record.best_groups:
        grouped = wanted.reshape(len(rows), record.groups, -1)
        ranked = grouped.sort(-1, descending=True).values
        strength = ranked[..., 0] if record.group_score == "best" else ranked[..., 0] + ranked[..., 1]
        least = strength.sort(-1, descending=True).values[:, record.best_groups - 1, None]
        wanted = torch.where((strength >= least)[..., None], grouped, -torch.inf).reshape(len(rows), -1)
    chosen = torch.zeros_like(scores).scatter(-1, wanted.topk(record.top, dim=-1).indices, 1.0)
    weights = scores * chosen
    if record.normalised:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=record.floor)
    return weights * record.scale
