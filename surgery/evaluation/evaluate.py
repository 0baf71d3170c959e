# SPDX-License-Identifier: Apache-2.0
"""Evaluate models on a text that was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.evaluation.measure import Score, measure
from surgery.evaluation.predictor import Predictor
from surgery.evaluation.result import EvalResult, ScoredModel
from surgery.evaluation.text import EvaluationText
from surgery.evaluation.windows import CONTEXT, STRIDE, Window, cut
from surgery.progress import Callback, Progress
from surgery_formats.errors import FitError

__all__ = ["Evaluation", "evaluate", "plan_evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """A text in windows that fit some models.

    Attributes:
        text: The text.
        windows: Its windows.
        context: Most tokens of one, without the one in front.
        stride: Tokens between the beginnings of two.
    """

    text: EvaluationText
    windows: tuple[Window, ...]
    context: int
    stride: int

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return len(self.text.ids)

    def scores(self, models: Sequence[Predictor], against: Predictor | None, progress: Callback | None) -> list[Score]:
        """Score each of `models`, compared with `against` if that is given.

        Raises:
            FitError: see `measure`.
        """
        several = len(models) + (against is not None)
        phase = "evaluating" if several == 1 else f"evaluating {several} models"
        whole = self.tokens if self.text.nbytes is None else self.text.nbytes

        def done(share: float) -> None:
            if progress is not None:
                progress(Progress(round(whole * share), whole, phase))

        return measure(models, against, self.text.ids, self.text.begin, self.windows, done)


def plan_evaluation(
    models: Sequence[Predictor], text: EvaluationText, context: int = CONTEXT, stride: int = STRIDE
) -> Evaluation:
    """Cut `text` into windows; they are shortened, and their distance with them, to what `models` have positions for.

    Raises:
        FitError: ids beyond a vocabulary, no room for a window, windows with gaps.
    """
    greatest = max(int(text.ids.max()), text.begin)
    for model in models:
        if 0 < model.vocabulary <= greatest:
            raise FitError(
                f"has {model.vocabulary} tokens, and the text the token {greatest}",
                file=model.path,
                hint="the tokens are another model's",
            )
    room = min(model.room for model in models) - 1  # a window begins behind one token
    if room < 1:
        raise FitError("has no position left for a token of the text", file=models[0].path)
    chosen = min(context, room)
    step = stride if chosen == context else max(1, min(stride, chosen // 2))
    return Evaluation(text, tuple(cut(len(text.ids), chosen, step)), chosen, step)


def evaluate(
    model: Predictor,
    against: Predictor | None,
    text: EvaluationText,
    name: Path,
    context: int,
    stride: int,
    progress: Callback | None,
) -> EvalResult:
    """Evaluate `model` on `text`, compared with `against` if that is given.

    Raises:
        FitError: see `plan_evaluation` and `measure`.
    """
    both = [model, *([] if against is None else [against])]
    planned = plan_evaluation(both, text, context, stride)
    (score,) = planned.scores([model], against, progress)
    sides = [
        ScoredModel.of(side.path, side.adapters, side.computed_by, nats, planned.tokens, text.nbytes)
        for side, nats in zip(both, (score.nats, score.other), strict=False)
    ]
    compared = against is not None
    return EvalResult(
        model=sides[0],
        against=sides[1] if compared else None,
        divergence=max(score.divergence / planned.tokens, 0.0) if compared else None,
        agreement=score.same / planned.tokens if compared else None,
        text=name,
        text_bytes=text.nbytes,
        limited=text.limited,
        tokens=planned.tokens,
        windows=len(planned.windows),
        context=planned.context,
        stride=planned.stride,
        begin=text.begin,
        warnings=tuple(warning for side in both for warning in side.warnings),
    )
