# SPDX-License-Identifier: Apache-2.0
"""What becomes of a quantised base: elements of 16 bits, its own format, or a part of each. Imported without numpy."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from surgery.engine.calibration_file import Calibration, open_calibration
from surgery.engine.plan import Requantise
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, UsageError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import closest, show

__all__ = ["DEQUANTISED", "QUANTIZED", "ROUNDING", "QuantisedOutput", "quantised_output"]

Way = Literal["dequantize", "requantize", "residual"]
Rounding = Literal["feedback", "nearest"]
QUANTIZED: tuple[Way, ...] = ("dequantize", "requantize", "residual")
"""What becomes of a quantised base: elements of 16 bits, the format it has, or that and a LoRA of what it cannot hold."""
ROUNDING: tuple[Rounding, ...] = ("feedback", "nearest")


@dataclass(frozen=True, slots=True)
class QuantisedOutput:
    """What becomes of weights stored as codes.

    Attributes:
        way: One of `QUANTIZED`.
        only_touched: Of ``dequantize``: weights that no adapter touches keep their format.
        rounding: Of ``requantize``, see `Requantise`.
        calibration: Of ``requantize``: inputs to make up for errors along.
        rank: Of ``residual``: most directions of the LoRA of a weight; None is what holds all of a LoRA, see `goal_of`.
        max_error: Of ``residual``: how far a weight may be off, relative to its update; None is as near as `rank` allows.
    """

    way: Way = "dequantize"
    only_touched: bool = False
    rounding: Rounding = "feedback"
    calibration: Calibration | None = None
    rank: int | None = None
    max_error: float | None = None

    def keeps(self, *, touched: bool, dtype: DType | None) -> bool:
        """Whether a weight stored as codes keeps its format.

        Args:
            touched: Whether an adapter changes it.
            dtype: The element type that was asked for.
        """
        if self.way != "dequantize":
            return dtype is None
        return self.only_touched and not touched

    def requantise(self, name: str) -> Requantise:
        """How the codes of the weight `name` are chosen."""
        if self.way == "residual":  # the LoRA has what feedback would make up for
            return Requantise("nearest")
        found = self.calibration.of(name.rpartition(".")[0]) if self.calibration is not None else None
        return Requantise(self.rounding, found or {})

    def check(self, base: Checkpoint) -> None:
        """Check that every module of the calibration is one of the base, with the right number of inputs.

        Raises:
            FitError: a module does not fit.
        """
        if self.calibration is None:
            return
        sizes = {
            name.rpartition(".")[0]: parameter.sizes
            for component in base.components.values()
            for name, parameter in component.parameters.items()
            if name.endswith(".weight")
        }
        for module, parts in self.calibration.modules.items():
            tensor = next(iter(parts.values()))
            fault, hint = "", None
            if module not in sizes:
                fault, hint = "inputs of a module that the model lacks", closest(module, sizes)
            elif (inputs := math.prod(sizes[module][1:])) != tensor.shape[-1]:
                fault = f"{tensor.shape[-1]} inputs of a module that has {inputs}"
            if fault:
                raise FitError(fault, file=self.calibration.path, tensor=tensor.name, hint=hint)

    @property
    def options(self) -> dict[str, Any]:
        """What differs from the default, for the id of a plan."""
        every = {
            "quantized": self.way,
            "only_touched": self.only_touched,
            "rounding": self.rounding,
            "rank": self.rank,
            "max_error": self.max_error,
            "calibration": None if self.calibration is None else self.calibration.id,
        }
        default = {"quantized": "dequantize", "only_touched": False, "rounding": "feedback"}
        return {name: value for name, value in every.items() if value != default.get(name)}


DEQUANTISED = QuantisedOutput()
Option = TypeVar("Option", bound=str)


def quantised_output(
    quantized: str = "dequantize",
    *,
    only_touched: bool = False,
    rounding: str | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    calibration: str | os.PathLike[str] | None = None,
    accept_loss: bool = False,
    reversible: bool = False,
    as_trained: bool = False,
    dtype: str = "keep",
) -> QuantisedOutput:
    """The options of a merge, checked. `accept_loss` and what follows are only looked at.

    Raises:
        FitError: a value that there is not.
        UsageError: options that contradict each other.
    """
    way = _one_of("quantized", quantized, QUANTIZED)
    how = _one_of("rounding", rounding, ROUNDING) if rounding else "feedback"
    if only_touched and quantized != "dequantize":
        raise UsageError(
            "only what adapters touch is computed anyway",
            hint='`only_touched=True` belongs to `quantized="dequantize"`',
        )
    if rounding and quantized != "requantize":
        raise UsageError(
            "how codes are rounded is a choice of requantising alone",
            hint='leave `rounding=` away, or add `quantized="requantize"`',
        )
    if quantized != "residual" and (rank is not None or max_error is not None):
        raise UsageError(
            "only a residual, the LoRA beside a quantised model, has a rank and an error to stay below",
            hint='leave `rank=` and `max_error=` away, or add `quantized="residual"`',
        )
    if accept_loss and quantized != "requantize":
        raise UsageError(
            "only codes that are chosen again can lose the update",
            hint='leave `accept_loss=True` away, or add `quantized="requantize"`',
        )
    if quantized != "dequantize" and dtype != "keep":
        raise UsageError(
            f'`quantized="{quantized}"` keeps the codes, and `dtype=` asks for elements in their place',
            hint="leave out one of the two",
        )
    if quantized != "dequantize" and as_trained:
        raise UsageError(
            f'`quantized="{quantized}"` is for a quantised base, and `as_trained=` for the release that one was made of',
            hint="leave out one of the two",
        )
    if reversible and as_trained:
        raise UsageError(
            "the release's values are not in the output, so that nothing can give them back",
            hint="`reversible=True` goes with the base itself",
        )
    if reversible and quantized == "residual":
        raise UsageError("a model with a LoRA beside it keeps its codes", hint="leave out `reversible=True`")
    if rank is not None and rank < 1:
        raise FitError(f"a rank is at least 1, not {rank}")
    if max_error is not None and not 0 < max_error < 1:
        raise FitError(f"max_error is above 0 and below 1, not {max_error:g}")
    if calibration is not None and (quantized != "requantize" or rounding == "nearest"):
        raise UsageError(
            "inputs are used by feedback alone", hint='`quantized="requantize"` without `rounding="nearest"`'
        )
    opened = None if calibration is None else open_calibration(calibration)
    return QuantisedOutput(way, only_touched, how, opened, rank, max_error)


def _one_of(name: str, value: str, options: tuple[Option, ...]) -> Option:
    found = next((option for option in options if option == value), None)
    if found is None:
        raise FitError(f"{name} is one of {', '.join(options)}, not '{show(value)}'")
    return found
