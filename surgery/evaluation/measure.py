# SPDX-License-Identifier: Apache-2.0
"""How likely models find the tokens of a text, and how far their distributions are apart, in sums over all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.evaluation.predictor import Predictor
from surgery.evaluation.windows import Window
from surgery_formats.errors import FitError

__all__ = ["Sums", "measure"]

_LOGITS = 1 << 25  # numbers of a model's logits in memory at a time, or one window
_NUMBERS = 1 << 21  # of these in float64
_ROWS = 16  # windows that run together at most: more are no faster, for a window is long

Array = npt.NDArray[Any]


@dataclass
class Sums:
    """Over all tokens of a text.

    Attributes:
        tokens: Their number.
        nats: By model: the negative log-likelihood.
        divergence: KL of the first model's distribution from the second's, in nats.
        same: Tokens for which both models expect the same one most.
    """

    tokens: int
    nats: list[float]
    divergence: float = 0.0
    same: int = 0


def measure(
    models: Sequence[Predictor],
    ids: npt.NDArray[np.int64],
    begin: int,
    windows: Sequence[Window],
    done: Callable[[int], None],
) -> Sums:
    """Run one model, or two that are compared, over the windows of a text.

    Args:
        models: One or two.
        ids: ``(tokens,)``.
        begin: The token in front of every window.
        windows: See `surgery.evaluation.windows.cut`.
        done: Called with the number of windows that were scored so far.

    Raises:
        FitError: a model cannot be computed, logits that are no numbers, or two models with other vocabularies.
    """
    sums = Sums(len(ids), [0.0 for _ in models])
    scored = 0
    for group in _groups(windows, max(1, *(model.vocabulary for model in models))):
        rows = np.stack([np.concatenate([[begin], ids[window.start : window.stop]]) for window in group])
        found = [model.logits(rows) for model in models]
        for number, window in enumerate(group):
            first = window.scored - window.start  # the token in front is in the place before the window's first
            logits = [_finite(side[number, first:-1], model) for side, model in zip(found, models, strict=True)]
            _add(sums, logits, ids[window.scored : window.stop], models)
        scored += len(group)
        done(scored)
    return sums


def _groups(windows: Sequence[Window], vocabulary: int) -> Iterator[list[Window]]:
    """Windows of one length, as many as may run together."""
    for length, same in groupby(windows, lambda window: window.stop - window.start):
        listed = list(same)
        step = min(_ROWS, max(1, _LOGITS // ((length + 1) * vocabulary)))
        yield from (listed[at : at + step] for at in range(0, len(listed), step))


def _add(sums: Sums, logits: Sequence[Array], targets: npt.NDArray[np.int64], models: Sequence[Predictor]) -> None:
    widths = [side.shape[-1] for side in logits]
    if len(set(widths)) > 1:
        raise FitError(
            f"has {widths[1]} tokens and {models[0].path} {widths[0]}: their distributions cannot be compared",
            file=models[1].path,
            hint="evaluate each by itself: bits per byte can be compared",
        )
    step = max(1, _NUMBERS // widths[0])
    for at in range(0, len(targets), step):
        sides = [_log_softmax(side[at : at + step]) for side in logits]
        chosen = targets[at : at + step, None]
        for number, side in enumerate(sides):
            sums.nats[number] -= float(np.take_along_axis(side, chosen, 1).sum())
        if len(sides) == 2:
            model, other = sides
            sums.divergence += float((np.exp(other) * (other - model)).sum())
            sums.same += int((model.argmax(-1) == other.argmax(-1)).sum())


def _log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return values


def _finite(logits: Array, model: Predictor) -> Array:
    if not np.isfinite(logits).all():
        raise FitError("computes logits that are no finite numbers", file=model.path)
    return logits
