# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a weight that keeps its quantised format: which scales, how to round, and what it did to the update.

Both choices are made for each weight, by trying on a sample of its rows, and judged by the update, not by the plain
error: fresh scales, which fit the new values better, round every element anew and bury a small update in noise.

- Scales: those of the base, unless fresh ones serve the update better (`_worth`).
- Rounding: to nearest, unless that would lose a part of the update; then with error feedback along the inputs that the
  update listens to, the rows of its A (`surgery_formats.linalg.feedback`). With inputs from a calibration always.

Blocks are taken in order and have a fixed size, so that nothing depends on the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy

from surgery.engine.blocks import block_height, row_group
from surgery.engine.ledger import CodeChange
from surgery.engine.plan import Compute
from surgery.engine.quantised.code_tally import CodeTally
from surgery.engine.quantised.input_moment import SecondMoment, second_moment
from surgery.engine.quantised.listening import Span, spans
from surgery_formats.arrays import Array, assign, cast, dtype_of, empty, energy, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.linalg.feedback import ErrorFeedback, Nearest, feedback, round_columns, round_rows, step_width
from surgery_formats.linalg.survival import Survival
from surgery_formats.storage.aligned import oriented
from surgery_formats.storage.base import PartBytes
from surgery_formats.storage.quantised import Grid, is_quantised
from surgery_formats.tensors.apply import Apply, apply_chain
from surgery_formats.tensors.views import View

__all__ = ["RequantisedBlock", "WeightRequantiser"]

_ENOUGH = 0.9
"""Share of the update that nearest has to keep: above, feedback only adds noise (docs/quantised.md has the measurement)."""
_NOISE = 0.03  # what noise with the energy of the update costs, in shares of the update
_BETTER = 0.01  # shares of the update by which fresh scales must be better if codes are rounded to nearest
_HALVED = 0.5  # times the noise that fresh scales may have to be better as well, where they keep no less
_QUIETER = 0.9  # times the noise that fresh scales may have if feedback keeps the update on either
_MISSED = 0.04  # of the update's norm inside its inputs: what feedback may leave there
_LEAST, _MOST = 1e-4, 1.0  # of the diagonal of H
_SAMPLES, _SAMPLE_ROWS, _SAMPLE_ELEMENTS = 8, 16, 1 << 19
_MIX = numpy.float32(0.618)  # an irrational mean of two numbers of a grid lies anywhere between two others
_EVERY = 8  # outputs are measured


