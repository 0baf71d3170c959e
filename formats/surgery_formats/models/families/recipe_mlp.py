# SPDX-License-Identifier: Apache-2.0
"""What a layer does to each token by itself: an MLP, or a mixture of experts.

Shapes as in `surgery_formats.models.families.recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery_formats.models.families.recipe_parts import Activation, Projection, Shapes, projection_shapes

__all__ = ["MLP", "Experts"]

_XIELU: Shapes = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}


@dataclass(frozen=True, slots=True)
class MLP:
    """``down(act(up x))``, or gated ``down(act(gate x) * up x)``.

    Attributes:
        inputs: ``(up,)``; ``(gate, up)``; or one projection for ``[gate | up]`` if `gated`.
        output: The down projection.
        activation: Activation of the gate, or of the only input.
        gated: Whether there is a gate.
        interleaved: Whether gate and up alternate in the output of their one projection.
        gate_last: Whether their one projection has them as ``[up | gate]``.
        limit: The gate is at most this before its activation, and ``up`` at most this in size; None for no limit.
        up_plus: Added to ``up`` (GPT-OSS: 1).
        shape: Module of the numbers of ``xielu`` (arXiv:2411.13010): ``alpha_p`` and ``alpha_n`` ``(1,)``, ``beta`` and
            ``eps`` ``()``. With ``p = softplus(alpha_p)`` and ``n = beta + softplus(alpha_n)`` it is ``p x^2 + beta x``
            above 0 and ``n (expm1(min(x, eps)) - x) + beta x`` elsewhere. Empty for other activations.
        sparsity: Share of the gate's values that is cut off before the activation: of normally distributed ones that many are
            below mean + q deviations, which is taken from all, and what is below 0 is 0 (Gemma 3n); 0 for none.
    """

    inputs: tuple[Projection, ...]
    output: Projection
    activation: Activation
    gated: bool
    interleaved: bool = False
    gate_last: bool = False
    limit: float | None = None
    up_plus: float = 0.0
    shape: str = ""
    sparsity: float = 0.0

    def shapes(self) -> Shapes:
        """Its tensors."""
        numbers = {f"{self.shape}.{name}": shape for name, shape in _XIELU.items()} if self.shape else {}
        return projection_shapes(*self.inputs, self.output) | numbers


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts (arXiv:2101.03961): ``sum over the chosen e of w_e expert_e(x)``, and the shared expert.

    Scores ``s`` are the softmax or the sigmoid of what the router makes of ``x``. The experts chosen are the `top` with the
    greatest ``s + correction``, of the best groups only; their weights are ``s``.

    Attributes:
        router: ``D`` to one number per expert.
        experts: The experts.
        top: How many are chosen for each token.
        scoring: ``softmax`` over all experts, or ``sigmoid`` of each.
        normalised: Whether the weights of the chosen are divided by their sum, or by `floor` if that is greater.
        floor: See `normalised`.
        scale: Factor on the weights.
        correction: Tensor ``(experts,)``, or ``(1, experts)`` if `correction_row`, that affects the choice alone; or empty.
        correction_row: See `correction`.
        groups: Number of groups of neighbours of equal size.
        best_groups: How many of the groups are considered.
        group_score: A group counts as its ``best`` expert, or as the ``two`` best together.
        precise: Whether the router computes in float32.
        shared: An expert for every token, or None.
        shared_gate: Sigmoid of one number per token on the shared expert (Qwen2-MoE), or None.
    """

    router: Projection
    experts: tuple[MLP, ...]
    top: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    floor: float = 0.0
    scale: float = 1.0
    correction: str = ""
    correction_row: bool = False
    groups: int = 1
    best_groups: int = 1
    group_score: Literal["best", "two"] = "best"
    precise: bool = False
    shared: MLP | None = None
    shared_gate: Projection | None = None

    def shapes(self) -> Shapes:
        """Its tensors, those of all experts included."""
        shapes = projection_shapes(self.router, self.shared_gate)
        for expert in (*self.experts, *((self.shared,) if self.shared else ())):
            shapes |= expert.shapes()
        if self.correction:
            shapes[self.correction] = (*((1,) if self.correction_row else ()), len(self.experts))
        return shapes
