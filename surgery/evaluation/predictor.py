# SPDX-License-Identifier: Apache-2.0
"""What predicts the next tokens of texts: a graph in onnxruntime, or the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from surgery_formats.errors import FitError

__all__ = [
    "Predictor",
]

Array = npt.NDArray[Any]


class Predictor(Protocol):
    """A decoder whose predictions are compared with what follows."""

    @property
    def path(self) -> Path:
        """The model."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """What was attached to it, with strengths other than 1."""

    @property
    def computed_by(self) -> str:
        """``reference``, or ``onnxruntime`` and the device."""

    @property
    def folder(self) -> Path:
        """Where tokenizer and configuration are."""

    @property
    def vocabulary(self) -> int:
        """Ids that may be given; 0 where a foreign graph does not tell."""

    @property
    def room(self) -> int:
        """Most tokens of a row."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know."""

    def logits(self, rows: npt.NDArray[np.int64], done: Callable[[float], None]) -> Array:
        """``(B, S, V)`` after every token of `rows`, ``(B, S)``; `done` is told which share of the work is.

        Raises:
            FitError: the model cannot be computed.
        """


def no_decoder(path: Path) -> FitError:
    """The error for what predicts no next token."""
    return FitError(
        "predicts no next token: bits per byte are of decoders with a language head, by themselves", file=path
    )
