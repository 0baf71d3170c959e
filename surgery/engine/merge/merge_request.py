# SPDX-License-Identifier: Apache-2.0
"""What a merge is asked for: all that decides its result, and that a worker on another machine plans again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.engine.inputs import AdaptersLike, CheckpointLike, StrPath
from surgery.engine.merge.merge_plan import OtherValues, planned_merge
from surgery.engine.plan import Plan
from surgery.engine.quantised.output import QuantisedOutput, quantised_output
from surgery_formats.binding.bind import Binding

if TYPE_CHECKING:
    from surgery.engine.shares.planned import PlannedWork

__all__ = ["MergeRequest"]


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """All that decides a merge; see `surgery.merge` for every attribute.

    Attributes:
        base: The base.
        adapters: Adapters with their weights, in order.
        dtype: Type of what is stored as numbers.
        shard_size: Most bytes of a file.
        layout: ``keep`` or ``packed``.
        quantized: What becomes of a quantised base.
        only_touched: Of ``dequantize``.
        rounding: Of ``requantize``.
        rank: Of ``residual``.
        max_error: Of ``residual``.
        calibration: Of ``requantize``.
        reversible: Whether what rounding loses is kept.
        as_trained: The quantised model that the adapters were trained on, or a rule.
        without: Patterns of modules to leave out.
    """

    base: CheckpointLike
    adapters: AdaptersLike
    dtype: str = "keep"
    shard_size: int | None = None
    layout: str = "keep"
    quantized: str = "dequantize"
    only_touched: bool = False
    rounding: str | None = None
    rank: int | None = None
    max_error: float | None = None
    calibration: StrPath | None = None
    reversible: bool = False
    as_trained: CheckpointLike | None = None
    without: tuple[str, ...] = ()

    def quantised(self, *, accept_loss: bool = False) -> QuantisedOutput:
        """What becomes of a quantised base, checked; `accept_loss` is only looked at.

        Raises:
            FitError, UsageError: see `quantised_output`.
        """
        return quantised_output(
            self.quantized,
            only_touched=self.only_touched,
            rounding=self.rounding,
            rank=self.rank,
            max_error=self.max_error,
            calibration=self.calibration,
            accept_loss=accept_loss,
            reversible=self.reversible,
            as_trained=self.as_trained is not None,
            dtype=self.dtype,
        )

    def planned(self, quantised: QuantisedOutput, undone: OtherValues | None = None) -> tuple[Binding, Plan]:
        """The binding and the plan; opens the inputs.

        Args:
            quantised: See `quantised`.
            undone: Values that the base had before another merge, and that this one begins with.

        Raises:
            FitError, InputError: see `surgery.merge`.
        """
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
            undone,
        )

    def portable(self) -> MergeRequest:
        """The same as plain values that can be sent: references as every worker has to write them. Nothing is opened.

        Raises:
            UsageError: an input that was opened, and so cannot be sent; or no adapter.
        """
        from surgery.engine.shares.work import portable, portable_adapters

        return dataclasses.replace(
            self,
            base=portable(self.base, "base"),
            adapters=portable_adapters(self.adapters),
            calibration=None if self.calibration is None else portable(self.calibration, "calibration"),
            as_trained=None if self.as_trained is None else portable(self.as_trained, "as_trained"),
        )

    def work(self) -> PlannedWork:
        """What shares make of it.

        Raises:
            FitError, InputError: see `surgery.merge`.
        """
        from surgery.engine.shares.planned import work_of_output

        return work_of_output(self.planned(self.quantised())[1])
