# SPDX-License-Identifier: Apache-2.0
"""Soft prompts: virtual tokens in front of the input, or keys and values in front of every layer's.

Prompt tuning: Lester et al. 2021, arXiv:2104.08691. P-tuning: Liu et al. 2021, arXiv:2103.10385. Prefix tuning: Li and
Liang 2021, arXiv:2101.00190. Files hold the output of the encoder or projection that a prompt was trained through, so
neither is needed here. Source: PEFT 0.21, ``PeftModel.get_prompt``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from surgery_formats.arrays import Array, all_finite, cast, dtype_of, namespace, wide
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor

__all__ = ["Prefix", "SoftPrompt"]


@dataclass(frozen=True, slots=True)
class Prefix:
    """Layout of a table of keys and values, ``(tokens, 2 * layers, kv_heads, head_dim)``.

    K of layer i is at ``2 i``, V at ``2 i + 1``.

    Attributes:
        layers: Number of layers of the model.
        kv_heads: Number of key and value heads, fewer than query heads with grouped-query attention.
        head_dim: Numbers per head.
    """

    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """Virtual tokens, or keys and values, that were trained instead of weights.

    Attributes:
        kind: ``PROMPT_TUNING``, ``P_TUNING``, ``PREFIX_TUNING``, ``CPT``, ``CARTRIDGE``.
        table: The stored table: ``(submodules * tokens, dim)`` embeddings, or
            ``(tokens, 2 * layers * kv_heads * head_dim)`` keys and values.
        virtual_tokens: Number of virtual tokens in front of the input of one submodule.
        dim: Numbers per token: of an embedding; of all key heads of one layer.
        submodules: 2 for an encoder and its decoder, else 1.
        prefix: Layout of keys and values; None for embeddings.
    """

    kind: str
    table: Tensor
    virtual_tokens: int
    dim: int
    submodules: int = 1
    prefix: Prefix | None = None

    @property
    def parameters(self) -> int:
        """Numbers trained (CPT: stored, its base's embeddings included)."""
        return self.table.numel

    def embeddings(self, submodule: int = 0) -> Array:
        """The rows ``(virtual_tokens, dim)`` to put before the embedded input.

        A model that scales its embeddings does not scale these.

        Args:
            submodule: 0 for the model or its encoder; 1 for the decoder, whose rows PEFT stores but does not use when
                it gets token ids.

        Raises:
            FitError: keys and values instead of embeddings, or a value that is not a number.
        """
        if self.prefix is not None:
            raise self._error("holds keys and values, no embeddings")
        values = self._values()
        return values[submodule * self.virtual_tokens : (submodule + 1) * self.virtual_tokens]

    def key_values(self, layer: int) -> tuple[Array, Array]:
        """K and V of `layer` for the cache, each ``(kv_heads, virtual_tokens, head_dim)``.

        They take no rotary embedding.

        With two submodules PEFT doubles the list and takes entries ``4 i`` and ``4 i + 1`` for the decoder's layer i.

        Args:
            layer: From 0.

        Raises:
            FitError: embeddings instead of keys and values, or a value that is not a number.
        """
        if self.prefix is None:
            raise self._error("holds embeddings, no keys and values")
        entry = 2 * self.submodules * layer % (2 * self.prefix.layers)
        sizes = (self.virtual_tokens, 2 * self.prefix.layers, self.prefix.kv_heads, self.prefix.head_dim)
        values = self._values()
        values = namespace(values).permute_dims(values.reshape(sizes), (1, 2, 0, 3))
        return values[entry], values[entry + 1]

    def check(self) -> SoftPrompt:
        """This prompt, checked.

        Raises:
            FitError: the size of the stored table differs from the configured sizes.
        """
        rows = self.virtual_tokens if self.prefix else self.submodules * self.virtual_tokens
        width = 2 * self.prefix.layers * self.prefix.kv_heads * self.prefix.head_dim if self.prefix else self.dim
        shape = self.table.shape
        if len(shape) < 2 or (math.prod(shape[:-1]), shape[-1]) != (rows, width):
            raise self._error(f"is {list(shape)}, but the configuration says {[rows, width]}")
        return self

    def _values(self) -> Array:
        """The table as a matrix in float32, or float64 where stored so, read when it is needed."""
        stored = self.table.read()
        if not self.table.dtype.is_float_or_fp8:
            raise self._error(f"trained values of type {self.table.dtype.label}")
        values = cast(stored, wide(dtype_of(stored)))
        if not all_finite(values):
            raise self._error("holds NaN or Inf")
        return values.reshape(-1, values.shape[-1])

    def _error(self, why: str) -> FitError:
        return FitError(why, file=self.table.path, tensor=self.table.name)
