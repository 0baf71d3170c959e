# SPDX-License-Identifier: Apache-2.0
"""The inputs and outputs of a graph: types, dims, defaults, and which of them take an adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from surgery.reports.graph_report import PortReport
from surgery_formats.containers.onnx.elements import ELEMENT_NAMES

if TYPE_CHECKING:
    import onnx

__all__ = ["inputs_of", "is_factor_name", "outputs_of"]

_FACTOR = re.compile(r"(^|[._/])lora_[AB]([._/]|$)")
_LISTED_ALL = 4
"""IR version from which an initializer need not be listed as an input."""


def is_factor_name(name: str) -> bool:
    """Whether a tensor or an input is called as a factor of a LoRA: by Olive, the genai builder, mobius and ours."""
    return _FACTOR.search(name) is not None


def inputs_of(
    model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], slots: Collection[str] = ()
) -> tuple[PortReport, ...]:
    """The inputs, those with a default included; before IR version 4 the weights, which had to be listed, are left out.

    Args:
        model: The graph.
        shapes: Of all its initializers.
        slots: Inputs that its contract calls slots.
    """
    weights = {tensor.name for tensor in model.graph.initializer} if model.ir_version < _LISTED_ALL else set[str]()
    once = {port.name: port for port in reversed(model.graph.input)}  # Olive lists what it makes an input twice
    ports = [once.pop(port.name) for port in model.graph.input if port.name in once]
    return tuple(
        _port(port, shapes.get(port.name), slot=port.name in slots or is_factor_name(port.name))
        for port in ports
        if port.name not in weights
    )


def outputs_of(model: onnx.ModelProto) -> tuple[PortReport, ...]:
    """The outputs."""
    return tuple(_port(port, None, slot=False) for port in model.graph.output)


def _port(port: onnx.ValueInfoProto, default: tuple[int, ...] | None, *, slot: bool) -> PortReport:
    kind = port.type.WhichOneof("value") or "tensor_type"
    if kind not in ("tensor_type", "sparse_tensor_type"):
        return PortReport(port.name, kind.removesuffix("_type"), None)
    tensor = getattr(port.type, kind)
    dims = None
    if tensor.HasField("shape"):
        dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
    return PortReport(port.name, ELEMENT_NAMES.get(tensor.elem_type, "?"), dims, default, slot)
