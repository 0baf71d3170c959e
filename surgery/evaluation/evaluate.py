# SPDX-License-Identifier: Apache-2.0
"""Evaluate one model, or two, on a text that was read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from surgery.evaluation.measure import measure
from surgery.evaluation.predictor import Predictor
from surgery.evaluation.result import EvalResult, ScoredModel
from surgery.evaluation.text import EvaluationText
from surgery.evaluation.windows import cut
from surgery.progress import Callback, Progress
from surgery_formats.errors import FitError

__all__ = ["evaluate"]


def evaluate(
    models: Sequence[Predictor], text: EvaluationText, name: Path, context: int, stride: int, progress: Callback | None
) -> EvalResult:
    """Evaluate `models`, one or two, on `text`.

    Windows are shortened, and their distance with them, to what the models have positions for.

    Raises:
        FitError: ids beyond a vocabulary, no room for a window, windows with gaps, see `measure`.
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
    windows = list(cut(len(text.ids), chosen, step))
    whole = len(text.ids) if text.nbytes is None else text.nbytes

    def done(number: int) -> None:
        if progress is not None:
            progress(Progress(whole * number // len(windows), whole, "evaluating"))

    sums = measure(models, text.ids, text.begin, windows, done)
    sides = [
        ScoredModel.of(model.path, model.adapters, model.computed_by, nats, sums.tokens, text.nbytes)
        for model, nats in zip(models, sums.nats, strict=True)
    ]
    compared = len(sides) == 2
    return EvalResult(
        model=sides[0],
        against=sides[1] if compared else None,
        divergence=max(sums.divergence / sums.tokens, 0.0) if compared else None,
        agreement=sums.same / sums.tokens if compared else None,
        text=name,
        text_bytes=text.nbytes,
        limited=text.limited,
        tokens=sums.tokens,
        windows=len(windows),
        context=chosen,
        stride=step,
        begin=text.begin,
        warnings=tuple(warning for model in models for warning in model.warnings),
    )
