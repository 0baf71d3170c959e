# SPDX-License-Identifier: Apache-2.0
"""Transfer a soft prompt to another model of one tokenizer, with a score that says what the result is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from surgery.engine.inputs import (
    AdapterLike,
    CheckpointLike,
    StrPath,
    as_adapter,
    as_checkpoint,
    check_counts,
    output_path,
)
from surgery.prompts.conversion import check_alone, table_of
from surgery.prompts.made_prompt import MadePrompt, write_prompt
from surgery.prompts.prompt_result import PromptResult, TransferScore
from surgery.prompts.search import search
from surgery.prompts.spacing import reading_of, spacing_of
from surgery.prompts.texts import Texts, token_rows
from surgery.prompts.transfer import fitted_map, shared_tokens
from surgery.prompts.vocabulary import input_vocabulary, spelling_of, vocabulary_of
from surgery.reports.result import timed
from surgery_formats.adapters.soft_prompts import soft_prompt
from surgery_formats.errors import FitError
from surgery_formats.models.identity import content_id
from surgery_formats.text import show

__all__ = ["PromptResult", "prompt_transfer"]

_METHODS = ("auto", "ridge", "orthogonal")
_FEWEST = 50  # tokens
_WORTHLESS, _DOUBTFUL = 0.05, 0.5  # shares of the variance of held-out tokens


@timed
def prompt_transfer(
    prompt: AdapterLike,
    base: CheckpointLike,
    *,
    onto: CheckpointLike,
    output: StrPath | None = None,
    method: str = "auto",
    texts: Texts | None = None,
    length: int = 128,
    accept_loss: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> PromptResult:
    """Write a soft prompt for another model: its rows, led there by a map that is fitted to the tokens both models have.

    Args:
        prompt: File or folder of an adapter with virtual tokens, or an opened Adapter.
        base: The model it was trained on.
        onto: The model to write it for, of the same tokenizer.
        output: Folder to make. Its parent must exist.
        method: ``ridge``, ``orthogonal``, or ``auto``: what explains more of a part of the tokens.
        texts: What to measure its gain on, on both models: a text, token ids, or several. The reference computes it, with torch.
        length: Most tokens of a text; longer ones are cut into pieces.
        accept_loss: Write what a map makes that explains next to nothing, too.
        overwrite: Replace an existing output, atomically.
        dry_run: Give the score, write nothing.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: an input cannot be read.
        FitError: keys and values, which mean nothing to another model; too few tokens in common; a map that is worth nothing.
        OutputExistsError, ResourceError, ProofError: nothing is left behind.
    """
    check_counts(least=2, length=length)
    if method not in _METHODS:
        raise FitError(f"no method '{show(method, 40)}'", hint=f"one of {', '.join(_METHODS)}")
    folder = output_path(output, dry_run=dry_run)
    adapter, old, new = as_adapter(prompt, "prompt"), as_checkpoint(base), as_checkpoint(onto, "onto")
    found = soft_prompt(adapter)
    check_alone(adapter, found)
    if found.prefix is not None:
        raise FitError(f"{found.kind} holds keys and values, which mean nothing to another model", file=adapter.path)
    here, there = vocabulary_of(old.main, found), input_vocabulary(new.main)
    shared = shared_tokens(spelling_of(old.main.folder), spelling_of(new.main.folder), (here.size, there.size))
    if len(shared) < _FEWEST:
        raise FitError(f"the two models have {len(shared)} tokens in common: a map needs {_FEWEST}", file=new.path)
    if method == "orthogonal" and here.width != there.width:
        raise FitError(f"an orthogonal map leads from {here.width} numbers to as many, not to {there.width}")
    led = fitted_map(here, there, shared, method)
    rows = table_of(found)
    image = np.asarray(rows.astype(np.float64) @ led.matrix, np.float32)
    spacing = spacing_of(here)
    readings = [reading_of(near, row, spacing).verdict for near, row in zip(search(here, rows, 1), rows, strict=True)]
    near = sum(verdict in ("itself", "near") for verdict in readings)
    score = TransferScore(led.method, led.fitted, led.held_out, led.explained, led.found, near)
    if texts is not None:
        from surgery.prompts.gain import losses  # torch

        pieces = token_rows(texts, old.main.folder, length)
        before, after = losses(old.main, rows, pieces), losses(new.main, image, pieces)
        told = dict(zip(("old without", "old with", "new without", "new with"), (*before, *after), strict=True))
        score = replace(score, losses=told)
    if score.explained < _WORTHLESS and not accept_loss:
        raise FitError(
            f"the map explains {score.explained:.1%} of the variance of {score.held_out} tokens that it was not fitted to: "
            "what it makes of the prompt is worth nothing",
            file=new.path,
            hint="`accept_loss=True` writes it anyway",
        )
    made = MadePrompt("peft", "PROMPT_TUNING", image, there.width)
    result = PromptResult(
        None,
        "transfer",
        ((adapter.path, 1.0),),
        made.kind,
        made.tokens,
        "rows led by a map between the vocabularies",
        False,
        score,
        _warnings(score, made.tokens),
    )
    if folder is None:
        return result
    facts = {"verb": "prompt transfer", "method": method, "bases": [content_id(old), content_id(new)]}
    return write_prompt(
        made, result, folder, (adapter,), facts, overwrite=overwrite, also=(old.path, new.path), base=new
    )


def _warnings(score: TransferScore, tokens: int) -> tuple[str, ...]:
    found = []
    if score.explained < _DOUBTFUL:
        found.append(f"the map explains {score.explained:.0%} of the variance of held-out tokens: expect little")
    if score.near < tokens:
        found.append(
            f"{tokens - score.near} of {tokens} virtual tokens lie where no token is: what the map is worth for tokens says little of them"
        )
    if score.losses and (score.kept is None or score.kept <= 0):
        found.append("on these texts the new model is no better with the prompt than without")
    if not score.losses:
        found.append("only texts tell what it is worth: none were given")
    return tuple(found)
