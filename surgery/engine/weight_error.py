# SPDX-License-Identifier: Apache-2.0
"""How far two adapters are from doing the same to one weight.

Equal tensors, and equal factors with a scale of their own, need no product; else the dense changes are compared in float64, a few rows
at a time. Trained lengths, replaced values and token rows are compared as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy

from surgery.engine.factor_proof import relative, scale_error, tensor_error
from surgery_formats.adapters.rows import row_slice
from surgery_formats.arrays import Array, namespace
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import ProofError
from surgery_formats.storage.base import Storage, read_values
from surgery_formats.tensors.apply import Apply, apply_chain
from surgery_formats.tensors.views import View
from surgery_formats.updates import LoRA, Update, is_directed, low_rank_part, settings
from surgery_formats.updates.weights import HeldWeight

__all__ = ["ProofTarget", "adds_nothing", "largest", "weight_error"]

_BLOCK_ELEMENTS = 1 << 20  # 8 MB of float64 per side


@dataclass(frozen=True)
class ProofTarget:
    """All that an adapter does to one weight.

    Attributes:
        shape: Of the matrix the views look into.
        pieces: Updates and where in it they act.
        value: What replaces the weight first.
    """

    shape: tuple[int, int]
    pieces: tuple[tuple[Update, View], ...]
    value: Storage | None = None


def adds_nothing(target: ProofTarget) -> bool:
    """Whether its rows of B are zeros: they stand for what was not trained, where a format stacks it with what was."""
    for update, view in target.pieces:
        lora = update.low_rank()
        if lora is None or largest(lora.B.load(DType.F64)[view.row_origin :][: view.shape[0]]):
            return False
    return target.value is None


def weight_error(name: str, expected: ProofTarget, actual: ProofTarget, written: Adapter) -> float:
    """The greatest error of what is done to a weight, relative to the greatest value of each: delta, lengths, values.

    Args:
        name: Of the weight, for messages.
        expected: What the source does to it.
        actual: What the written adapter does to it.
        written: That adapter, for messages.

    Raises:
        ProofError: only one of them replaces the weight, or has lengths, or the weights have other shapes.
    """
    magnitudes = [_magnitudes(target) for target in (expected, actual)]
    if expected.shape != actual.shape or [key for key, _ in magnitudes[0]] != [key for key, _ in magnitudes[1]]:
        raise ProofError("the written update is of a different kind than the source's", file=written.path, tensor=name)
    error = 0.0
    for (_, mine), (_, theirs) in zip(*magnitudes, strict=True):
        error = max(error, relative(largest(mine - theirs), largest(mine)))
    if (expected.value is None) != (actual.value is None):
        raise ProofError(
            "one of source and output replaces this weight, the other does not", file=written.path, tensor=name
        )
    for by_factors in (_tensor_error, _scale_error):
        if (known := by_factors(expected, actual)) is not None:
            return max(error, known)
    return max(error, _delta_error(expected, actual))


def _magnitudes(target: ProofTarget) -> list[tuple[tuple[object, ...], Array]]:
    """Trained lengths, with what they belong to; those of rows that follow each other are one vector, whoever holds them."""
    found: list[tuple[tuple[object, ...], Array]] = []
    bands: dict[str, list[tuple[int, Array]]] = {}
    for update, view in target.pieces:
        if not is_directed(update):
            continue
        lengths = update.magnitude.load(DType.F64)
        straight = not view.transposed and isinstance(view.rows, range) and view.rows.step == 1 and len(view.rows)
        if update.per_row and straight:
            own = lengths.reshape(-1)[view.row_origin : view.row_origin + len(view.rows)]
            bands.setdefault(update.kind, []).append((view.rows[0], own))
        else:
            found.append(((update.kind, view, update.per_row), lengths))
    for kind, parts in bands.items():
        parts.sort(key=lambda part: part[0])
        rows = [row for start, own in parts for row in range(start, start + len(own))]
        joined = namespace(parts[0][1]).concat([own for _, own in parts]) if len(parts) > 1 else parts[0][1]
        found.append(((kind, tuple(rows)), joined))
    return found


def _added(update: Update) -> Update:
    """What an update adds to its weight, as a LoRA if it has that form.

    The row lengths of a DoRA are compared on their own.
    """
    return low_rank_part(update) or update


def _tensor_error(expected: ProofTarget, actual: ProofTarget) -> float | None:
    """The error of the stored tensors if the delta is neither low-rank nor stored in full; else None."""
    if all(_has_plain_delta(update) for target in (expected, actual) for update, _ in target.pieces):
        return None
    pairs = list(zip(expected.pieces, actual.pieces, strict=False))
    if len(expected.pieces) == len(actual.pieces) and all(_alike(*pair) for pair in pairs):
        return max(tensor_error(mine, theirs) for (mine, _), (theirs, _) in pairs)
    known = (update.effect != "maps" and all(update.shape) for t in (expected, actual) for update, _ in t.pieces)
    return None if all(known) else math.inf


def _has_plain_delta(update: Update) -> bool:
    stored_in_full = update.effect != "maps" and len(update.factors()) == 1 and all(update.shape)
    return stored_in_full or low_rank_part(update) is not None


def _alike(piece: tuple[Update, View], other: tuple[Update, View]) -> bool:
    (mine, view), (theirs, seen) = piece, other
    return type(mine) is type(theirs) and view == seen and settings(mine) == settings(theirs)


def _scale_error(expected: ProofTarget, actual: ProofTarget) -> float | None:
    """The error of the scale, where rows are changed by low-rank updates with equal factors; else None."""
    if expected.value or actual.value:
        return None
    if len(expected.pieces) == len(actual.pieces) == 1:
        (mine, view), (theirs, seen) = expected.pieces[0], actual.pieces[0]
        if view == seen:
            return scale_error(_added(mine), _added(theirs))
    bands, others = _bands(expected), _bands(actual)
    if not bands or not others:
        return None
    edges = sorted({edge for start, stop, _ in (*bands, *others) for edge in (start, stop)})
    worst = 0.0
    for start, stop in pairwise(edges):
        left, right = _band(bands, start, stop), _band(others, start, stop)
        if left is None and right is None:
            continue
        error = scale_error(left, right) if left and right else None
        if error is None:
            return None
        worst = max(worst, error)
    return worst


def _bands(target: ProofTarget) -> list[tuple[int, int, LoRA]]:
    """Rows of the matrix with the LoRA that changes them, from top to bottom; nothing if some are changed in another way."""
    bands = []
    for update, view in target.pieces:
        lora, (height, width) = low_rank_part(update), view.shape
        plain = not view.transposed and isinstance(view.rows, range) and view.rows.step == 1
        if lora is None or not plain or view.cols != range(target.shape[1]) or lora.shape[1] != width or not height:
            return []
        start = view.rows[0]
        bands.append((start, start + height, row_slice(lora, view.row_origin, view.row_origin + height)))
    bands.sort(key=lambda band: band[:2])
    return [] if any(one[1] > other[0] for one, other in pairwise(bands)) else bands


def _band(bands: Sequence[tuple[int, int, LoRA]], start: int, stop: int) -> LoRA | None:
    """The LoRA of rows ``[start, stop)``, which lie in one band or in none."""
    found = next((band for band in bands if band[0] <= start and stop <= band[1]), None)
    return row_slice(found[2], start - found[0], stop - found[0]) if found else None


def _delta_error(expected: ProofTarget, actual: ProofTarget) -> float:
    worst = size = 0.0
    mine, theirs = _applied(expected), _applied(actual)
    step = max(1, _BLOCK_ELEMENTS // max(expected.shape[1], 1))
    for start in range(0, expected.shape[0], step):
        stop = min(start + step, expected.shape[0])
        a, b = _block(expected, mine, start, stop), _block(actual, theirs, start, stop)
        worst = max(worst, largest(a - b))
        size = max(size, largest(a))
    return relative(worst, size)


def _applied(target: ProofTarget) -> list[tuple[View, Apply]]:
    nothing = HeldWeight.zeros(target.shape, DType.F64)
    return [(view, _added(update).prepare(nothing)) for update, view in target.pieces]


def _block(target: ProofTarget, chain: Sequence[tuple[View, Apply]], start: int, stop: int) -> Array:
    """Rows ``[start, stop)`` of what becomes of a weight of zeros, or of the replaced values."""
    if target.value is not None:
        block = read_values(target.value, start, stop, DType.F64)
    else:
        block = numpy.zeros((stop - start, target.shape[1]))
    apply_chain(chain, block, start, stop)
    return block


def largest(values: Array) -> float:
    """The greatest value; infinite if one is no number, which `max` of Python would pass over."""
    found = float(abs(values).max())
    return math.inf if math.isnan(found) else found
