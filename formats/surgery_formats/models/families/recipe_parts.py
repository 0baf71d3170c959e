# SPDX-License-Identifier: Apache-2.0
"""The parts that every record of a recipe is made of: activations, projections and norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Activation", "Norm", "Projection", "Shapes", "norm_shapes", "projection_shapes"]

Shapes = dict[str, tuple[int, ...]]
"""Name and stored shape of the tensors of a part; -1 is a size that config.json does not say."""

Activation = Literal[
    "silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid", "leaky_relu", "quick_gelu", "linear", "relu2", "xielu"
]
"""``gelu`` is exact (erf); ``gelu_tanh``, ``gelu_new`` in old configs, is the approximation of arXiv:1606.08415. ``sigmoid`` to
``linear`` are those of inserted modules; ``leaky_relu`` has the slope 0.01, ``quick_gelu`` is ``x sigmoid(1.702 x)``.
``relu2`` is ``relu(x)^2`` (arXiv:2109.08668), ``xielu`` has learned numbers (see `MLP`)."""


@dataclass(frozen=True, slots=True)
class Projection:
    """``y = x W^T + b``.

    Attributes:
        weight: Tensor ``(outputs, inputs)``, or ``(inputs, outputs)`` if `transposed` (Conv1D).
        bias: Tensor ``(outputs,)``, or empty.
        transposed: Whether the weight is stored ``(inputs, outputs)``.
        stack: ``(number, count)``: the tensors hold `count` of these one after the other, and this is number `number`.
    """

    weight: str
    inputs: int
    outputs: int
    bias: str = ""
    transposed: bool = False
    stack: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """Normalisation over the last axis, in float32.

    Attributes:
        kind: ``rms``: ``x / sqrt(mean(x^2) + epsilon) * g`` (arXiv:1910.07467); ``layer``: with mean and optional bias
            (arXiv:1607.06450).
        weight: Tensor ``g``, or empty (OLMo 1).
        epsilon: Added to the mean square or variance.
        bias: Tensor, or empty.
        plus_one: The gain is ``1 + g`` (Gemma).
    """

    kind: Literal["rms", "layer"]
    weight: str
    epsilon: float
    bias: str = ""
    plus_one: bool = False


def projection_shapes(*projections: Projection | None) -> Shapes:
    """The tensors of linear maps; None is one that a model does without."""
    shapes: Shapes = {}
    for each in filter(None, projections):
        count = each.stack[1:] if each.stack else ()
        shapes[each.weight] = (*count, *(each.outputs, each.inputs)[:: -1 if each.transposed else 1])
        if each.bias:
            shapes[each.bias] = (*count, each.outputs)
    return shapes


def norm_shapes(width: int, *norms: Norm | None) -> Shapes:
    """The tensors of norms of `width` values; None is one that a model does without."""
    return {name: (width,) for each in filter(None, norms) for name in (each.weight, each.bias) if name}
