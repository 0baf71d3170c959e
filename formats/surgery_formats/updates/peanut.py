# SPDX-License-Identifier: Apache-2.0
"""PEANuT: ``W' = W + s B f(W)^T``, f a small network on the columns of W (Zhong et al. 2024, arXiv:2410.01870)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, cast, namespace, to_cpu, to_device
from surgery_formats.dtypes import DType
from surgery_formats.products import add_product
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.activations import activation
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.spectrum import all_blocks

__all__ = ["PEANuT"]


@dataclass(frozen=True, slots=True)
class PEANuT:
    """An addition that a network makes of the weight itself.

    ``h = g(W^T A^T)``; each encoder makes ``g(h E^T)`` of h, then each decoder ``g(h D^T)`` plus the h that the encoder
    opposite to it was given.

    Attributes:
        A: ``peanut_A``, ``(rank, out)``.
        B: ``peanut_B``, ``(out, rank)``.
        encoders: Each ``(rank, rank)``.
        decoders: As many as encoders.
        act: Name of g, as transformers calls it.
        scale: Factor on the addition.
        inputs: Columns of the weight; 0 until `fitted`.
    """

    kind: ClassVar[str] = "PEANuT"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "maps"
    together: ClassVar[bool] = True
    alpha: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    A: Factor
    B: Factor
    encoders: tuple[Factor, ...]
    decoders: tuple[Factor, ...]
    act: str
    scale: float = 1.0
    inputs: int = 0

    @property
    def rank(self) -> int:
        """Width of the network."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.B.shape[0], self.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of all factors."""
        return tuple(tensor for factor in self.factors().values() for tensor in factor.tensors)

    def fitted(self, fit: Fit) -> PEANuT:
        """The width of the weight."""
        return replace(self, inputs=fit.shape[1])

    def factors(self) -> dict[str, Factor]:
        """``A``, ``B``, and the layers between."""
        named = {f"encoder {i}": layer for i, layer in enumerate(self.encoders)}
        named |= {f"decoder {i}": layer for i, layer in enumerate(self.decoders)}
        return {"A": self.A, "B": self.B, **named}

    def low_rank(self) -> None:
        """None: what is added depends on the weight."""

    def parts(self) -> tuple[tuple[int, PEANuT], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """One pass over the weight for ``W^T A^T``; the network runs on it in float64, and blocks cost one product."""
        down = self.A.load(DType.F64, weight.device)
        xp = namespace(down)
        seen = xp.zeros((self.inputs, self.rank), dtype=xp.float64, device=down.device)
        for block, rows, cols in all_blocks(weight, self.shape, self.tensors[0]):
            at = slice(cols.start, cols.stop, cols.step) if isinstance(cols, range) else list(cols)
            seen[at] += cast(block, DType.F64).T @ positions(down, 1, rows).T
        made = to_device(self._network(to_cpu(seen)).T, weight.device)
        A, B = cast(made, weight.dtype), self.B.load(weight.dtype, weight.device) * self.scale

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            return add_product(block, positions(B, 0, rows), positions(A, 1, cols))

        return apply

    def _network(self, values: Array) -> Array:
        """f, from and to ``(in, rank)``, with numpy: the values are few."""
        act, residuals = activation(self.act), []
        hidden = act(values)
        for layer in self.encoders:
            residuals.append(hidden)
            hidden = act(hidden @ layer.load(DType.F64).T)
        for layer, residual in zip(self.decoders, reversed(residuals), strict=True):
            hidden = act(hidden @ layer.load(DType.F64).T) + residual
        return hidden
