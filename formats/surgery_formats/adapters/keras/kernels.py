# SPDX-License-Identifier: Apache-2.0
"""A LoRA of a Keras kernel as one of the weight that transformers has.

Keras adds ``A @ B`` to a kernel, A having the kernel's sizes but for the last, which is the rank. Where that leaves a size per head
beside the inputs, the weight's own change is of rank ``heads * r``: A' ``(heads r, in)``, and B' repeats B for every head.
"""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.keras.families import Shape
from surgery_formats.arrays import Array, namespace
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, LoRA

__all__ = ["fused_lora", "lora_of"]


def lora_of(a: StoredTensor, b: StoredTensor, shape: Shape) -> LoRA:
    """The LoRA of a weight ``(out, in)``; sizes are known to fit."""
    rank, last = b.shape

    def turned(values: Array) -> Array:
        return values.T

    if shape in ("dense", "from heads"):  # the last size is that of the outputs

        def flat(values: Array) -> Array:
            return values.reshape(-1, rank).T

        return LoRA(Factor((a,), (rank, a.numel // rank), flat), Factor((b,), (last, rank), turned), 1.0)
    heads, inputs = (a.shape[1], a.shape[0]) if shape == "heads" else a.shape[:2]
    axes = (1, 2, 0) if shape == "heads" else (0, 2, 1)

    def by_head(values: Array) -> Array:
        return namespace(values).permute_dims(values, axes).reshape(heads * rank, inputs)

    def repeated(values: Array) -> Array:
        whole = namespace(values).zeros((heads, last, heads, rank), dtype=values.dtype)
        for head in range(heads):
            whole[head, :, head, :] = values.T
        return whole.reshape(heads * last, heads * rank)

    return LoRA(
        Factor((a,), (heads * rank, inputs), by_head), Factor((b,), (heads * last, heads * rank), repeated), 1.0
    )


def fused_lora(parts: Sequence[tuple[int, LoRA]], count: int) -> LoRA:
    """LoRAs of some of `count` parts of equal height, below each other, as one of the whole weight.

    `rows.joined` does so for a writer: it looks whether they share an A. A reader reads no values.
    """
    (out, inputs), rank = parts[0][1].shape, sum(lora.rank for _, lora in parts)

    def stacked(*values: Array) -> Array:
        return namespace(values[0]).concat(values, axis=0)

    def spread(*values: Array) -> Array:
        whole = namespace(values[0]).zeros((count * out, rank), dtype=values[0].dtype)
        at = 0
        for (part, lora), value in zip(parts, values, strict=True):
            whole[part * out : (part + 1) * out, at : at + lora.rank] = value
            at += lora.rank
        return whole

    return LoRA(
        Factor.computed([lora.A for _, lora in parts], (rank, inputs), stacked),
        Factor.computed([lora.B for _, lora in parts], (count * out, rank), spread),
        1.0,
    )
