# SPDX-License-Identifier: Apache-2.0
"""What comes after the last layer."""

from __future__ import annotations

from surgery.onnx.context import Context, module_of
from surgery.onnx.linear import linear
from surgery_formats.families.recipe import LanguageHead

__all__ = ["language_head"]


def language_head(ctx: Context, record: LanguageHead, x: str) -> None:
    """The output ``logits (B, S, V)``."""
    at = module_of(record.projection.weight)
    if record.before is not None:
        x = linear(ctx, record.before, x)
    y = linear(ctx, record.projection, x, alpha=1.0 / record.divisor)
    if record.softcap is not None:
        cap = ctx.graph.number(record.softcap, ctx.io)
        y = ctx.graph.node("Tanh", [ctx.graph.node("Div", [y, cap], at)], at)
        y = ctx.graph.node("Mul", [y, cap], at)
    y = ctx.batched(y, at, out="logits") if ctx.flat else ctx.graph.rename(y, "logits")
    ctx.graph.output(y, ctx.io, ("batch", "sequence", record.projection.outputs))
