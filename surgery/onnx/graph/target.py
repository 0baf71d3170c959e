# SPDX-License-Identifier: Apache-2.0
"""The operators of a graph: one choice per kind of step, so that a benchmark can compare any two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.text import show

__all__ = ["TARGETS", "OperatorSet", "choose", "io_type", "standard", "twin"]


@dataclass(frozen=True, slots=True)
class OperatorSet:
    """Operators by kind of step.

    Attributes:
        name: As in ``--target``.
        linear: ``gemm``: Gemm over rows ``(B*S, D)``, which every runtime has; ``fused``: com.microsoft.FusedMatMul
            over ``(B, S, D)``, without a Reshape. Both read weights as they are stored. ``matmul``: MatMul over weights
            that were written ``(in, out)``.
        attention: ``gqa``: com.microsoft.GroupQueryAttention, with its cache in one buffer and padding on the right;
            ``standard``: Attention of opset 23.
        norm: ``fused``: the residual sum and the norm are one com.microsoft operator; ``standard``: RMSNormalization of
            opset 23.
        gate: ``fused``: ``silu(gate) * up`` is one com.microsoft.GatedRMSNorm (onnxruntime 1.30 and later), see `gated_silu`;
            ``apart``: the activation, then Mul.
        silu: ``quick_gelu``: one com.microsoft.QuickGelu; ``sigmoid``: Sigmoid and Mul, which onnxruntime fuses into one;
            ``division``: ``x / (1 + exp(-x))`` in float32, the nearest number; ``scaled``: one com.microsoft.ScaledSiLU, as
            near, which older onnxruntimes lack.
        packed: Which adjacent weights of a file are joined: ``all``; ``attention``: those of an MLP stay separate,
            which costs a multiplication and saves a Split; ``none``.
        experts: ``codes``: those of a layer in one com.microsoft.QMoE, where their codes allow it; ``fused``: those of stored
            weights in one com.microsoft.MoE, too; ``apart``: from operators that every runtime has.
        qk_norm: ``fused``: norms of queries and keys inside GroupQueryAttention (CUDA only); ``standard``: as separate
            operators.
    """

    name: str
    linear: Literal["gemm", "fused", "matmul"]
    attention: Literal["gqa", "standard"]
    norm: Literal["fused", "standard"]
    silu: Literal["quick_gelu", "sigmoid", "division", "scaled"]
    packed: Literal["all", "attention", "none"] = "all"
    qk_norm: Literal["fused", "standard"] = "standard"
    gate: Literal["fused", "apart"] = "apart"
    experts: Literal["apart", "codes", "fused"] = "apart"


TARGETS = {
    "cuda": OperatorSet(
        "cuda", "fused", "gqa", "fused", "quick_gelu", packed="attention", qk_norm="fused", gate="fused"
    ),
    "cpu": OperatorSet("cpu", "gemm", "gqa", "fused", "quick_gelu", experts="codes"),
    "portable": OperatorSet("portable", "gemm", "standard", "standard", "sigmoid"),
}

_TYPES = {"fp32": DType.F32, "fp16": DType.F16, "bf16": DType.BF16}
_RUNS = {"cuda": ("fp32", "fp16", "bf16"), "cpu": ("fp32",), "portable": ("fp32", "fp16", "bf16")}
_WHY = {"cpu": "the CPU provider computes in fp32 (it converts fp16 back and forth, and has no bf16)"}


def io_type(target: str, dtype: str, stored: DType) -> DType:
    """The type of logits, cache and arithmetic: ``fp32``, ``fp16`` or ``bf16`` as asked for by `dtype`.

    ``auto`` is the stored type of the checkpoint's embedding if all runtimes of the target support it, otherwise fp32.

    Raises:
        FitError: the target does not support it.
    """
    if target not in TARGETS:
        raise FitError(f"no target '{show(target)}'", hint=f"one of {', '.join(TARGETS)}")
    if dtype == "auto":
        keeps = {"cuda": (DType.F16, DType.BF16), "portable": (DType.F16,)}.get(target, ())
        return stored if stored in keeps else DType.F32
    if dtype not in _TYPES:
        raise FitError(f"no type '{show(dtype)}'", hint=f"auto, {', '.join(_TYPES)}")
    if dtype not in _RUNS[target]:
        raise FitError(f"the target {target} cannot run {dtype}: {_WHY[target]}", hint=f'`dtype="{_RUNS[target][0]}"`')
    return _TYPES[dtype]


def choose(target: str, io: DType) -> OperatorSet:
    """Choose the operators for a target and a type: on CUDA, GroupQueryAttention has kernels for 16 bits only."""
    operators = TARGETS[target]
    return replace(standard(operators), gate="apart") if target == "cuda" and io is DType.F32 else operators


def standard(target: OperatorSet) -> OperatorSet:
    """Replace GroupQueryAttention, which cannot prefill several rows on top of a past, by Attention of opset 23."""
    return replace(target, attention="standard")


def twin(target: OperatorSet) -> OperatorSet:
    """The operators that the CPU provider supports too, to prove a graph for CUDA in fp32 without a GPU."""
    return replace(target, qk_norm="standard")
