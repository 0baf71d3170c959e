# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of a GGUF: a few are key-values, others a tensor of factors that the converter worked out."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from surgery_formats.containers.gguf.header import Header
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["rope_scaling"]

_ORIGINAL = (8192, 4096, 2048, 16384, 32768)  # positions that Llama 3 and its kin were trained on before
_MOST = 4096  # factors of a head


def rope_scaling(
    header: Header, tensors: Mapping[str, StoredTensor], head_dim: Any, theta: Any
) -> dict[str, Any] | None:
    """What config.json would say of scaled positions; None without any.

    Factors that are none of Llama 3's get a type of their own, so that no recipe takes them for something else.
    """
    factors = _values(tensors.get("rope_freqs.weight"))
    if factors is not None:
        return _llama3(factors, head_dim, theta) or {"rope_type": "rope_freqs of a GGUF"}
    if any(tensor.startswith("rope_factors_") for tensor in tensors):
        return {"rope_type": "rope_factors of a GGUF"}
    name = header.value("general.architecture")
    kind = header.value(f"{name}.rope.scaling.type")
    factor = header.value(f"{name}.rope.scaling.factor") or header.value(f"{name}.rope.scale_linear")
    if kind in (None, "none") and not factor:
        return None
    scaling = {"rope_type": kind or "linear", "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = header.value(f"{name}.rope.scaling.original_context_length")
    return scaling


def _values(tensor: StoredTensor | None) -> tuple[float, ...] | None:
    if tensor is None or tensor.dtype is not DType.F32 or not 0 < tensor.numel <= _MOST:
        return None if tensor is None else ()
    return struct.unpack(f"<{tensor.numel}f", tensor.file.read(tensor.offset, tensor.nbytes))


def _llama3(factors: tuple[float, ...], head_dim: Any, theta: Any) -> dict[str, Any] | None:
    """The parameters of Llama 3's scaling that give these factors, with its own bounds of 1 and 4."""
    if (
        not isinstance(head_dim, int)
        or not isinstance(theta, int | float)
        or len(factors) * 2 != head_dim
        or theta <= 1
    ):
        return None
    factor = max(factors, default=0.0)
    if not 0 < factor < math.inf:
        return None
    for original in _ORIGINAL:
        expected = [_factor(2 * math.pi * theta ** (2 * i / head_dim), factor, original) for i in range(len(factors))]
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, expected, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    return None


def _factor(wavelength: float, factor: float, original: int) -> float:
    if wavelength < original / 4.0:
        return 1.0
    if wavelength > original:
        return factor
    smooth = (original / wavelength - 1.0) / 3.0
    return 1 / ((1 - smooth) / factor + smooth)
