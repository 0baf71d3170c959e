# SPDX-License-Identifier: Apache-2.0
"""VeRA: ``W' = W + diag(b) B diag(d) A`` with random A and B that all weights share (Kopiczko et al. 2023, arXiv:2310.11454)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from surgery_formats.arrays import Array, to_device
from surgery_formats.products import add_product
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.draws import TorchDraws
from surgery_formats.updates.lora import LoRA

__all__ = ["Seed", "VeRA"]


@dataclass(frozen=True, slots=True)
class Seed:
    """Projections that are not in the file: PEFT draws them again (``save_projection=False``).

    Attributes:
        key: ``projection_prng_key``.
        widest: ``(out, in)``, each the greatest among the weights that the adapter was trained for; (0, 0) until the
            base is known.
        twice: Whether A is drawn with twice as many rows, of which the second half is not used (PVeRA).
    """

    key: int
    widest: tuple[int, int] = (0, 0)
    twice: bool = False


@dataclass(frozen=True, slots=True)
class VeRA:
    """Two trained vectors around shared random projections, of which a weight uses its first rows and columns.

    Attributes:
        b: ``vera_lambda_b``, ``(out,)``.
        d: ``vera_lambda_d``, ``(rank,)``.
        projections: ``vera_A`` ``(rank, widest in)`` and ``vera_B`` ``(widest out, rank)``, or how to draw them.
        scale: Factor on the addition.
        inputs: Columns of the weight; 0 until `fitted`.
    """

    kind: ClassVar[str] = "VeRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    alpha: ClassVar[None] = None

    b: Factor
    d: Factor
    projections: tuple[Factor, Factor] | Seed
    scale: float = 1.0
    inputs: int = 0

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return self.d.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.b.shape[0], self.inputs

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """The random projections, where they are stored."""
        if isinstance(self.projections, Seed):
            return ()
        return tuple(tensor for factor in self.projections for tensor in factor.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The vectors', then the projections'."""
        return (*self.b.tensors, *self.d.tensors, *self.untrained)

    def scaled(self, weight: float) -> VeRA:
        """The same directions, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def fitted(self, fit: Fit) -> VeRA:
        """The width of the weight; where projections are drawn, their sizes."""
        drawn = self.projections
        projections = replace(drawn, widest=fit.widest) if isinstance(drawn, Seed) else drawn
        width = fit.widest[1] if isinstance(drawn, Seed) else drawn[0].shape[1]
        return replace(self, projections=projections, inputs=min(fit.shape[1], width))

    def factors(self) -> dict[str, Factor]:
        """``b`` and ``d``; the projections ``A`` and ``B`` where the file has them."""
        stored = () if isinstance(self.projections, Seed) else self.projections
        return {"b": self.b, "d": self.d, **dict(zip("AB", stored, strict=False))}

    def low_rank(self) -> LoRA | None:
        """The projections with both vectors multiplied in; None until the sizes are known."""
        if not self.inputs or (isinstance(self.projections, Seed) and not all(self.projections.widest)):
            return None
        (out, inputs), (whole_a, whole_b) = self.shape, self._projections()
        A = Factor.computed((whole_a, self.d), (self.rank, inputs), lambda a, d: a[:, :inputs] * d[:, None])
        B = Factor.computed((whole_b, self.b), (out, self.rank), lambda b, gain: b[:out] * gain[:, None])
        return LoRA(A, B, self.scale)

    def _projections(self) -> tuple[Factor, Factor]:
        """``A`` and ``B`` as all weights share them."""
        if not isinstance(self.projections, Seed):
            return self.projections
        drawn, (out, inputs) = self.projections, self.projections.widest
        A = Factor((), (self.rank, inputs), lambda: _drawn(drawn, self.rank)[0])
        return A, Factor((), (out, self.rank), lambda: _drawn(drawn, self.rank)[1])

    def parts(self) -> tuple[tuple[int, VeRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Cut and scale the projections once; each block costs one rank-r product."""
        out, inputs = self.shape
        if isinstance(self.projections, Seed):
            whole_a, whole_b = _drawn(self.projections, self.rank)
            A, B = (to_device(factor, weight.device, weight.dtype) for factor in (whole_a[:, :inputs], whole_b[:out]))
        else:
            A, B = (factor.load(weight.dtype, weight.device) for factor in self.projections)
        A = A[:, :inputs] * self.d.load(weight.dtype, weight.device)[:, None]
        B = B[:out] * (self.b.load(weight.dtype, weight.device) * self.scale)[:, None]

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            return add_product(block, positions(B, 0, rows), positions(A, 1, cols))

        return apply


@lru_cache(maxsize=2)
def _drawn(drawn: Seed, rank: int) -> tuple[Array, Array]:
    """A, then B, drawn from one CPU generator, uniform in ``+-sqrt(6 / columns)`` (PEFT ``tuners/vera/model.py``)."""
    draws, (out, inputs) = TorchDraws(drawn.key), drawn.widest

    def uniform(rows: int, cols: int) -> Array:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(cols))
        return draws.uniform((rows, cols), -bound, bound)

    A = uniform(2 * rank if drawn.twice else rank, inputs)
    return A[:rank], uniform(out, rank)