@dataclass(frozen=True, slots=True)
class RequantisedBlock:
    """Some rows of a weight, float32.

    Attributes:
        start: The first.
        stored: What the base has there.
        wanted: What the update makes of it.
        rounded: What a reader will get.
        encoded: The bytes.
    """

    start: int
    stored: Array
    wanted: Array
    rounded: Array
    encoded: tuple[PartBytes, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    """How one weight is requantised.

    Attributes:
        fresh: Whether scales are chosen anew.
        diagonal: Of H, for feedback along the inputs that the update listens to; 0 is without these.
        calibrated: Whether there is feedback along the inputs of a calibration.
    """

    fresh: bool = False
    diagonal: float = 0.0
    calibrated: bool = False

    @property
    def rounding(self) -> str:
        """For the account."""
        return "feedback" if self.diagonal or self.calibrated else "nearest"


class WeightRequantiser:
    """One weight on its way back into its format.

    Attributes:
        sampled: Of so many outputs one is measured.
    """

    def __init__(self, step: Compute, chain: list[tuple[View, Apply]], device: str) -> None:
        target = step.target
        assert is_quantised(target)
        self._step, self._weight, self._chain, self._device = step, target, chain, device
        self._source = step.source if step.source is target else oriented(step.source, target)
        self._spans = spans(step)
        self._moment = second_moment(step.requantise.inputs) if step.requantise and step.requantise.inputs else None
        self._choice = self._chosen()
        self.sampled = 1 if target.shape[0] <= block_height(target.shape[1], step) else _EVERY
        self._tally = CodeTally(self.sampled)

    def blocks(self, check: Callable[[Array], None]) -> Iterator[RequantisedBlock]:
        """All rows in order.

        Args:
            check: Given the wanted values of each block; raises if they cannot be stored.
        """
        for span in self._spans:
            inputs, height = self._inputs(span), self._height(span)
            error = None if inputs is None else numpy.zeros((len(inputs.gains), self._weight.shape[1]), numpy.float32)
            for start in range(span.start, span.stop, height):
                yield self._block(span, start, min(start + height, span.stop), inputs, error, check)
            self._tally.close()

    def account(self) -> CodeChange | None:
        """What became of the codes, once all blocks were taken."""
        scales = "fresh" if self._choice.fresh else "kept"
        return self._tally.result(self._choice.rounding, scales) if self._chain else None

    def _height(self, span: Span) -> int:
        """Rows of a block: whole steps of the feedback, and whole groups of fresh scales, which have one grid."""
        height, group = block_height(self._weight.shape[1], self._step), row_group(self._step)
        if not span.transposed or self._choice.rounding == "nearest":
            return height
        if self._choice.fresh:
            return group
        steps = math.lcm(group, step_width(span.stop - span.start))
        return -(-height // steps) * steps

    def _inputs(self, span: Span) -> ErrorFeedback | None:
        known, width = self._known(span), row_group(self._step) if self._choice.fresh and span.transposed else None
        if known is not None:
            directions, diagonal = known.directions, known.rest
            if self._choice.diagonal and span.directions is not None:
                directions = numpy.concatenate([directions, span.directions / math.sqrt(self._choice.diagonal)])
            return feedback(directions, diagonal, width)
        if not self._choice.diagonal or span.directions is None:
            return None
        return feedback(span.directions, self._choice.diagonal, width)

    def _known(self, span: Span) -> SecondMoment | None:
        """The moment of the calibration's inputs, where they are all inputs of the span."""
        if self._moment is None or not self._choice.calibrated:
            return None
        inputs = span.stop - span.start if span.transposed else self._weight.shape[1]
        return self._moment if self._moment.directions.shape[1] == inputs else None

    def _block(
        self,
        span: Span,
        start: int,
        stop: int,
        inputs: ErrorFeedback | None,
        error: Array | None,
        check: Callable[[Array], None],
    ) -> RequantisedBlock:
        weight = self._weight
        base, old = weight.grid(start, stop), weight.codes(start, stop)
        stored = base.values(old)
        wanted = self._wanted(start, stop, stored)
        check(wanted)
        grid = (weight.fit(start, wanted) or base) if self._choice.fresh else base
        if inputs is None or error is None:
            codes = grid.nearest(wanted)
            rounded = grid.values(codes)
        elif span.transposed:
            nearest = _nearest_of(grid) if self._choice.fresh else self._nearest_rows(start)
            codes, rounded = round_rows(wanted, start - span.start, error, inputs, nearest)
        else:
            codes, rounded = round_columns(wanted, inputs, _nearest_of(grid))
        codes = cast(codes, dtype_of(old))
        if grid is base:  # two codes may stand for one number: the one that is there stays
            others = codes != old
            others &= rounded == stored
            if others.any():  # hardly ever: a masked copy of all would take as long as rounding them
                codes[others] = old[others]
        if self._chain:
            self._tally.note(span, start, (stored, wanted, rounded), (old, codes))
        return RequantisedBlock(start, stored, wanted, rounded, weight.pack(start, codes, grid))

    def _nearest_rows(self, start: int) -> Nearest:
        """Rounds some rows of a block that begins at `start`, on the scales that are stored."""

        def nearest(values: Array, at: int) -> tuple[Array, Array]:
            grid = self._weight.grid(start + at, start + at + len(values))
            codes = grid.nearest(values)
            return codes, grid.values(codes)

        return nearest

    def _wanted(self, start: int, stop: int, stored: Array) -> Array:
        """What becomes of the rows, float32, in memory of its own."""
        source = self._source
        if source is not self._weight:
            values = empty((stop - start, source.shape[1]), source.dtype)
            source.read_into(values, start)
            stored = cast(values, DType.F32)
        block = empty(stored.shape, DType.F32, self._device)
        assign(block, stored)
        apply_chain(self._chain, block, start, stop)
        return numpy.ascontiguousarray(to_cpu(block))

    def _chosen(self) -> _Choice:
        """The better scales, and the rounding that they need."""
        weight = self._weight
        kept, fresh, probe, size = Survival(), Survival(), 0.0, 0
        for start, stop in self._sampled_rows():
            base = weight.grid(start, stop)
            stored = base.values(weight.codes(start, stop))
            wanted = self._wanted(start, stop, stored)
            kept = Survival.total((kept, _survival(base, stored, wanted)))
            fresh = Survival.total((fresh, _survival(weight.fit(start, wanted) or base, stored, wanted)))
            between = _MIX * stored + (1 - _MIX) * numpy.roll(stored, 1, axis=1)
            probe += energy(base.values(base.nearest(between)) - between)
            size += stored.size
        if not kept.update > 0:
            return _Choice()
        if not self._chain:  # values in place of the base's: there is no update that must not be buried
            return _Choice(fresh=fresh.noise < kept.noise)
        listening = [span.directions for span in self._spans if span.directions is not None]
        options = self._step.requantise
        quiet = fresh.noise < _HALVED * kept.noise and _worth(fresh) > _worth(kept)
        better = quiet or _worth(fresh) > _worth(kept) + _BETTER
        enough = max(kept.survival, fresh.survival if better else 0.0) >= _ENOUGH
        known = self._moment is not None
        if options is None or options.rounding == "nearest" or not (listening or known):
            return _Choice(better)
        if enough or not listening:
            return _Choice(better, calibrated=known)
        better = fresh.noise < _QUIETER * kept.noise
        spacing = math.sqrt(12 * probe / size)  # of a grid: errors of rounding to it are even
        typical = math.sqrt(kept.update / size)
        rank = max(len(directions) for directions in listening)
        diagonal = 2 * _MISSED * math.sqrt(rank) * typical / spacing if spacing > 0 else _MOST
        return _Choice(better, min(max(diagonal, _LEAST), _MOST), known)

    def _sampled_rows(self) -> Iterator[tuple[int, int]]:
        """Whole groups of rows, evenly spread."""
        rows, columns = self._weight.shape
        group = row_group(self._step)
        height = -(-_SAMPLE_ROWS // group) * group
        count = max(1, min(_SAMPLES, _SAMPLE_ELEMENTS // max(height * columns, 1), rows // height))
        for number in range(count):
            start = rows * number // count // group * group
            yield start, min(start + height, rows)


def _survival(grid: Grid, stored: Array, wanted: Array) -> Survival:
    """How much of the update is left if values are rounded to the nearest of `grid`."""
    return Survival.of(wanted - stored, grid.values(grid.nearest(wanted)) - stored)


def _worth(kept: Survival) -> float:
    """What a stored update is worth: how far its part of the way goes, less its noise.

    On the way to the minimum that was trained for, a share s is worth ``s (2 - s)``.
    """
    return kept.survival * (2 - kept.survival) - _NOISE * kept.noise / kept.update


def _nearest_of(grid: Grid) -> Nearest:
    def nearest(values: Array, first: int) -> tuple[Array, Array]:
        codes = grid.nearest(values, first)
        return codes, grid.values(codes, first)

    return nearest
