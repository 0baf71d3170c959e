# SPDX-License-Identifier: Apache-2.0
"""A merge as plain values, which a worker on another machine plans again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.engine.merge.merge_plan import planned_merge
from surgery.engine.plan import Plan
from surgery.engine.quantised.output import quantised_output
from surgery.engine.shares.planned import PlannedWork, work_of_output
from surgery.engine.shares.work import portable, portable_adapters
from surgery_formats.binding.bind import Binding

__all__ = ["MergeRequest", "request_of"]


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """All that decides a merge, as plain values that can be sent.

    Attributes:
        base: Reference of the base.
        adapters: References with their weights, in order.
        dtype: As `surgery.merge` takes it.
        shard_size: As `surgery.merge` takes it.
        layout: ``keep`` or ``packed``.
        quantized: As `surgery.merge` takes it.
        only_touched: As `surgery.merge` takes it.
        rounding: As `surgery.merge` takes it.
        rank: As `surgery.merge` takes it.
        max_error: As `surgery.merge` takes it.
        calibration: Reference of the file that `surgery.merge` takes.
        reversible: As `surgery.merge` takes it.
        as_trained: As `surgery.merge` takes it: a rule, or a reference.
        without: As `surgery.merge` takes it.
    """

    base: str
    adapters: tuple[tuple[str, float], ...]
    dtype: str = "keep"
    shard_size: int | None = None
    layout: str = "keep"
    quantized: str = "dequantize"
    only_touched: bool = False
    rounding: str | None = None
    rank: int | None = None
    max_error: float | None = None
    calibration: str | None = None
    reversible: bool = False
    as_trained: str | None = None
    without: tuple[str, ...] = ()

    def planned(self) -> tuple[Binding, Plan]:
        """The binding and the plan; opens the inputs.

        Raises:
            FitError, InputError: see `surgery.merge`.
        """
        quantised = quantised_output(
            self.quantized,
            only_touched=self.only_touched,
            rounding=self.rounding,
            rank=self.rank,
            max_error=self.max_error,
            calibration=self.calibration,
        )
        return planned_merge(
            self.base,
            self.adapters,
            self.dtype,
            self.shard_size,
            self.layout,
            quantised,
            self.reversible,
            self.as_trained,
            self.without,
        )

    def work(self) -> PlannedWork:
        """What shares make of it.

        Raises:
            FitError, InputError: see `surgery.merge`.
        """
        return work_of_output(self.planned()[1])


def request_of(
    base: object,
    adapters: object,
    *,
    calibration: object = None,
    as_trained: object = None,
    **options: Any,
) -> MergeRequest:
    """The request for what `surgery.merge` was given; `options` are further attributes. Nothing is opened.

    Raises:
        UsageError: an input that was opened, and so cannot be sent; or no adapter.
    """
    return MergeRequest(
        portable(base, "base"),
        portable_adapters(adapters),
        calibration=None if calibration is None else portable(calibration, "calibration"),
        as_trained=None if as_trained is None else portable(as_trained, "as_trained"),
        **options,
    )
