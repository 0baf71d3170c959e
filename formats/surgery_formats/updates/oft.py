# SPDX-License-Identifier: Apache-2.0
"""OFT: ``W' = W R^T``, R orthogonal and block-diagonal (Qiu et al. 2023, arXiv:2306.07280; on inputs: arXiv:2506.19847)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, array_of, cast, namespace
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.groups import in_groups

__all__ = ["OFT"]


@dataclass(frozen=True, slots=True)
class OFT:
    """A rotation of the inputs of a layer, in blocks of `block` neighbours.

    It mixes the columns within a block; rows stay independent.

    As in PEFT 0.18 and later (``tuners/oft/layer.py``), each block is computed from a skew-symmetric Q by the Cayley
    transform ``(I - Q)(I + Q)^-1``, or by a series ``I + 2Q + 2Q^2 + ... + Q^k`` whose last term has weight one. The
    series tends to the *transpose* of the transform, so the two are not interchangeable.

    Attributes:
        angles: ``oft_R.weight``, the strictly upper triangles of Q, ``(blocks, block (block - 1) / 2)``; one row if the
            blocks share it.
        block: Side of a block.
        terms: Of the series; 0 for the exact transform.
        radius: COFT: a Q of a greater norm is shortened to it; None without the constraint.
        shared: Whether one block is repeated along the diagonal.
        embedding: The rotation acts on what an embedding gives, ``W' = W R``.
        kernels: Whether kernels of convolutions were rotated as they lie, ``W' = W R`` (OneTrainer), and not their inputs.
        outputs: Rows of the weight; 0 until `fitted`.
        inputs: Its columns; 0 until `fitted` where the file does not tell.
    """

    kind: ClassVar[str] = "OFT"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None

    angles: Factor
    block: int
    terms: int
    radius: float | None = None
    shared: bool = False
    embedding: bool = False
    outputs: int = 0
    inputs: int = 0
    kernels: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.outputs, self.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The angles'."""
        return self.angles.tensors

    @property
    def group(self) -> int:
        """Columns that are mixed with each other."""
        return self.block

    @property
    def held_numbers(self) -> int:
        """The rotations, and what they are made of."""
        return 5 * self.inputs * self.block

    def fitted(self, fit: Fit) -> OFT:
        """The rows of the weight, and its columns where one block is repeated.

        Raises:
            FitError: a convolution with a kernel, or a width that is not a multiple of the block.
        """
        stored = self.angles.tensors[0]
        if fit.kernel > 1 and not self.kernels:
            raise FitError(
                "OFT on a convolution with a kernel: attached, PEFT rotates overlapping patches, "
                "which no weight can do",
                file=stored.path,
                tensor=stored.name,
                hint="keep it beside the base, in PEFT",
            )
        inputs = fit.shape[1] if self.shared else self.inputs
        if inputs % self.block:
            raise FitError(
                f"blocks of {self.block}, but the weight has {inputs} columns",
                file=stored.path,
                tensor=stored.name,
                hint="is this the base it was trained on?",
            )
        turns_kernel = self.kernels and fit.convolution
        return replace(self, outputs=fit.shape[0], inputs=inputs, embedding=self.embedding or turns_kernel)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """Nothing: every stored number was trained."""
        return ()

    def factors(self) -> dict[str, Factor]:
        """``angles``."""
        return {"angles": self.angles}

    def low_rank(self) -> None:
        """None: it rotates the weight."""

    def parts(self) -> tuple[tuple[int, OFT], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Make the blocks of R in float64 once; each block of the weight costs `block` multiplications per element."""
        return self._turning(cast(self._turned(weight.device), weight.dtype))

    def lost(self, weight: Weight) -> None:
        """Nothing: a rotation is undone by its transpose."""

    def inverse(self, weight: Weight, share: float, lost: Array | None) -> Apply:
        """``W' ((1 - w) I + w R^T)^-1``, the inverse made in float64 once."""
        turned = self._turned(weight.device)
        xp = namespace(turned)
        identity = xp.eye(self.block, dtype=turned.dtype, device=turned.device)
        mixed = turned if share == 1.0 else (1 - share) * identity + share * turned
        return self._turning(cast(xp.linalg.inv(mixed), weight.dtype))

    def _turned(self, device: str) -> Array:
        """What rows are multiplied by, ``(blocks, n, n)`` in float64."""
        rotations = self.rotations(device)
        return rotations if self.embedding else rotations.mT

    def _turning(self, turned: Array) -> Apply:
        """Multiply the columns in their groups by `turned`, from the right."""
        xp = namespace(turned)

        def turn(block: Array, rows: Index, cols: Index) -> Array:
            first, last = cols[0] // self.block, (cols[-1] + 1) // self.block
            mixed = turned if self.shared else turned[first:last]
            parts = xp.permute_dims(block.reshape(len(block), last - first, self.block), (1, 0, 2))
            return xp.permute_dims(parts @ mixed, (1, 0, 2)).reshape(len(block), len(cols))

        return in_groups(self.block, turn)

    def rotations(self, device: str = "cpu") -> Array:
        """``(blocks, n, n)`` in float64; one block if it is shared."""
        import numpy

        angles = self.angles.load(DType.F64, device)
        xp, n = namespace(angles), self.block
        rows, cols = (array_of(index, DType.I64, angles) for index in numpy.triu_indices(n, 1))
        Q = xp.zeros((len(angles), n, n), dtype=angles.dtype, device=angles.device)
        Q[:, rows, cols] = angles
        Q = Q - Q.mT
        if self.radius is not None:
            limit = self.radius / math.sqrt(len(Q))
            norms = xp.linalg.matrix_norm(Q, keepdims=True)
            Q = xp.where(norms <= limit, Q, limit * (Q / norms))
        identity = xp.eye(n, dtype=Q.dtype, device=Q.device)
        # (I - Q)(I + Q)^-1 is the transpose of (I - Q)^-1 (I + Q), because Q^T = -Q
        return _series(Q, identity, self.terms) if self.terms else xp.linalg.solve(identity - Q, identity + Q).mT


def _series(Q: Array, identity: Array, terms: int) -> Array:
    """PEFT's Cayley-Neumann series; with three terms it is that of four (its loop adds the last power always)."""
    R = identity + 2 * Q if terms > 1 else identity + 0 * Q
    if terms > 2:
        power = Q @ Q
        R += 2 * power
        for _ in range(3, terms - 1):
            power = power @ Q
            R += 2 * power
        R += power @ Q
    return R
