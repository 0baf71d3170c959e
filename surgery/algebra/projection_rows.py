# SPDX-License-Identifier: Apache-2.0
"""Updates of some rows of a weight, and the updates of rows under each other as one; exact.

Cutting keeps A and takes rows of B. Joining puts the parts' B on the diagonal of one and their A under each other,
which has the ranks' sum; where all parts have one A, as after cutting, B goes back under each other and the rank stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy

from surgery_formats.adapters.writing import factor_dtype
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.computed import computed
from surgery_formats.updates import Factor, LoRA, Offset, Update, equal_factors, in_full, is_directed

__all__ = ["cut_rows", "join_rows"]


def cut_rows(update: Update, site: Site, start: int, stop: int, file: Path) -> Update:
    """The update of rows ``[start, stop)``, for the weight `site`.

    Raises:
        FitError: its kind has no rows to cut; `file` is the adapter's.
    """
    if (lora := update.low_rank()) is not None:
        return _cut_lora(lora, site, start, stop)
    if is_directed(update) and update.per_row:
        magnitude = _rows(f"{site}.magnitude", update.magnitude, start, stop)
        return update.rebuilt(_cut_lora(update.direction, site, start, stop), magnitude)
    if (offset := in_full(update)) is not None:
        return Offset(_rows(f"{site}.value", offset.value, start, stop), offset.scale)
    raise FitError(f"is changed by a {update.kind}, which has no rows to cut", file=file, tensor=site.path)


def _cut_lora(lora: LoRA, site: Site, start: int, stop: int) -> LoRA:
    A, B = _copied(f"{site}.A", lora.A), _rows(f"{site}.B", lora.B, start, stop)
    return LoRA(A, B, lora.scale, lora.alpha)


def _copied(name: str, factor: Factor) -> Factor:
    return Factor.of(computed(name, factor.shape, factor.tensors, lambda: factor.load(DType.F64), _type_of([factor])))


def _rows(name: str, factor: Factor, start: int, stop: int) -> Factor:
    shape = (stop - start, *factor.shape[1:])

    def values() -> Array:
        return factor.load(DType.F64)[start:stop]

    return Factor.of(computed(name, shape, factor.tensors, values, _type_of([factor])))


def join_rows(chains: Sequence[tuple[Update, ...] | None], heights: Sequence[int], site: Site, file: Path) -> Update:
    """The updates of parts, of which there may be none, as one of the whole weight `site`; `heights` are rows of parts.

    Raises:
        FitError: the parts are changed in different ways, or in one that cannot be joined.
    """
    present = [chain for chain in chains if chain]
    kinds = sorted({update.kind for chain in present for update in chain})
    if len(kinds) > 1 or any(len(chain) > 1 for chain in present):
        raise FitError(f"its parts are changed by {', '.join(kinds)}", file=file, tensor=site.path)
    parts = [None if chain is None else chain[0] for chain in chains]
    loras = [None if part is None else part.low_rank() for part in parts]
    if sum(lora is not None for lora in loras) == len(present):
        return _join_loras(loras, heights, site)
    offsets = [None if part is None else in_full(part) for part in parts]
    if any(offsets):
        return _join_offsets(offsets, heights, site)
    directed = [part for part in parts if part and is_directed(part)]
    if len(directed) < len(parts) or not all(part.per_row for part in directed):
        some = " in some of its parts only: the lengths of the others are the base's" if directed else ""
        raise FitError(f"is changed by a {kinds[0]}{some}", file=file, tensor=site.path)
    magnitudes = [part.magnitude for part in directed]
    magnitude = computed(
        f"{site}.magnitude",
        (sum(heights),),
        [tensor for part in magnitudes for tensor in part.tensors],
        lambda: numpy.concat([part.load(DType.F64) for part in magnitudes]),
        _type_of(magnitudes),
    )
    direction = _join_loras([part.direction for part in directed], heights, site)
    return directed[0].rebuilt(direction, Factor.of(magnitude))


def _join_offsets(offsets: Sequence[Offset | None], heights: Sequence[int], site: Site) -> Offset:
    present = [offset for offset in offsets if offset is not None]
    tail = present[0].value.shape[1:]

    def values() -> Array:
        blocks = [
            numpy.zeros((height, *tail)) if offset is None else offset.value.load(DType.F64) * offset.scale
            for offset, height in zip(offsets, heights, strict=True)
        ]
        return numpy.concat(blocks)

    sources = [tensor for offset in present for tensor in offset.tensors]
    return Offset(Factor.of(computed(f"{site}.value", (sum(heights), *tail), sources, values)))


def _join_loras(loras: Sequence[LoRA | None], heights: Sequence[int], site: Site) -> LoRA:
    present = [lora for lora in loras if lora is not None]
    first = present[0]
    one_scale = all(lora.scale == first.scale for lora in present)
    times = [1.0 if lora is None or one_scale else lora.scale for lora in loras]
    scale = first.scale if one_scale else 1.0
    a_type, b_type = (_type_of(factors) for factors in zip(*((lora.A, lora.B) for lora in present), strict=True))
    if not one_scale and b_type.bits < 32:
        b_type = DType.F32
    shared = len(present) == len(loras) and all(equal_factors(first.A, lora.A) for lora in present[1:])
    rank = first.rank if shared else sum(lora.rank for lora in present)

    def up() -> Array:
        whole = numpy.zeros((sum(heights), rank))
        row = column = 0
        for lora, height, factor in zip(loras, heights, times, strict=True):
            if lora is not None:
                at = 0 if shared else column
                whole[row : row + height, at : at + lora.rank] = lora.B.load(DType.F64) * factor
                column += lora.rank
            row += height
        return whole

    def down() -> Array:
        return numpy.concat([lora.A.load(DType.F64) for lora in (present[:1] if shared else present)])

    sources = [tensor for lora in present for tensor in lora.tensors]
    A = computed(f"{site}.A", (rank, first.shape[1]), sources, down, a_type)
    B = computed(f"{site}.B", (sum(heights), rank), sources, up, b_type)
    return LoRA(Factor.of(A), Factor.of(B), scale, scale * rank)


def _type_of(factors: Sequence[Factor]) -> DType:
    """Rows are moved, not computed: the type stays."""
    return factor_dtype(factors, folded=False)
