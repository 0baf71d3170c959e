# SPDX-License-Identifier: Apache-2.0
"""Axes: where a value lies, and which values are written beside the axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from surgery.reports.values import Type, cell_text

__all__ = ["Axis", "axis_over", "number_of", "tick_text"]

_TICKS = 5  # at most, more or less
_FEW = 8  # different values that are all written


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high` along units from `begin` to `end`.

    Attributes:
        low: The least value; above 0 if `log`.
        high: The greatest; above `low`.
        begin: Where the least one lies.
        end: Where the greatest one lies.
        log: Whether equal distances are equal ratios.
        ticks: Values that are written.
    """

    low: float
    high: float
    begin: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Where `value` lies, held to the ends."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        return self.begin + (self.end - self.begin) * min((value - low) / (high - low), 1.0)


def number_of(cell: object) -> float | None:
    """A cell as a finite number; None for anything else."""
    if isinstance(cell, bool) or not isinstance(cell, int | float) or not math.isfinite(cell):
        return None
    return float(cell)


def axis_over(
    values: Iterable[float], begin: float, end: float, *, log: bool = False, zero: bool = False, each: bool = False
) -> Axis:
    """An axis that has all `values`.

    Args:
        values: Above 0 if `log`.
        begin: Where the least one lies.
        end: Where the greatest one lies.
        log: Whether equal distances are equal ratios.
        zero: Whether it begins at 0 (not if `log`).
        each: End at the values themselves, and write these if they are few; otherwise it ends at round numbers.
    """
    known = sorted(set(values))
    if not known:
        return Axis(1.0, 2.0, begin, end, False, ())
    low, high = (0.0 if zero and not log else known[0]), known[-1]
    if low >= high:
        low, high = (low / 2, low * 2) if log else (low - (abs(low) or 1.0) / 2, low + (abs(low) or 1.0) / 2)
        return Axis(low, high, begin, end, log, tuple(known))
    if each and len(known) <= _FEW:
        return Axis(low, high, begin, end, log, tuple(known))
    if log and high / low >= 8:
        ticks = _powers(low, high)
        low, high = (low, high) if each else (min(low, ticks[0]), max(high, ticks[-1]))
    else:
        ticks = _steps(low, high)
        low, high = (low, high) if log or each else (min(low, ticks[0]), max(high, ticks[-1]))
    return Axis(low, high, begin, end, log, tuple(tick for tick in ticks if low <= tick <= high))


def _steps(low: float, high: float) -> Sequence[float]:
    """Round numbers from at most `low` to at least `high`."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * power for unit in (1, 2, 2.5, 5, 10) if unit * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _powers(low: float, high: float) -> Sequence[float]:
    """Powers of ten inside, or round numbers between them where those are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    step = max(1, (last - first) // _TICKS)
    if high / low >= 200:
        return [10.0**power for power in range(first, last + 1, step)]
    return [
        unit * 10.0**power
        for power in range(first, last + 1)
        for unit in (1, 2, 5)
        if low <= unit * 10.0**power <= high
    ]


def tick_text(value: float, type: Type) -> str:
    """A value beside an axis, as short as can be."""
    match type:
        case "share":
            return f"{100 * value:.3g}%"
        case "number" | "fixed" | "integer" | "seconds":
            plain = 1e-4 <= abs(value) < 1e6
            return (f"{float(f'{value:.3g}'):g}" if plain else f"{value:.3g}") + (" s" if type == "seconds" else "")
        case _:
            return cell_text(value, type)
