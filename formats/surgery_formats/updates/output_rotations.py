# SPDX-License-Identifier: Apache-2.0
"""OFT of outputs: ``W' = diag(s) R^T W``, R orthogonal in blocks (Qiu et al. 2023, arXiv:2306.07280; LyCORIS, sd-scripts).

PEFT's OFT and BOFT turn the inputs of a layer (`oft`, `boft`); these turn what a layer gives, but not its bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, cast, namespace
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, take
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.spectrum import whole_weight

__all__ = ["OutputRotation"]


@dataclass(frozen=True, slots=True)
class OutputRotation:
    """A rotation of the rows of a weight, in blocks of neighbours; or several, with a shuffle around each (BOFT).

    With ``Q = X - X^T`` of each block, ``R = (I + Q) (I - Q)^-1``. In the butterfly, factor i turns blocks after
    the rows were shuffled in groups of ``2^i`` blocks, and multiplies by R rather than by its transpose.

    Attributes:
        generators: ``(blocks, n, n)``, or of a butterfly ``(factors, blocks, n, n)``: X.
        rescale: s, ``(out,)``; None for ones.
        limit: Greatest norm of all Q together, to which greater ones are shortened; None without a limit.
        inputs: Columns of the weight; 0 until `fitted`.
        noted: Stored tensors that `limit` was read from.
    """

    kinds: ClassVar[tuple[str, ...]] = ("OFT of outputs", "BOFT of outputs")
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "maps"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None

    generators: Factor
    rescale: Factor | None = None
    limit: float | None = None
    inputs: int = 0
    noted: tuple[Tensor, ...] = ()

    @property
    def kind(self) -> str:
        """Of `kinds`, by the axes of the generators."""
        return self.kinds[self._butterfly]

    @property
    def _butterfly(self) -> bool:
        return len(self.generators.shape) == 4

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        *_, blocks, side, _ = self.generators.shape
        return blocks * side, self.inputs

    @property
    def held_numbers(self) -> int:
        """The weight twice: before, and after."""
        return 2 * self.shape[0] * self.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The generators', the lengths', then those the limit came from."""
        return (*self.generators.tensors, *(self.rescale.tensors if self.rescale else ()), *self.noted)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """What the limit was read from."""
        return self.noted

    def fitted(self, fit: Fit) -> OutputRotation:
        """The columns of the weight."""
        return replace(self, inputs=fit.shape[1])

    def factors(self) -> dict[str, Factor]:
        """``generators``, and ``rescale`` where there are lengths."""
        return {"generators": self.generators, **({"rescale": self.rescale} if self.rescale else {})}

    def low_rank(self) -> None:
        """None: it rotates the weight."""

    def parts(self) -> tuple[tuple[int, OutputRotation], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Read the weight once and turn all of it, in float64; blocks are cut from the result.

        Raises:
            FitError: the base holds the rows in several weights.
        """
        turned = self._turned(whole_weight(weight, self.shape, self.tensors[0]), self._rotations(weight.device))
        if self.rescale is not None:
            turned *= self.rescale.load(DType.F64, weight.device)[:, None]
        turned = cast(turned, weight.dtype)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            block[...] = take(turned, rows, cols)
            return block

        return apply

    def _turned(self, values: Array, rotations: Array) -> Array:
        xp = namespace(values)
        side, (out, inputs) = self.generators.shape[-1], values.shape
        if not self._butterfly:
            return (rotations.mT @ values.reshape(-1, side, inputs)).reshape(out, inputs)
        for number, factor in enumerate(rotations):
            span = (side // 2) << number
            values = xp.permute_dims(values.reshape(-1, 2, span, inputs), (0, 2, 1, 3)).reshape(-1, side, inputs)
            values = (factor @ values).reshape(-1, span, 2, inputs)
            values = xp.permute_dims(values, (0, 2, 1, 3)).reshape(out, inputs)
        return values

    def _rotations(self, device: str) -> Array:
        """``R`` of every block, in float64."""
        X = self.generators.load(DType.F64, device)
        xp = namespace(X)
        Q = X - X.mT
        if self.limit is not None:
            norm = xp.sqrt(xp.sum(Q * Q))
            Q = Q * (self.limit / norm) if norm > self.limit else Q
        identity = xp.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        # (I + Q)(I - Q)^-1 is the transpose of (I + Q)^-1 (I - Q), because Q^T = -Q
        return xp.linalg.solve(identity + Q, identity - Q).mT
