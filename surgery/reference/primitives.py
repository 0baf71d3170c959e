# SPDX-License-Identifier: Apache-2.0
"""Projections, norms and activations, on tensors in the precision of the reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from surgery.reference.stored import stored
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Activation, Norm, Projection, TimeConvolution

__all__ = ["Load", "activate", "convolve_time", "normalise", "project", "xielu"]

Load = Callable[[str], torch.Tensor]
"""Loads a whole tensor by name, in the precision of the reference."""


def project(values: torch.Tensor, projection: Projection, load: Load) -> torch.Tensor:
    """``x W^T + b``."""
    weight = load(projection.weight)
    bias = load(projection.bias) if projection.bias else None
    if projection.stack is not None:
        number, count = projection.stack
        if len(weight) != count or (bias is not None and len(bias) != count):
            raise FitError(f"the stack does not have {count} entries", tensor=projection.weight)
        weight, bias = weight[number], None if bias is None else bias[number]
    result = values @ (weight if projection.transposed else weight.T)
    return stored(result if bias is None else result + bias, f"the result of {projection.weight}")


def convolve_time(values: torch.Tensor, step: TimeConvolution, load: Load) -> torch.Tensor:
    """A convolution over time of ``(B, inputs, frames)``, window by window, then GELU."""
    padded = torch.nn.functional.pad(values, (1, 1))
    windows = padded.unfold(2, step.kernel, step.stride)
    result = torch.einsum("bifk,oik->bof", windows, load(step.weight)) + load(step.bias)[:, None]
    return activate(result, "gelu")


def normalise(values: torch.Tensor, norm: Norm | None, load: Load, heads: int = 0) -> torch.Tensor:
    """Apply `norm` over the last axis; `values` are ``(..., heads, dim)`` if every head has its own parameters."""
    if norm is None:
        return values
    if norm.kind == "layer":
        values = values - values.mean(-1, keepdim=True)
    values = values / torch.sqrt(values.square().mean(-1, keepdim=True) + norm.epsilon)
    if norm.weight:
        weight = _of_heads(norm.weight, heads, load)
        values = values * (1 + weight if norm.plus_one else weight)
    values = values + _of_heads(norm.bias, heads, load) if norm.bias else values
    return stored(values, f"the result of {norm.weight or norm.bias or 'a norm'}")


def _of_heads(name: str, heads: int, load: Load) -> torch.Tensor:
    """The parameter `name`, or ``(heads, dim)`` with one per head, from as many tensors or from a table."""
    if "{h}" not in name:
        return load(name)
    return torch.stack([load(name.format(h=head)) for head in range(heads)]) if heads else load(name)


def activate(values: torch.Tensor, kind: Activation | None) -> torch.Tensor:
    """Apply the activation function of a recipe; None leaves `values` unchanged."""
    if kind is None or kind == "linear":
        return values
    if kind == "silu":
        return values / (1 + torch.exp(-values))
    if kind == "relu":
        return values.clamp(min=0)
    if kind == "relu2":
        return values.clamp(min=0) ** 2
    if kind == "tanh":
        return torch.tanh(values)
    if kind == "sigmoid":
        return torch.sigmoid(values)
    if kind == "leaky_relu":
        return torch.where(values < 0, 0.01 * values, values)
    if kind == "quick_gelu":
        return values * torch.sigmoid(1.702 * values)
    if kind == "gelu":
        return values * (1 + torch.erf(values / math.sqrt(2))) / 2
    return values * (1 + torch.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3))) / 2


def xielu(values: torch.Tensor, module: str, load: Load) -> torch.Tensor:
    """The activation of arXiv:2411.13010, equation 8, with the numbers of `module`, each stored before its softplus."""
    alpha_p, alpha_n, beta, eps = (load(f"{module}.{name}") for name in ("alpha_p", "alpha_n", "beta", "eps"))
    positive, negative = torch.log1p(torch.exp(alpha_p)), beta + torch.log1p(torch.exp(alpha_n))
    below = negative * (torch.expm1(torch.minimum(values, eps)) - values)
    return torch.where(values > 0, positive * values * values, below) + beta * values
