# SPDX-License-Identifier: Apache-2.0
"""Codes that a weight has already, as codes of blocks of inputs: the same numbers to the bit, or not these outputs.

Any grid of even steps from a whole zero point fits, whatever program wrote it: GPTQ, AWQ, compressed-tensors, GGUF's Q4_0,
Q5_0 and Q8_0, HQQ with whole zero points. So do numbers that are whole multiples of the first step, where the codes have bits
enough: E2M1's are halves up to 6, and so codes of 8 bits hold MXFP4. What a code stands for is asked of the codec, so no
format is named here.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import is_stacked
from surgery_formats.storage.grouped_grid import GroupedGrid

if TYPE_CHECKING:
    from surgery_formats.storage.block_format import BlockFormat
    from surgery_formats.storage.quantised import Quantised

__all__ = ["fitting_format", "own_codes"]


class OwnCodes(NamedTuple):
    """Codes of some outputs of a weight.

    Attributes:
        codes: uint8 ``(out, in)``.
        grid: What they stand for.
        fits: ``(out,)`` whether the codes of an output stand for its values.
    """

    codes: Array
    grid: GroupedGrid
    fits: Array


_BLOCKS = (128, 64, 32, 16)
_PROBED = 128  # rows that are looked at: a whole block where rows are inputs


def fitting_format(source: Quantised, wanted: BlockFormat, *, turned: bool, wide: bool) -> BlockFormat | None:
    """The format that holds a weight's own codes with no more bits than `wanted`; None if there is none.

    The codes of some rows are read, and all scales where they are held as such.

    Args:
        source: The weight; a matrix, or a stack of such whose rows are outputs.
        wanted: Its blocks are kept where the weight's own are a multiple.
        turned: Whether rows of its matrix are inputs.
        wide: Whether scales may be float32 where 16 bits do not hold them.
    """
    sizes = [bits for bits in (4, 8) if source.bits <= bits <= wanted.bits]
    if not sizes or not (len(source.sizes) == 2 or (is_stacked(source) and not turned)):
        return None
    shared, inputs = (source.block[0], source.shape[0]) if turned else (source.block[1], source.shape[1])
    block = next((size for size in (wanted.block, *_BLOCKS) if shared % size == 0 or shared >= inputs), None)
    if block is None:
        return None
    rows = min(source.shape[0], max(_PROBED, source.group))
    rows = rows // source.group * source.group or source.shape[0]
    values = source.grid(0, rows).values(source.codes(0, rows))
    scale_types = (wanted.scale_type, DType.F32) if wide else (wanted.scale_type,)
    for bits, scale_type, symmetric in itertools.product(sizes, scale_types, (True, False)):
        form = replace(wanted, bits=bits, block=block, symmetric=symmetric, scale_type=scale_type)
        if symmetric and not _all_middle(source):
            continue
        if own_codes(source, 0, rows, form, values.T if turned else values, turned=turned).fits.all():
            return form
    return None


def _all_middle(source: Quantised) -> bool:
    """Whether all zero points of a weight are the same, as far as they are held by group; others are probed alone."""
    grid = source.grid(0, source.shape[0])
    if not isinstance(grid, GroupedGrid) or grid.zeros is None:
        return True
    return bool((grid.zeros == grid.zeros.flat[0]).all())


def own_codes(source: Quantised, start: int, count: int, form: BlockFormat, values: Array, *, turned: bool) -> OwnCodes:
    """Codes and grid of rows of a weight, and in which outputs they stand for `values` ``(out, in)``, bit for bit.

    Every output is judged by itself, so that nothing depends on how many are taken at once.
    """
    import numpy as np

    codes, grid = source.codes(start, start + count), source.grid(start, start + count)
    first, second = (grid.values(np.full_like(codes, code)) for code in (0, 1))
    if turned:
        codes, first, second = codes.T, first.T, second.T
    zero_values, steps = first[:, :: form.block], (second - first)[:, :: form.block]
    found = _placed(codes.astype(np.int16), zero_values, steps, form, values)
    if found.fits.all() or form.bits <= source.bits:
        return found
    widths = _spread(np.where(steps == 0, np.float32(1), steps), form.block, codes.shape[1])
    multiples = np.clip(np.rint((values - _spread(zero_values, form.block, codes.shape[1])) / widths), -512, 512)
    others = _placed(multiples.astype(np.int16), zero_values, steps, form, values)
    better = ~found.fits & others.fits
    assert found.grid.zeros is not None
    assert others.grid.zeros is not None
    found.codes[better], found.grid.zeros[better] = others.codes[better], others.grid.zeros[better]
    return found._replace(fits=found.fits | better)


def _placed(codes: Array, zero_values: Array, steps: Array, form: BlockFormat, values: Array) -> OwnCodes:
    """Whole numbers of steps as codes of `form`; what is 0 lies at `zero_values`, a column for each block."""
    import numpy as np

    none = steps == 0  # all codes are 0, whatever the zero point
    zeros = np.where(none, np.float32(0), np.rint(-zero_values / np.where(none, np.float32(1), steps)))
    if form.symmetric:
        shift = form.middle - zeros
    else:
        signed = (codes.min(1) < 0) | (zeros.min(1) < 0)
        shift = np.where(signed, np.float32(form.middle), np.float32(0))[:, None] * np.ones_like(zeros)
    spread = _spread(none, form.block, codes.shape[1])
    moved = np.where(spread, np.float32(form.middle), codes + _spread(shift, form.block, codes.shape[1]))
    zeros = np.where(none, np.float32(form.middle), zeros + shift)
    most = form.largest
    fits = (zeros.min(1) >= 0) & (zeros.max(1) <= most) & (moved.min(1) >= 0) & (moved.max(1) <= most)
    scales = cast(cast(steps, form.scale_type), DType.F32)
    found = GroupedGrid(scales, np.clip(zeros, 0, most), None, form.block, 1, most, fitted=True)
    moved = np.clip(moved, 0, most).astype(np.uint8)
    fits &= (found.values(moved) == values).all(1)
    return OwnCodes(moved, found, fits)


def _spread(blocks: Array, size: int, inputs: int) -> Array:
    import numpy as np

    spread: Array = np.repeat(blocks, size, 1)[:, :inputs]
    return spread
