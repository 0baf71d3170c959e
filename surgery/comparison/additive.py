# SPDX-License-Identifier: Apache-2.0
"""Sizes and differences of additive updates.

Deltas are compared, not factors: many pairs of factors have the same delta.

No delta of low rank is formed: norms, inner products and singular values come from QR of the factors, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.comparison.entries import Profile, Side
from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.updates import LoRA, Update, in_full, low_rank_part

__all__ = [
    "SHARES",
    "Chain",
    "Squares",
    "are_sums",
    "blocks_of",
    "compared",
    "measured_side",
    "ratio",
    "side_of",
    "spectra_of",
]

Chain = tuple[Update, ...]

SHARES = (0.5, 0.9, 0.99)
"""Of the energy, for which directions are counted."""


@dataclass(frozen=True, slots=True)
class Squares:
    """Squares of norms, to be added up over weights.

    Attributes:
        a: Of what A adds.
        b: Of what B adds.
        difference: Of the difference.
        product: The inner product of the two.
    """

    a: float = 0.0
    b: float = 0.0
    difference: float = 0.0
    product: float = 0.0

    def plus(self, other: Squares) -> Squares:
        """The sums of both."""
        return Squares(
            self.a + other.a, self.b + other.b, self.difference + other.difference, self.product + other.product
        )


def ratio(part: float, whole: float) -> float:
    """``part / whole``; of nothing, 0 or infinite."""
    return part / whole if whole else (0.0 if part == 0.0 else math.inf)


def are_sums(chain: Chain) -> bool:
    """Whether all that is done to the weight is low-rank terms and full differences, added up."""
    return all(in_full(part) or part.low_rank() for update in chain for _, part in update.parts())


def blocks_of(chain: Chain) -> list[list[LoRA]]:
    """Low-rank terms, those of one expert together; the direction of a DoRA counts as one."""
    columns = [update.parts() for update in chain]
    count = max(len(parts) for parts in columns)
    experts = [parts for parts in columns if len(parts) == count]
    return [[lora for parts in experts if (lora := low_rank_part(parts[e][1]))] for e in range(count)]


def side_of(chain: Chain) -> Side:
    """A side from the header alone."""
    blocks = blocks_of(chain)
    scales = {lora.scale for block in blocks for lora in block}
    rank = sum(lora.rank for lora in blocks[0]) if scales else None
    kind = "+".join(dict.fromkeys(update.kind for update in chain))
    return Side(kind, chain[0].shape, rank, next(iter(scales)) if len(scales) == 1 else None)


def measured_side(chain: Chain) -> Side:
    """A side with the norm of the delta, and its profile if it has one."""
    import numpy

    side, spectra = side_of(chain), spectra_of(chain)
    offsets = [float(numpy.linalg.norm(value)) for value in _full(chain)]
    norm = None  # what replaces a weight, or sets its lengths, has a delta only beside the base
    if are_sums(chain):
        norm = math.hypot(float(numpy.linalg.norm(numpy.concat(spectra))) if spectra else 0.0, *offsets)
    return Side(side.kind, side.shape, side.rank, side.scale, norm, _profile(spectra) if spectra else None)


def spectra_of(chain: Chain) -> list[Array]:
    """The singular values of the low-rank terms, of each expert by itself."""
    from surgery.algebra.sums import stacked
    from surgery_formats.linalg.factored import singular_values

    return [singular_values(*stacked(block)) for block in blocks_of(chain) if block]


def _profile(spectra: Sequence[Array]) -> Profile:
    """The profile of one matrix; for stacked experts the greatest of theirs."""
    stable, ranks = 0.0, {f"{share:g}": 0 for share in SHARES}
    for values in spectra:
        squares = values**2
        whole = float(squares.sum())
        if not whole:
            continue
        stable = max(stable, whole / float(squares[0]))
        held = squares.cumsum()
        for share in SHARES:
            needed = int((held < share * whole * (1 - 1e-12)).sum()) + 1
            ranks[f"{share:g}"] = max(ranks[f"{share:g}"], needed)
    return Profile(stable, ranks)


def compared(mine: Chain, theirs: Chain) -> Squares:
    """Everything that is added to one weight by two adapters, expert by expert."""
    import numpy

    from surgery.algebra.sums import stacked
    from surgery_formats.linalg.factored import factored_inner, factored_norm

    sums = Squares()
    for block, other in zip(blocks_of(mine), blocks_of(theirs), strict=True):
        if not block and not other:
            continue
        out, inputs = mine[0].shape
        nothing = numpy.zeros((out, 0)), numpy.zeros((0, inputs))
        (B, A), (D, C) = (stacked(loras) if loras else nothing for loras in (block, other))
        same = numpy.array_equal(B, D) and numpy.array_equal(A, C)
        difference = 0.0 if same else factored_norm(numpy.hstack([B, -D]), numpy.vstack([A, C]))
        squares = factored_norm(B, A) ** 2, factored_norm(D, C) ** 2
        sums = sums.plus(Squares(*squares, difference**2, factored_inner(B, A, D, C)))
    offsets = [_full(chain) for chain in (mine, theirs)]
    if any(offsets):
        shape = (offsets[0] or offsets[1])[0].shape
        left, right = (sum(values, numpy.zeros(shape)) for values in offsets)
        sums = sums.plus(_dense(left, right))
    return sums


def _full(chain: Chain) -> list[Array]:
    """What is stored in full of that which is added to one weight."""
    offsets = [offset for update in chain if (offset := in_full(update))]
    return [offset.value.load(DType.F64) * offset.scale for offset in offsets]


def _dense(left: Array, right: Array) -> Squares:
    return Squares(
        float((left**2).sum()),
        float((right**2).sum()),
        float(((right - left) ** 2).sum()),
        float((left * right).sum()),
    )
