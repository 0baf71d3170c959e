# SPDX-License-Identifier: Apache-2.0
"""The residual steps of a layer, for any attention and MLP."""

from __future__ import annotations

from collections.abc import Callable

from surgery.onnx.graph.context import Context, ResidualStream, module_of
from surgery.onnx.graph.experts import experts
from surgery.onnx.graph.mlp import mlp
from surgery.onnx.graph.modules import run_inserted
from surgery.onnx.graph.norm import norm, residual_norm
from surgery_formats.models.families.recipe import Branch, Experts, Layer, Model

__all__ = ["Body", "last_states", "layer_steps"]

Body = Callable[[str, float], str]
"""Maps hidden states and a factor to the body's result times the factor."""


def layer_steps(
    ctx: Context, model: Model, layer: Layer, stream: ResidualStream, attend: Body, cross: Body | None = None
) -> ResidualStream:
    """Attention and MLP of one layer, between them `cross`; the last sum is left to the reader of the stream."""

    def transform(x: str, alpha: float) -> str:
        if isinstance(layer.mlp, Experts):
            return experts(ctx, layer.mlp, x, model.hidden, alpha=alpha)
        return mlp(ctx, layer.mlp, x, alpha=alpha)

    at = module_of(module_of(module_of(layer.attention.output.weight)))
    if layer.parallel:
        return _parallel(ctx, model, layer, stream, attend, transform, at)
    stream = _branch(ctx, model, layer.attention_branch, stream, attend, at)
    if layer.cross is not None and cross is not None:
        stream = _branch(ctx, model, layer.cross.branch, stream, cross, at)
    return _branch(ctx, model, layer.mlp_branch, stream, transform, at)


def _branch(ctx: Context, model: Model, branch: Branch, stream: ResidualStream, body: Body, at: str) -> ResidualStream:
    """``x + multiplier * after(body(before(x)))``, then `on_sum`; the sum is left to the reader of the stream."""
    x, stream = _before(ctx, model, branch, stream, at)
    stream = ResidualStream(stream.value, _after(ctx, model, branch, body, x, at))
    if branch.inserted:
        return ResidualStream(run_inserted(ctx, branch, stream.value, stream.pending, model.hidden, at))
    if branch.on_sum is None:
        return stream
    at = module_of(branch.on_sum.weight) or at
    return ResidualStream(residual_norm(ctx, branch.on_sum, stream, model.hidden, at, keep=False)[0])


def _before(ctx: Context, model: Model, branch: Branch, stream: ResidualStream, at: str) -> tuple[str, ResidualStream]:
    if branch.before is None:
        total = ctx.total(stream, at)
        return total, ResidualStream(total)
    return residual_norm(ctx, branch.before, stream, model.hidden, module_of(branch.before.weight) or at)


def _after(ctx: Context, model: Model, branch: Branch, body: Body, x: str, at: str) -> str:
    if branch.gains:
        gains = ctx.weights.value(branch.gains, (model.hidden,))
        return ctx.graph.node("Mul", [body(x, branch.multiplier), gains], at)
    if branch.after is None:
        return body(x, branch.multiplier)
    y = norm(ctx, branch.after, body(x, 1.0), model.hidden, module_of(branch.after.weight) or at)
    if branch.multiplier != 1.0:
        y = ctx.graph.node("Mul", [y, ctx.graph.number(branch.multiplier, ctx.io)], at)
    return y


def _parallel(
    ctx: Context, model: Model, layer: Layer, stream: ResidualStream, attend: Body, transform: Body, at: str
) -> ResidualStream:
    """Both bodies read the layer's input; an MLP without a norm reads the attention's normalised input."""
    x, stream = _before(ctx, model, layer.attention_branch, stream, at)
    y = x
    if layer.mlp_branch.before is not None:
        y, _ = _before(ctx, model, layer.mlp_branch, stream, at)
    attended = _after(ctx, model, layer.attention_branch, attend, x, at)
    transformed = _after(ctx, model, layer.mlp_branch, transform, y, at)
    return ResidualStream(stream.value, ctx.graph.node("Add", [attended, transformed], at))


def last_states(ctx: Context, model: Model, stream: ResidualStream) -> str:
    """The states behind the last layer, normalised if the model has a norm there; in the rank of the hidden states."""
    if model.final_norm is None:
        return ctx.total(stream, "")
    at = module_of(model.final_norm.weight) or "norm"
    return residual_norm(ctx, model.final_norm, stream, model.hidden, at, keep=False)[0]
