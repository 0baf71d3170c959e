# SPDX-License-Identifier: Apache-2.0
"""Where another program has a weight of a base: in parts of its own, with halves exchanged, or as rows of a larger one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from surgery_formats.adapters.rows import Span, cut, narrowed
from surgery_formats.models.names import Names, WeightSlice, extent
from surgery_formats.storage.parameter import Parameter
from surgery_formats.updates import Update

__all__ = ["Program", "Whole", "relaid", "whole_of"]

Program = Literal["diffusers", "OMI"]
"""Whose names are wanted."""


def relaid(
    update: Update, slices: tuple[WeightSlice, ...], names: Names, program: Program
) -> tuple[tuple[str, Update], ...]:
    """`update` by the names of the weights that a program has in place of the one at `slices`.

    Empty if the program's weights are not rows of this one, or if the update cannot be cut: lengths of columns, for one, belong to
    all of its rows.

    Args:
        update: Of the whole weight.
        slices: Where the base holds it.
        names: Of the base's network.
        program: Whose names.
    """
    here = [place.parameter.name.removeprefix(names.prefix) for place in slices]
    found: list[tuple[str, Update]] = []
    covered: list[Span] = []
    for name in dict.fromkeys(other for own in here for other in names.called_by(own, program)):
        ranges = _rows_of(names.resolve(name), slices)
        if not ranges:  # another part of what the base holds with this one
            continue
        part = cut(update, ranges)
        if part is None:
            return ()
        covered += ranges
        found.append((name, part if part is update else narrowed(part)))
    covered.sort()
    meets = all(before[1] == after[0] for before, after in pairwise(covered))
    whole = bool(covered) and (covered[0][0], covered[-1][1]) == (0, extent(slices)[0])
    return tuple(found) if meets and whole else ()


@dataclass(frozen=True, slots=True)
class Whole:
    """A weight that another one is rows of.

    Attributes:
        name: Of it.
        height: Rows that it has.
        rows: Those of the other one from top to bottom, and at which of its own each of them lies.
    """

    name: str
    height: int
    rows: tuple[tuple[Span, int], ...]

    @property
    def is_filled(self) -> bool:
        """Whether the other one is all of it, in the same order."""
        return self.rows == (((0, self.height), 0),)


def whole_of(slices: tuple[WeightSlice, ...], names: Names, *, in_release: bool) -> Whole | None:
    """The weight that those at `slices` are all rows of; None if they are rows of several, or anything else.

    Args:
        slices: Where the base holds a weight.
        names: Of the base's network.
        in_release: Whether the weight is meant that the network's makers have, instead of the one that the base has.
    """
    here = {place.parameter.name.removeprefix(names.prefix) for place in slices}
    called = {names.in_release(name) if in_release else name for name in here}
    if len(called) > 1:
        return None
    (name,) = called
    whole = (WeightSlice(names.parameters[name]),) if name in names.parameters else names.resolve(name)
    spans = _rows_of(slices, whole)
    starts = accumulate((stop - start for start, stop in spans), initial=0)
    rows = tuple(((own, own + stop - start), start) for (start, stop), own in zip(spans, starts, strict=False))
    return Whole(name, extent(whole)[0], rows) if rows else None


def _rows_of(wanted: Sequence[WeightSlice], slices: Sequence[WeightSlice]) -> tuple[Span, ...]:
    """Which rows of the weight at `slices` those of `wanted` are, from top to bottom; empty if some are none of it."""
    ranges: list[Span] = []
    for piece in (place.parameter for place in wanted):
        rows = piece.view.rows
        if not isinstance(rows, range) or rows.step != 1:
            return ()
        at = rows.start
        while at < rows.stop:
            found = next((span for place in slices if (span := _span(piece, place.parameter, at, rows.stop))), None)
            if found is None:
                return ()
            ranges.append(found)
            at += found[1] - found[0]
    return tuple(ranges)


def _span(piece: Parameter, own: Parameter, start: int, stop: int) -> Span | None:
    """The rows of a weight that are those of `piece` from `start`, up to `stop` or the end of one of the weight's pieces."""
    rows, view = own.view.rows, own.view
    same = piece.name == own.name and (piece.view.cols, piece.view.transposed) == (view.cols, view.transposed)
    if not (same and isinstance(rows, range) and rows.step == 1 and rows.start <= start < rows.stop):
        return None
    first = view.row_origin + start - rows.start
    return first, first + min(stop, rows.stop) - start
