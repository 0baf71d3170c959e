# SPDX-License-Identifier: Apache-2.0
"""Updates of a fused projection cut to its parts, and those of the parts as one: of any kind that has rows; exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy

from surgery_formats.adapters.rows import cut, joined_lengths, joined_loras
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.computed import computed
from surgery_formats.updates import Factor, LoRA, Offset, Update, in_full, is_directed

__all__ = ["cut_rows", "join_rows"]


def cut_rows(update: Update, site: Site, start: int, stop: int, file: Path) -> Update:
    """The update of rows ``[start, stop)``, for the weight `site`.

    Raises:
        FitError: its kind has no rows to cut; `file` is the adapter's.
    """
    part = cut(update.low_rank() or in_full(update) or update, [(start, stop)])
    if part is None:
        raise FitError(f"is changed by a {update.kind}, which has no rows to cut", file=file, tensor=site.path)
    return part


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
    rows = accumulate(heights, initial=0)
    places = [
        (part.magnitude, [((0, height), row)]) for part, height, row in zip(directed, heights, rows, strict=False)
    ]
    lengths = joined_lengths(str(site), places, sum(heights))
    assert lengths is not None  # every part has its own
    return directed[0].rebuilt(_join_loras([part.direction for part in directed], heights, site), lengths)


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
    rows = accumulate(heights, initial=0)
    parts = [(lora, [((0, height), row)]) for lora, height, row in zip(loras, heights, rows, strict=False) if lora]
    whole = joined_loras(str(site), parts, sum(heights))
    return replace(whole, alpha=whole.scale * whole.rank)
