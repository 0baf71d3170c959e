# SPDX-License-Identifier: Apache-2.0
"""From a soft prompt, its base and texts to the report of what each virtual token does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from surgery.progress import Callback
from surgery.prompts.conversion import check_positions
from surgery.prompts.effect_result import EffectReport, Substitute, VirtualEffect
from surgery.prompts.effects import Effects, Measured, Subject, measure_effects
from surgery.prompts.search import search
from surgery.prompts.token_texts import token_texts
from surgery.prompts.vocabulary import Vocabulary, vocabulary_of
from surgery.reference import Cache, Reference, open_reference
from surgery_formats.arrays import cast
from surgery_formats.binding.prompt_fit import check_prompt
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component

__all__ = ["effect_report"]

_DRAWS = 4
_SHOWN = 3


def effect_report(
    adapter: Adapter,
    prompt: SoftPrompt,
    component: Component,
    texts: Sequence[Sequence[int]],
    given: int,
    progress: Callback | None = None,
) -> EffectReport:
    """Measure what a prompt and each of its tokens do on texts, which are taken from `given` tokens.

    Raises:
        FitError: no recipe for the model, no decoder, another base, or a text that is too long for it.
    """
    check_positions(adapter, prompt)
    reference = open_reference(component)
    check_prompt(prompt, reference.model)
    if not reference.model.generates:
        raise FitError("what a token does is seen in the next token, and an encoder has none", file=component.folder)
    vocabulary = None if prompt.prefix is not None else vocabulary_of(component, prompt)
    subject, nearest = _subject(prompt, reference, vocabulary)
    effects = measure_effects(reference, subject, texts, progress)
    tokens = tuple(_token(effects, number, nearest) for number in range(subject.tokens))
    shown = {row for token in tokens for row, _ in (*token.raises, *token.lowers)} | set(nearest)
    return EffectReport(
        adapter.path,
        component.folder,
        prompt.kind,
        len(texts),
        effects.positions,
        given,
        _mean(effects, effects.whole),
        _mean(effects, effects.without),
        None if effects.all_nearest is None else _mean(effects, effects.all_nearest),
        None if effects.all_drawn is None else _mean(effects, effects.all_drawn),
        tokens,
        *token_texts(component.folder, shown),
        component.nbytes,
    )


def _subject(
    prompt: SoftPrompt, reference: Reference, vocabulary: Vocabulary | None
) -> tuple[Subject, tuple[int, ...]]:
    """The prompt as tensors, and the token nearest to each of its rows."""
    if vocabulary is None:
        pairs = [prompt.key_values(layer) for layer in range(len(reference.model.layers))]
        layers = tuple((_tensor(key)[None], _tensor(value)[None]) for key, value in pairs)
        return Subject(prefix=Cache(layers, torch.ones(1, prompt.virtual_tokens, dtype=torch.bool))), ()
    rows = cast(prompt.embeddings(), DType.F32)
    nearest = [found["cosine"][0].id for found in search(vocabulary, rows, 1, measures=("cosine",))]
    drawn = np.random.default_rng(0).integers(0, vocabulary.size, (_DRAWS, len(rows)))
    chosen = torch.from_numpy(vocabulary.chosen([*nearest, *drawn.reshape(-1).tolist()])).to(reference.dtype)
    others = chosen[len(nearest) :].reshape(_DRAWS, len(rows), -1)
    return Subject(_tensor(rows), None, chosen[: len(nearest)], others), tuple(nearest)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def _mean(effects: Effects, measured: Measured) -> Substitute:
    return Substitute(measured.divergence / effects.positions, measured.loss / effects.followed)


def _token(effects: Effects, number: int, nearest: Sequence[int]) -> VirtualEffect:
    hidden = effects.hidden[number]
    assert hidden.change is not None
    assert effects.attention is not None
    by_layer = tuple((effects.attention[:, number] / effects.positions).tolist())
    return VirtualEffect(
        number,
        _mean(effects, hidden),
        sum(by_layer) / len(by_layer),
        by_layer,
        _greatest(hidden.change / effects.positions),
        _greatest(-hidden.change / effects.positions, -1),
        nearest[number] if nearest else None,
        _mean(effects, effects.as_nearest[number]) if effects.as_nearest else None,
        _mean(effects, effects.as_drawn[number]) if effects.as_drawn else None,
    )


def _greatest(change: torch.Tensor, sign: int = 1) -> tuple[tuple[int, float], ...]:
    values, rows = change.topk(min(_SHOWN, len(change)))
    return tuple((int(row), sign * float(value)) for row, value in zip(rows, values, strict=True) if value > 0)
