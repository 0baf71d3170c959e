# SPDX-License-Identifier: Apache-2.0
"""The inputs of a weight along which errors of its codes are made up for: a calibration's, and those that its update listens to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from surgery.engine.plan import Compute
from surgery.onnx.export.weight_coding import WeightCoding
from surgery_formats.arrays import Array

if TYPE_CHECKING:
    from surgery.engine.quantised.input_moment import SecondMoment
    from surgery_formats.linalg.feedback import ErrorFeedback

__all__ = ["importance_of", "inputs_of"]

_DIAGONAL = 0.1
"""What errors outside of an update's inputs weigh against those inside: docs/quantised-graphs.md has the measurement."""


def inputs_of(step: Compute, name: str, coding: WeightCoding) -> Callable[[], ErrorFeedback | None] | None:
    """Gives the feedback of a weight when its turn comes; None if codes are the nearest.

    Args:
        step: With a target of codes.
        name: Of the weight.
        coding: How it becomes codes.
    """
    if coding.rounding == "nearest":
        return None
    parts = None if coding.calibration is None else coding.calibration.of(name.removesuffix(".weight"))
    if parts is None and not step.operations:
        return None

    def make() -> ErrorFeedback | None:
        import numpy as np

        from surgery.engine.quantised.listening import spans
        from surgery_formats.linalg.feedback import feedback

        known = moment_of(name, coding)
        found = spans(step)
        heard = found[0].directions if len(found) == 1 else None
        if known is None:
            return None if heard is None else feedback(heard, _DIAGONAL)
        if heard is None:
            return feedback(known.directions, known.rest)
        return feedback(np.concatenate([known.directions, heard / math.sqrt(_DIAGONAL)]), known.rest)

    return make


def importance_of(name: str, coding: WeightCoding) -> Callable[[], Array | None] | None:
    """Gives the mean square of every input of a weight, of a calibration."""
    if coding.calibration is None or coding.scales != "search":
        return None

    def weights() -> Array | None:
        known = moment_of(name, coding)
        return None if known is None else (known.directions**2).sum(0) + known.rest

    return weights


def moment_of(name: str, coding: WeightCoding) -> SecondMoment | None:
    """The second moment of a weight's inputs, if the calibration has it."""
    from surgery.engine.quantised.input_moment import second_moment

    parts = None if coding.calibration is None else coding.calibration.of(name.removesuffix(".weight"))
    return None if parts is None else second_moment(parts)
