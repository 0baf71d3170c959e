# SPDX-License-Identifier: Apache-2.0
"""What runs a graph, as far as its operators and types tell without running it.

Whether a session can be made is what onnxruntime says when it is made. What is told here are facts that decide before: operators that
one runtime alone has, graphs that an optimiser made for one processor, operators that no runtime knows, and types for which a
provider has no kernel. The kernels are those of onnxruntime's OperatorKernels.md; those of the CPU are tested against the installed
release. Where nothing is said, nothing is known to stand against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery_formats.containers.onnx.elements import ELEMENT_NAMES
from surgery_formats.text import listing

if TYPE_CHECKING:
    import onnx

__all__ = ["KERNELS", "NOT_ON_CPU", "Kernels", "domain_note", "what_runs_where"]

ORT = "com.microsoft"
_DOMAINS = {
    ORT: "operators of onnxruntime alone",
    "com.microsoft.nchwc": "a layout that onnxruntime's optimiser chose for the CPU it ran on: the graph belongs to that machine",
    "com.ms.internal.nhwc": "a layout that onnxruntime's optimiser chose: the graph belongs to the provider it was made for",
    "ai.onnx.ml": "classical models: onnxruntime runs these on the CPU alone",
    "ai.onnx.contrib": "needs the library onnxruntime-extensions",
    "org.pytorch.aten": "needs an onnxruntime that was built with torch",
    "ai.onnx.preview.training": "operators of training",
}
_ADDED = frozenset(
    (
        "SimplifiedLayerNormalization",
        "Affine",
        "Crop",
        "DynamicSlice",
        "ImageScaler",
        "ParametricSoftplus",
        "Scale",
        "ScaledTanh",
    )
)
"""What onnxruntime adds to ONNX's own domain (contrib_ops)."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The types of numbers that providers of onnxruntime have an operator for.

    Attributes:
        cpu: On the CPU; fp16 is listed only where it is computed without conversions that onnxruntime puts around.
        cuda: On CUDA.
    """

    cpu: tuple[str, ...]
    cuda: tuple[str, ...]


_ALL = ("F32", "F16", "BF16")
KERNELS: Mapping[tuple[str, str], Kernels] = {
    (ORT, "GroupQueryAttention"): Kernels(("F32", "F16"), ("F16", "BF16")),
    (ORT, "MultiHeadAttention"): Kernels(("F32",), _ALL),
    (ORT, "PagedAttention"): Kernels((), ("F16", "BF16")),
    (ORT, "MatMulNBits"): Kernels(("F32", "F16"), _ALL),
    (ORT, "FusedMatMul"): Kernels(("F32",), _ALL),
    (ORT, "SkipSimplifiedLayerNormalization"): Kernels(("F32", "F16", "BF16"), _ALL),
    ("", "MatMul"): Kernels(("F32",), _ALL),
    ("", "Gemm"): Kernels(("F32",), _ALL),
    ("", "Attention"): Kernels(("F32", "F16"), _ALL),
}
NOT_ON_CPU = frozenset(
    (
        "BiasAdd", "BiasDropout", "BiasSoftmax", "BiasSplitGelu", "DecoderAttention", "DecoderMaskedSelfAttention",
        "DynamicSparseAttention", "GatedRelativePositionBias", "GemmFastGelu", "GroupNorm", "LongformerAttention", "MatMulNBitsQkv",
        "NhwcConv", "PackedAttention", "PackedMultiHeadAttention", "RelativePositionBias", "RemovePadding", "RestorePadding",
        "SkipGroupNorm", "VarlenCausalConvWithState",
    )
)  # fmt: skip
"""Operators of onnxruntime without any kernel on the CPU: what its optimiser makes of transformers and U-Nets for a GPU."""
_COMPILED = "EPContext"
_WIDENED = "F16"
"""onnxruntime puts Casts around nodes of this type for which the CPU has no kernel; of bf16 it does not."""


def domain_note(domain: str, local: frozenset[str] = frozenset()) -> str:
    """What operators of a domain need; empty for standard ones, and for functions that the file itself defines."""
    if domain in ("", "ai.onnx") or domain in local:
        return ""
    return _DOMAINS.get(domain, "a domain that no runtime is known to have: it needs a library of its own")


def what_runs_where(model: onnx.ModelProto, counts: Mapping[tuple[str, str], int]) -> tuple[str, ...]:
    """Sentences on what stands against running `model`.

    Args:
        model: The graph.
        counts: How many nodes there are by ``(domain, operator)``.
    """
    return tuple(_sentences(model, counts))


def _sentences(model: onnx.ModelProto, counts: Mapping[tuple[str, str], int]) -> Iterator[str]:
    import onnx

    functions = {(function.domain, function.name) for function in model.functions}
    by_domain: dict[str, list[str]] = {}
    for domain, operator in counts:
        if (domain, operator) not in functions:
            by_domain.setdefault(domain, []).append(operator)
    for domain, operators in by_domain.items():
        if note := domain_note(domain):
            yield f"{domain}: {listing(sorted(operators), 12)}; {note}"
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    for domain in ("", "ai.onnx"):
        unknown = [
            operator for operator in by_domain.get(domain, ()) if not onnx.defs.has(operator, opsets.get(domain, 1), "")
        ]
        if added := sorted(_ADDED.intersection(unknown)):
            yield f"{listing(added, 12)}: in ONNX's own domain onnxruntime alone has these"
        if unknown := sorted(set(unknown) - _ADDED):
            yield f"not operators of ONNX in opset {opsets.get(domain, 1)}: {listing(unknown, 12)}"
    if absent := sorted(NOT_ON_CPU.intersection(by_domain.get(ORT, ()))):
        yield f"onnxruntime has no kernel on the CPU for {listing(absent, 12)}"
    if _COMPILED in by_domain.get(ORT, ()):
        yield f"{_COMPILED} holds what one execution provider compiled, and that provider alone runs it"
    yield from _without_kernel(model, counts)


def _without_kernel(model: onnx.ModelProto, counts: Mapping[tuple[str, str], int]) -> Iterator[str]:
    element = _type_of(model)
    lacking: dict[str, list[str]] = {"the CPU": [], "CUDA": []}
    converted: list[str] = []
    for key, kernels in KERNELS.items():
        if key not in counts or element not in _ALL:
            continue
        if element not in kernels.cpu:
            (converted if element == _WIDENED and kernels.cpu else lacking["the CPU"]).append(key[1])
        if element not in kernels.cuda:
            lacking["CUDA"].append(key[1])
    for provider, operators in lacking.items():
        if operators:
            yield f"onnxruntime has no kernel on {provider} for {element} in {listing(operators, 12)}"
    if converted:
        yield f"on the CPU onnxruntime converts {element} to fp32 and back around {listing(converted, 12)}"


def _type_of(model: onnx.ModelProto) -> str:
    """The type that a graph computes in: of its first output of floats, else input, else weight."""
    ports = (port.type.tensor_type.elem_type for port in (*model.graph.output, *model.graph.input))
    elements = (*ports, *(tensor.data_type for tensor in model.graph.initializer))
    return next((label for element in elements if (label := ELEMENT_NAMES.get(element, "")) in _ALL), "")
