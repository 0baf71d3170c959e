# SPDX-License-Identifier: Apache-2.0
"""GGUF's tensors: GGML's types of elements and blocks, under llama.cpp's names and in its order of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery_formats.storage.base import Storage
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["GGUF_TENSORS"]


@dataclass(frozen=True, slots=True)
class _GgufTensors:
    name: str = "gguf"
    title: str = (
        "tensors of a GGUF: GGML's blocks (Q4_0 to Q8_0, K-quants, IQ4, MXFP4, NVFP4, TQ; IQ1 to IQ3 read only)"
    )

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Storage]:
        """Every tensor of a GGUF: the container marks them."""
        own = [tensor for tensor in tensors.values() if tensor.packed_as]
        if own:
            from surgery_formats.storage.gguf.claim import weights  # most models are none

            yield from weights(own, config)


GGUF_TENSORS = _GgufTensors()
