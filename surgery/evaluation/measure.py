# SPDX-License-Identifier: Apache-2.0
"""How likely models find the tokens of a text, and how far their distributions are from another's, in sums over all tokens."""

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

__all__ = ["Score", "measure"]

_LOGITS = 1 << 25  # numbers of a model's logits in memory at a time, or one window
_NUMBERS = 1 << 21  # of these in float64
_ROWS = 16  # windows that run together at most: more are no faster, for a window is long

Array = npt.NDArray[Any]


@dataclass
class Score:
    """Of one model, over all tokens of a text; nothing but `nats` where it was compared with no other.

    Attributes:
        nats: The negative log-likelihood.
        other: The other model's.
        divergence: KL of the model's distribution from the other's, in nats.
        same: Tokens for which both expect the same one most.
        squares: Of the differences between the negative log-likelihoods that both give a token, summed.
    """

    nats: float = 0.0
    other: float = 0.0
    divergence: float = 0.0
    same: int = 0
    squares: float = 0.0


@dataclass
class _Passes:
    """Runs of a model over a window, and how many of all of them are done."""

    whole: int
    done: Callable[[float], None]
    begun: int = 0

    def of(self, windows: int) -> Callable[[float], None]:
        """Begin the next `windows`: what is to be told of the share of them that is done."""
        before, self.begun = self.begun, self.begun + windows
        return lambda share: self.done((before + windows * share) / self.whole)


def measure(
    models: Sequence[Predictor],
    against: Predictor | None,
    ids: npt.NDArray[np.int64],
    begin: int,
    windows: Sequence[Window],
    done: Callable[[float], None],
) -> list[Score]:
    """Run models over the windows of a text, one after the other, and compare each with another.

    The logits of two models are in memory at a time.

    Args:
        models: Those that are scored.
        against: The other, if there is one.
        ids: ``(tokens,)``.
        begin: The token in front of every window.
        windows: See `surgery.evaluation.windows.cut`.
        done: Called with the share of the work that is done, several times for a window.

    Raises:
        FitError: a model cannot be computed, logits that are no numbers, or two models with other vocabularies.
    """
    scores = [Score() for _ in models]
    passes = _Passes(len(windows) * (len(models) + (against is not None)), done)
    for group in _groups(windows, max(1, *(model.vocabulary for model in (*models, against or models[0])))):
        rows = np.stack([np.concatenate([[begin], ids[window.start : window.stop]]) for window in group])
        targets = [ids[window.scored : window.stop] for window in group]
        beside = None if against is None else _logits(against, rows, group, passes.of(len(group)))
        for score, model in zip(scores, models, strict=True):
            logits = _logits(model, rows, group, passes.of(len(group)))
            if beside is None or against is None:
                score.nats += sum(map(_nats, logits, targets))
                continue
            _check_widths(logits[0], model, beside[0], against)
            for model_side, other_side, following in zip(logits, beside, targets, strict=True):
                _compare(score, model_side, other_side, following)
    return scores


def _groups(windows: Sequence[Window], vocabulary: int) -> Iterator[list[Window]]:
    """Windows of one length, as many as may run together."""
    for length, same in groupby(windows, lambda window: window.stop - window.start):
        listed = list(same)
        step = min(_ROWS, max(1, _LOGITS // ((length + 1) * vocabulary)))
        yield from (listed[at : at + step] for at in range(0, len(listed), step))


def _logits(
    model: Predictor, rows: npt.NDArray[np.int64], group: Sequence[Window], done: Callable[[float], None]
) -> list[Array]:
    """Of each window, ``(tokens, V)``: the logits that predict the tokens that it scores."""
    logits = model.logits(rows, done)
    places = (window.scored - window.start for window in group)  # the token in front is in the place before the first
    found = [row[first:-1] for row, first in zip(logits, places, strict=True)]
    if not all(np.isfinite(row).all() for row in found):
        raise FitError(
            "computes logits that are no finite numbers",
            file=model.path,
            hint="a weight is NaN or Inf, or so large that a product overflows: export or merge again from sound weights",
        )
    return found


def _check_widths(logits: Array, model: Predictor, beside: Array, against: Predictor) -> None:
    if logits.shape[-1] != beside.shape[-1]:
        raise FitError(
            f"has {beside.shape[-1]} tokens and {model.path} {logits.shape[-1]}: their distributions cannot be compared",
            file=against.path,
            hint="evaluate each by itself: bits per byte can be compared",
        )


def _pieces(targets: Array, *sides: Array) -> Iterator[tuple[npt.NDArray[np.float64], ...]]:
    """By some tokens at a time: the log-likelihoods of all tokens, and of those that follow, for each of `sides`."""
    step = max(1, _NUMBERS // sides[0].shape[-1])
    for at in range(0, len(targets), step):
        chosen = targets[at : at + step, None]
        everything = [_log_softmax(side[at : at + step]) for side in sides]
        yield (*everything, *(np.take_along_axis(side, chosen, 1) for side in everything))


def _nats(logits: Array, targets: npt.NDArray[np.int64]) -> float:
    return -sum(float(followed.sum()) for _, followed in _pieces(targets, logits))


def _compare(score: Score, logits: Array, beside: Array, targets: npt.NDArray[np.int64]) -> None:
    for model, other, likely, likely_too in _pieces(targets, logits, beside):
        score.nats -= float(likely.sum())
        score.other -= float(likely_too.sum())
        score.divergence += float((np.exp(other) * (other - model)).sum())
        score.same += int((model.argmax(-1) == other.argmax(-1)).sum())
        score.squares += float(((likely - likely_too) ** 2).sum())


def _log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return values
