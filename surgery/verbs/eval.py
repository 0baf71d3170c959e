# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model on a text: bits per byte, and how near it is to another model."""

from __future__ import annotations

from surgery.engine.inputs import AdaptersLike, CheckpointLike, StrPath, check_counts, local_path
from surgery.evaluation.evaluate import evaluate
from surgery.evaluation.opening import open_predictor
from surgery.evaluation.result import EvalResult
from surgery.evaluation.text import check_same_vocabulary, read_evaluation_text
from surgery.evaluation.windows import CONTEXT, STRIDE
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.errors import UsageError

__all__ = ["EvalResult", "eval"]


@timed
def eval(
    model: CheckpointLike,
    *,
    text: StrPath | None = None,
    ids: StrPath | None = None,
    adapters: AdaptersLike = (),
    against: CheckpointLike | None = None,
    against_adapters: AdaptersLike = (),
    context: int = CONTEXT,
    stride: int = STRIDE,
    limit: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Callback | None = None,
) -> EvalResult:
    """Measure how well a model predicts a text, and how near its predictions are to another's.

    A graph, or a folder with one, is run by onnxruntime as it would be deployed; every other model is computed by the
    reference, in float32 arithmetic on its weights as they are stored.

    Args:
        model: A base, a merge, a fine-tune, or a graph.
        text: What is predicted, in UTF-8.
        ids: ``.npy`` with the token ids of `text`, without special ones, or of a text that is not named: then no tokenizer is
            needed.
        adapters: Attached to `model`, in float32 and unmerged: nothing is rounded to the model's type. Of a graph, what
            fills its slots.
        against: The model to compare with, of the same vocabulary.
        against_adapters: Attached to `against`.
        context: Most tokens of a window; fewer where a model has fewer positions.
        stride: Tokens between the beginnings of two windows.
        limit: Most bytes of the text.
        device: Of graphs: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: Of graphs, on the CPU.
        progress: Called with every step.

    Raises:
        UsageError: an argument of a wrong type, neither text nor tokens, or adapters of no model.
        InputError: something cannot be read, or a text in another encoding.
        FitError: an adapter in the place of a model, a model that predicts no next token, no text, two models with
            different vocabularies.
    """
    check_counts(context=context, stride=stride, limit=limit, threads=threads)
    if against is None and against_adapters != ():
        raise UsageError("adapters of no model", hint="name the model that they are attached to: `against=`")
    text_path = None if text is None else local_path(text, "text")
    ids_path = None if ids is None else local_path(ids, "ids")
    name = text_path or ids_path
    if name is None:
        raise UsageError("nothing to evaluate on", hint="name a text")
    side = open_predictor(model, adapters, "model", device=device, threads=threads)
    other = None
    if against is not None:
        other = open_predictor(against, against_adapters, "against", device=device, threads=threads)
        check_same_vocabulary(side.folder, other.folder)
    read = read_evaluation_text(side.folder, text_path, ids_path, limit)
    return evaluate(side, other, read, name, context, stride, progress)
