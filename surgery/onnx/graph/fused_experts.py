# SPDX-License-Identifier: Apache-2.0
"""All experts of a layer in one com.microsoft.QMoE, where the target has it and their codes lie as it reads them.

Measured of onnxruntime's CPU provider (1.31 and 1.32): it takes gate and up in alternating rows alone. Of codes of 4 bits it
computes in float32; of 8 bits it rounds the activations to 8 bits, an error of 1%, so that these stay products by themselves. Without
the optional weights of the router it takes the softmax of the chosen logits, whatever ``normalize_routing_weights`` says. CUDA's
reads codes in an order of its own kernels and passes over the router's weights: what is right here would be silently wrong there
(docs/adr/0050).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.onnx.graph.coded import GraphCodes, coded_values
from surgery.onnx.graph.context import Context
from surgery.onnx.graph.graph import MICROSOFT
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import MLP, Experts, Projection
from surgery_formats.storage.block_format import BlockFormat

__all__ = ["ALPHA", "ExpertStacks", "are_alike", "expert_stacks", "fused_experts", "weights_of"]

ALPHA = {"silu": 1.0, "quick_gelu": 1.702}
"""Of activations ``x sigmoid(alpha x)``."""
_BITS = 4
_SMALLEST = 16


@dataclass(frozen=True, slots=True)
class ExpertStacks:
    """The weights of a layer's experts, one expert's below another's.

    Attributes:
        inputs: Gate and up.
        outputs: Down.
        biases: Of both, as names of the recipe; or empty.
        apart: Whether an expert has all rows of its gate before those of up, not in turn.
    """

    inputs: GraphCodes
    outputs: GraphCodes
    biases: tuple[str, str]
    apart: bool


def expert_stacks(ctx: Context, record: Experts) -> ExpertStacks | None:
    """The stacks that one operator can compute exactly; None where experts are computed one by one."""
    first, weights = record.experts[0], weights_of(record)
    if ctx.target.experts == "apart" or ctx.io is not DType.F32 or not are_alike(record):
        return None
    if not ctx.slotted.isdisjoint(weights) or not all(map(ctx.weights.is_coded, weights)):
        return None
    inputs = _joined(ctx, [part for one in record.experts for part in one.inputs])
    outputs = _joined(ctx, [one.output for one in record.experts])
    if inputs is None or outputs is None or not _is_read(inputs.form, outputs.form, inputs.shape[1], outputs.shape[1]):
        return None
    biases = first.inputs[0].bias, first.output.bias
    return ExpertStacks(inputs, outputs, biases, not first.interleaved)


def fused_experts(
    ctx: Context, record: Experts, stacks: ExpertStacks, rows: str, routing: tuple[str, str], at: str
) -> str:
    """The weighted sum of the chosen experts' results ``(N, D)``.

    Args:
        ctx: The graph.
        record: The mixture.
        stacks: Its weights.
        rows: The tokens.
        routing: What decides the choice ``(N, experts)``, and the weights of the same shape, or an empty name: the softmax of
            the chosen.
        at: Module of the layer's experts.
    """
    count, expert, form = len(record.experts), record.experts[0], stacks.inputs.form
    hidden, inner = stacks.inputs.shape[1], stacks.outputs.shape[1]
    codes, scales, *zeros = _stacked(ctx, stacks.inputs, (count, 2, inner) if stacks.apart else (count, 2 * inner), at)
    codes2, scales2, *zeros2 = _stacked(ctx, stacks.outputs, (count, hidden), at)
    names = stacks.biases
    bias = ctx.weights.value(names[0], (count, 2 * inner)) if names[0] else ""
    bias2 = ctx.weights.value(names[1], (count, hidden)) if names[1] else ""
    probabilities, chosen = routing
    limit: dict[str, Any] = {} if expert.limit is None else {"swiglu_limit": float(expert.limit)}
    inputs = [rows, probabilities, codes, scales, bias, codes2, scales2, bias2, "", "", ""]
    return ctx.graph.node(
        "QMoE",
        [*inputs, *(zeros or [""]), *(zeros2 or [""]), "", chosen],
        at,
        domain=MICROSOFT,
        k=record.top,
        expert_weight_bits=form.bits,
        block_size=form.block,
        activation_type="swiglu",
        activation_alpha=ALPHA[expert.activation],
        activation_beta=float(expert.up_plus),
        swiglu_fusion=1,
        normalize_routing_weights=int(record.normalised and not record.floor),
        # what older runtimes do not know and so refuse: until 1.30 this takes 5 to 50 times as long, in 1.23 blocks of 64 are wrong
        accuracy_level=0,
        weights_prepacked=0,
        **limit,
    )


def weights_of(record: Experts) -> list[str]:
    """The weights of all experts."""
    return [part.weight for one in record.experts for part in (*one.inputs, one.output)]


def are_alike(record: Experts) -> bool:
    """Whether all experts are of the kind that one operator computes."""
    return all(_fits(one, record.experts[0]) for one in record.experts)


def _fits(one: MLP, first: MLP) -> bool:
    """Whether an expert is one of the operator's, and alike the first; what a record may say besides is not the operator's."""
    form = MLP(
        one.inputs, one.output, first.activation, True, first.interleaved, limit=first.limit, up_plus=first.up_plus
    )
    parts = (*one.inputs, one.output)
    stacked = all(part.stack is not None for part in parts)
    whole = stacked or not any(part.stack is not None or part.bias for part in parts)
    biased = len({bool(part.bias) for part in parts}) == 1
    alike = one == form and len(one.inputs) == len(first.inputs)
    return alike and one.activation in ALPHA and whole and biased


def _joined(ctx: Context, parts: list[Projection]) -> GraphCodes | None:
    """The codes of several projections as one stack."""
    if parts[0].stack is not None:
        count = parts[0].stack[1]
        return ctx.weights.coded([parts[0].weight], [(count * parts[0].outputs, parts[0].inputs)])
    return ctx.weights.coded([part.weight for part in parts], [(part.outputs, part.inputs) for part in parts])


def _is_read(inputs: BlockFormat, outputs: BlockFormat, hidden: int, inner: int) -> bool:
    """Whether the operator reads these codes, and computes exactly with them."""
    same = (inputs.bits, inputs.block) == (outputs.bits, outputs.block)
    block = inputs.block
    if not same or inputs.bits != _BITS or block < _SMALLEST or hidden % block or inner % block:
        return False
    pairs = ((inputs, hidden), (outputs, inner))
    return all(form.symmetric or width > block for form, width in pairs)  # zero points of one block lie otherwise


def _stacked(ctx: Context, tensor: GraphCodes, sizes: tuple[int, ...], at: str) -> list[str]:
    """Codes, scales and zero points ``(experts, rows, ...)``; of `sizes` with gate and up apart, their rows in turn.

    Runtimes fold that when they load the graph: no file has rows of two weights in turn.
    """
    values = coded_values(ctx.graph, tensor, ctx.io, at, sizes=sizes)
    if len(sizes) == 2:
        return values
    count, both, inner = sizes
    turned = (ctx.graph.node("Transpose", [value], at, perm=[0, 2, 1, 3]) for value in values)
    return [ctx.reshaped(value, (count, both * inner, -1), at) for value in turned]
