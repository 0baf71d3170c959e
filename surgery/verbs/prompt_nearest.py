# SPDX-License-Identifier: Apache-2.0
"""The vocabulary tokens nearest to virtual ones, and what each of these is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from surgery.engine.inputs import AdapterLike, CheckpointLike, as_adapter, as_checkpoint, check_counts
from surgery.progress import Callback
from surgery.prompts.effect_result import EffectReport
from surgery.prompts.nearest_result import NearestReport, VirtualToken
from surgery.prompts.search import search
from surgery.prompts.spacing import reading_of, spacing_of
from surgery.prompts.texts import Texts, spread, token_rows
from surgery.prompts.token_texts import token_texts
from surgery.prompts.vocabulary import component_for, vocabulary_of
from surgery.reports.result import timed
from surgery_formats.adapters.soft_prompts import soft_prompt, soft_prompts
from surgery_formats.arrays import cast
from surgery_formats.binding.bind import warn_of_other_base
from surgery_formats.dtypes import DType
from surgery_formats.errors import UsageError
from surgery_formats.text import show

__all__ = ["EffectReport", "NearestReport", "prompt_nearest"]


@timed
def prompt_nearest(
    prompt: AdapterLike,
    base: CheckpointLike,
    *,
    by: str = "distance",
    texts: Texts | None = None,
    length: int = 128,
    max_tokens: int | None = 2048,
    top: int = 5,
    sample: int | None = None,
    component: str | None = None,
    progress: Callback | None = None,
) -> NearestReport | EffectReport:
    """Find the tokens of a vocabulary that are nearest to virtual ones, by cosine, distance and dot product; or what each does.

    Beside each match stands what it is worth: how far real tokens are from their own nearest neighbours, and how near a
    random direction comes to one. The embedding is read in blocks, once for the prompt and once for the spacing.

    Args:
        prompt: File or folder of an adapter with virtual tokens, or an opened Adapter.
        base: The model it was trained on.
        by: ``distance``; or ``effect``: what each virtual token does to the next token and to attention, and what is left of
            that with its nearest token in its place. The reference computes it, with torch.
        texts: With ``by="effect"``, what to measure on: a text, token ids, or several of these.
        length: Most tokens of a text; longer ones are cut into pieces.
        max_tokens: Most tokens of all texts to measure on; of more, pieces spread evenly over them. None measures on all. The
            reference runs on each of them once for the prompt and six times for every virtual token, of keys and values once.
        top: How many tokens to find of each.
        sample: How many tokens are asked for their own nearest neighbour; by default all of a small vocabulary, else 512.
        component: Of virtual tokens for several text encoders, the one to look at.
        progress: Called with the tokens measured so far, of an effect.

    Raises:
        UsageError: an argument of a wrong type, or an effect and no texts.
        InputError: the adapter or the base cannot be read.
        FitError: the prompt holds keys and values, which lie among no tokens, or does not fit the base; of an effect, the
            model is no decoder with a recipe.
    """
    check_counts(top=top, sample=sample)
    check_counts(least=2, length=length, max_tokens=max_tokens)
    if by not in ("distance", "effect"):
        raise UsageError(f"by is 'distance' or 'effect', not '{show(by, 40)}'")
    if by == "distance" and texts is not None:
        raise UsageError("distances are measured without texts", hint="ask for `by=effect`")
    adapter, checkpoint = as_adapter(prompt, "prompt"), as_checkpoint(base)
    found = soft_prompt(adapter, component)
    where = component if component is not None else next(iter(soft_prompts(adapter)))
    network = component_for(checkpoint, where)
    elsewhere = warn_of_other_base([adapter], checkpoint)
    if by == "effect":
        from surgery.prompts.effect_report import effect_report  # torch

        rows = token_rows(texts, network.folder, length)
        given = sum(map(len, rows))
        report = effect_report(adapter, found, network, spread(rows, max_tokens or given), given, progress)
        return replace(report, warnings=tuple(elsewhere))
    vocabulary = vocabulary_of(network, found)
    vectors = cast(found.embeddings(), DType.F32)
    spacing = spacing_of(vocabulary, sample)
    tokens = tuple(
        VirtualToken(number, float(np.linalg.norm(vector)), nearest, reading_of(nearest, vector, spacing))
        for number, (vector, nearest) in enumerate(zip(vectors, search(vocabulary, vectors, top), strict=True))
    )
    ids = {near.id for token in tokens for ranked in token.nearest.values() for near in ranked}
    warnings = [] if vocabulary.told else ["whether this model scales its embeddings is not known; it is taken not to"]
    if found.submodules > 1:
        warnings.append("only the virtual tokens of the encoder are looked at: those of the decoder are not used")
    return NearestReport(
        adapter.path,
        checkpoint.path,
        found.kind,
        tokens,
        spacing,
        *token_texts(network.folder, ids),
        sum(source.nbytes for source in vocabulary.storage.sources),
        (*elsewhere, *warnings),
    )
