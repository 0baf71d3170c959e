# SPDX-License-Identifier: Apache-2.0
"""BAT, the variant of MiSS that looks at the weight: ``W'pq = W_pq + W_pq B_p + B_p`` (Kang and Yin 2024, arXiv:2409.15371)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, array_of, cast, namespace
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.groups import in_groups

__all__ = ["BAT"]


@dataclass(frozen=True, slots=True)
class BAT:
    """One square matrix for each band of `side` rows, which mixes every `side` columns and is added to them.

    Attributes:
        blocks: ``B``, ``(out / side, side, side)``.
        inputs: Columns of the weight; 0 until `fitted`.
    """

    kind: ClassVar[str] = "BAT"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    blocks: Factor
    inputs: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.blocks.shape[0] * self.group, self.inputs

    @property
    def group(self) -> int:
        """Side of a block: columns that are mixed with each other."""
        return self.blocks.shape[2]

    @property
    def held_numbers(self) -> int:
        """The blocks, and the matrices made of them."""
        return 3 * self.shape[0] * self.group

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The blocks'."""
        return self.blocks.tensors

    def fitted(self, fit: Fit) -> BAT:
        """The columns of the weight.

        Raises:
            FitError: they are no multiple of the blocks' side.
        """
        stored = self.blocks.tensors[0]
        if fit.shape[1] % self.group:
            raise FitError(
                f"blocks of {self.group}, but the weight has {fit.shape[1]} columns",
                file=stored.path,
                tensor=stored.name,
                hint="is this the base it was trained on?",
            )
        return replace(self, inputs=fit.shape[1])

    def factors(self) -> dict[str, Factor]:
        """``blocks``."""
        return {"blocks": self.blocks}

    def low_rank(self) -> None:
        """None: it multiplies the weight."""

    def parts(self) -> tuple[tuple[int, BAT], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load the blocks once; each block of the weight costs `side` multiplications per element."""
        blocks = self.blocks.load(weight.dtype, weight.device)
        return self._mixing(
            blocks + namespace(blocks).eye(self.group, dtype=blocks.dtype, device=blocks.device), blocks
        )

    def lost(self, weight: Weight) -> None:
        """Nothing, unless a block has the eigenvalue -1."""

    def inverse(self, weight: Weight, share: float, lost: Array | None) -> Apply:
        """``(W'pq - w B_p) (I + w B_p)^-1``, in float64 until it is applied."""
        blocks = share * self.blocks.load(DType.F64, weight.device)
        xp = namespace(blocks)
        back = xp.linalg.pinv(blocks + xp.eye(self.group, dtype=blocks.dtype, device=blocks.device))
        return self._mixing(cast(back, weight.dtype), cast(-(blocks @ back), weight.dtype))

    def _mixing(self, mixing: Array, added: Array) -> Apply:
        """``W_pq M_p + N_p``."""
        side = self.group

        def turn(block: Array, rows: Index, cols: Index) -> Array:
            xp = namespace(block)
            for band, at, inside in _bands(rows, side):
                here = at if isinstance(at, slice) else array_of(at, DType.I64, block)
                part = block[here]
                mixed = (part.reshape(-1, side) @ mixing[band]).reshape(part.shape)
                rows_added = added[band][array_of(inside, DType.I64, block)]
                block[here] = mixed + xp.tile(rows_added, (1, len(cols) // side))
            return block

        return in_groups(side, turn)


def _bands(rows: Index, side: int) -> Iterator[tuple[int, slice | list[int], list[int]]]:
    """``(band, positions in the block, positions in the band)`` of every band that `rows` meet."""
    if isinstance(rows, range) and rows.step == 1:
        for band in range(rows.start // side, -(-rows.stop // side)):
            first, last = max(rows.start, band * side), min(rows.stop, (band + 1) * side)
            yield band, slice(first - rows.start, last - rows.start), [row - band * side for row in range(first, last)]
        return
    found: dict[int, list[int]] = {}
    for position, row in enumerate(rows):
        found.setdefault(row // side, []).append(position)
    for band, at in found.items():
        yield band, at, [rows[position] - band * side for position in at]
