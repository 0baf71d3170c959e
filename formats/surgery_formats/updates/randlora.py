# SPDX-License-Identifier: Apache-2.0
"""RandLoRA: ``W' = W + s sum_j B_j diag(l_j) A diag(g_j)``, A and B_j random: full rank (Albert et al. 2025, arXiv:2502.00987)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from surgery_formats.arrays import Array, to_device
from surgery_formats.errors import FitError
from surgery_formats.products import add_product
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.draws import TorchDraws

__all__ = ["RandLoRA", "RandomBases"]


@dataclass(frozen=True, slots=True)
class RandomBases:
    """Sparse bases that are not in the file: PEFT draws them again (``save_projection=False``).

    Dense ones cannot be drawn again: PEFT draws them in half precision, in which half depends on the machine, and from
    the same words torch makes other numbers of half precision than it once did.

    Attributes:
        key: ``projection_prng_key``.
        rank: ``r``.
        very_sparse: Whether one number in ``sqrt(shorter axis)`` is not 0, or else one in three.
        widest: ``(out, in)``, each the greatest among the weights that the adapter was trained for; (0, 0) until the
            base is known.
    """

    key: int
    rank: int
    very_sparse: bool = False
    widest: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class RandLoRA:
    """Trained diagonals around random bases, as many as it takes to reach the full rank.

    The trained side has the shorter axis of the weight. PEFT joins the bases in one order on that side (rank by rank)
    and in the other on the longer side (basis by basis); what was trained that way is merged that way.

    Attributes:
        lam: The l of each basis, ``randlora_lambda``, ``(rank, bases)``.
        gamma: The g of each, ``randlora_gamma``, ``(bases, shorter axis)``.
        bases: A ``(rank, 1, shorter axis or more)`` and B ``(longer axis or more, bases or more, rank)``, or how to
            draw them.
        scale: ``alpha / rank``.
        alpha: As written in the file.
        outputs: Rows of the weight; 0 until `fitted`.
        inputs: Its columns; 0 until `fitted`.
    """

    kind: ClassVar[str] = "RandLoRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    rank: ClassVar[None] = None

    lam: Factor
    gamma: Factor
    bases: tuple[Factor, Factor] | RandomBases
    scale: float
    alpha: float | None = None
    outputs: int = 0
    inputs: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.outputs, self.inputs

    @property
    def held_numbers(self) -> int:
        """Both sides of the product, and the bases they are cut from."""
        joined = self.lam.shape[0] * self.lam.shape[1]
        return 3 * joined * (self.outputs + self.inputs)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """The random bases, where they are stored."""
        if isinstance(self.bases, RandomBases):
            return ()
        return tuple(tensor for factor in self.bases for tensor in factor.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The diagonals', then the bases'."""
        return (*self.lam.tensors, *self.gamma.tensors, *self.untrained)

    def scaled(self, weight: float) -> RandLoRA:
        """The same bases, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def fitted(self, fit: Fit) -> RandLoRA:
        """The sizes of the weight; where bases are drawn, theirs.

        Raises:
            FitError: the diagonals, or the stored bases, belong to a weight of another size.
        """
        rank, count = self.lam.shape
        bases = self.bases
        if isinstance(bases, RandomBases):
            bases, longest = replace(bases, widest=fit.widest), max(fit.widest)
        else:
            longest = bases[1].shape[0]
        short, long = sorted(fit.shape)
        if self.gamma.shape[1] != short or count != -(-short // rank) or longest < long:
            stored = self.gamma.tensors[0]
            raise FitError(
                f"{count} bases of rank {rank} for {self.gamma.shape[1]} inputs or outputs and at most {longest} of the "
                f"other, but the weight is {list(fit.shape)}",
                file=stored.path,
                tensor=stored.name,
                hint="is this the base it was trained on?",
            )
        return replace(self, bases=bases, outputs=fit.shape[0], inputs=fit.shape[1])

    def factors(self) -> dict[str, Factor]:
        """``l`` and ``g``; the bases ``A`` and ``B`` where the file has them."""
        stored = () if isinstance(self.bases, RandomBases) else self.bases
        return {"l": self.lam, "g": self.gamma, **dict(zip("AB", stored, strict=False))}

    def low_rank(self) -> None:
        """None: it has full rank."""

    def parts(self) -> tuple[tuple[int, RandLoRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Join the bases once; each block costs a product whose inner size is the shorter axis."""
        lam, gamma = (factor.load(weight.dtype, weight.device) for factor in (self.lam, self.gamma))
        (rank, count), short, long = self.lam.shape, min(self.shape), max(self.shape)
        if isinstance(self.bases, RandomBases):
            A, B = (to_device(basis, weight.device, weight.dtype) for basis in _drawn(self.bases))
        else:
            A, B = (factor.load(weight.dtype, weight.device) for factor in self.bases)
        trained = (lam[:, :, None] * A[:, :, :short] * gamma[None]).reshape(rank * count, short) * self.scale
        fixed = B[:long, :count].reshape(long, count * rank)
        left, right = (fixed, trained) if short == self.inputs else (trained.T, fixed.T)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            return add_product(block, positions(left, 0, rows), positions(right, 1, cols))

        return apply


@lru_cache(maxsize=1)
def _drawn(bases: RandomBases) -> tuple[Array, Array]:
    """A, then B, drawn from one CPU generator and divided by their deviation (PEFT ``tuners/randlora/model.py``)."""
    import numpy

    draws, (short, long), rank = TorchDraws(bases.key), sorted(bases.widest), bases.rank
    count = -(-short // rank)
    edge = 1 / (2 * (math.sqrt(short) if bases.very_sparse else 3))
    A, B = (_signs(draws.uniform(shape), edge) for shape in ((rank, 1, short), (long, count, rank)))
    return tuple(basis / numpy.float32(basis.std(ddof=1, dtype=numpy.float64)) for basis in (A, B))


def _signs(drawn: Array, edge: float) -> Array:
    """-1 below `edge`, 1 above ``1 - edge``, else 0."""
    import numpy

    return (drawn > numpy.float32(1 - edge)).astype(numpy.float32) - (drawn < numpy.float32(edge))
