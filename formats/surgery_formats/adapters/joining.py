# SPDX-License-Identifier: Apache-2.0
"""LoRAs of the parts of a weight as one of the whole, and back: both are exact.

Parts with one A become a LoRA of its rank. Others lie side by side: A's below each other, and B's along the diagonal, as
sd-scripts merges its split projections. A part of that needs only the directions that its rows use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.tensors.computed import computed
from surgery_formats.updates import Factor, LoRA

if TYPE_CHECKING:
    import numpy

__all__ = ["Span", "joined", "narrowed", "runs"]

Span = tuple[int, int]
"""First row, and the one behind the last."""


def joined(name: str, parts: Sequence[tuple[LoRA, Sequence[tuple[Span, int]]]], height: int) -> LoRA:
    """One LoRA of a weight that does what LoRAs of its rows do.

    Args:
        name: Of the weight, for messages.
        parts: Each LoRA, and which of its rows lie at which row of the weight.
        height: Rows of the weight; those that no part has stay as they are.
    """
    loras = [lora for lora, _ in parts]
    first, alike = loras[0], all(lora.scale == loras[0].scale for lora in loras)
    shared = len(loras) > 1 and all(_equal(first.A, lora.A) for lora in loras[1:])
    ranks = [lora.rank for lora in loras]
    rank = first.rank if shared else sum(ranks)
    factors = [factor for lora in loras for factor in (lora.A, lora.B)]
    types = {tensor.dtype for factor in factors for tensor in factor.tensors}
    dtype = next(iter(types)) if alike and len(types) == 1 and not any(f.view for f in factors) else DType.F32

    def below() -> Array:
        import numpy

        values = [_values(lora.A) for lora in loras[: 1 if shared else None]]
        return numpy.concatenate(values)

    def beside() -> Array:
        import numpy

        values = [_values(lora.B) * (1.0 if alike else lora.scale) for lora in loras]
        whole = numpy.zeros((height, rank), values[0].dtype)
        column = 0
        for (_, places), part in zip(parts, values, strict=True):
            for (start, stop), row in places:
                whole[row : row + stop - start, column : column + part.shape[1]] = part[start:stop]
            column += 0 if shared else part.shape[1]
        return whole

    a, b = (rank, first.shape[1]), (height, rank)
    noted = tuple(tensor for lora in loras for tensor in lora.noted)
    down = computed(name, a, (t for lora in loras for t in lora.A.tensors), below, dtype)
    up = computed(name, b, (t for lora in loras for t in lora.B.tensors), beside, dtype)
    return LoRA(Factor.of(down), Factor.of(up), first.scale if alike else 1.0, None, noted)


def runs(rows: Iterable[tuple[Span, int]]) -> list[tuple[Span, int]]:
    """Rows that follow each other on both sides as one."""
    found: list[tuple[Span, int]] = []
    for (start, stop), at in rows:
        if found and found[-1][0][1] == start and found[-1][1] + start - found[-1][0][0] == at:
            found[-1] = (found[-1][0][0], stop), found[-1][1]
        else:
            found.append(((start, stop), at))
    return found


def narrowed(lora: LoRA) -> LoRA:
    """The same LoRA without columns of B that are zero, which the first row of a block on a diagonal shows already."""
    tensor = lora.B.tensors[0]
    if lora.B.view is not None or tensor.shape != lora.B.shape or _values_of(tensor.read(0, 1)).all():
        return lora
    used = (_values(lora.B) != 0).any(axis=0).nonzero()[0]
    if not 0 < len(used) < lora.rank:
        return lora
    a, b = lora.A, lora.B
    down = Factor(a.tensors, (len(used), a.shape[1]), lambda *stored: a.show(stored)[used])
    up = Factor(b.tensors, (b.shape[0], len(used)), lambda *stored: b.show(stored)[:, used])
    return replace(lora, A=down, B=up, alpha=None)


def _equal(first: Factor, second: Factor) -> bool:
    """Whether two factors have the same values."""
    import numpy

    if first.shape != second.shape:
        return False
    return first is second or numpy.array_equal(_values(first), _values(second))


def _values(factor: Factor) -> numpy.ndarray:
    return _values_of(factor.load(None))


def _values_of(values: Array) -> numpy.ndarray:
    found: numpy.ndarray = cast(values, DType.F32)
    return found
