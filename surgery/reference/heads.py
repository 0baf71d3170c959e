# SPDX-License-Identifier: Apache-2.0
"""From the last hidden states to logits and the other outputs of a model."""

from __future__ import annotations

import torch

from surgery.reference.inserted import uncouple
from surgery.reference.primitives import activate, normalise, project
from surgery.reference.reference import Reference
from surgery.reference.sentence import embed_text
from surgery.reference.stored import stored
from surgery.reference.vision import mean_of_patches, pool
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import ClassifierHead, HiddenHead, LanguageHead, PooledHead, SpanHead
from surgery_formats.models.families.recipe_sentence import SentenceHead

__all__ = ["outputs_of"]

_BLOCK = 1 << 24  # elements of the head's matrix per step


def outputs_of(
    reference: Reference, values: torch.Tensor, ids: torch.Tensor, real: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits, and all outputs of a model that does not generate, by name; `real` are the tokens that are no padding."""
    head, load = reference.model.head, reference.load
    if isinstance(head, HiddenHead):
        pooled = {} if head.pooler is None else {"pooler_output": torch.tanh(project(values[:, 0], head.pooler, load))}
        return values, {"last_hidden_state": values, **pooled}
    if isinstance(head, PooledHead):
        return values, {"last_hidden_state": values, head.output: pool(values, ids, head, load)}
    if isinstance(head, SentenceHead):
        return values, {"last_hidden_state": values, "sentence_embedding": embed_text(values, real, head, load)}
    if isinstance(head, SpanHead):
        if head.before is not None:
            values = activate(project(values, head.before[0], load), head.before[1])
        start, end = project(normalise(values, head.norm, load), head.projection, load).unbind(-1)
        return start, {"start_logits": start, "end_logits": end}
    if isinstance(head, ClassifierHead):
        if head.tokens in ("first", "last"):
            values = values[torch.arange(len(values)), _places(head, ids, values)]
        if head.tokens in ("patches", "first_and_patches"):
            values = mean_of_patches(values, reference.model, head.tokens == "first_and_patches")
        for index, (step, activation) in enumerate(head.steps):
            if head.tokens == "mean" and index == head.early:
                values = torch.stack([row[tokens].mean(0) for row, tokens in zip(values, real, strict=True)])
            if step is head.steps[-1][0]:
                values = normalise(values, head.norm, load)
            values = activate(project(values, step, load), activation)
        return values, {"logits": values}
    logits = _logits(reference, values, head)
    return logits, {"logits": logits}


def _places(head: ClassifierHead, ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The place in each row, virtual tokens counted, of the token whose state is classified.

    Raises:
        FitError: several rows without a padding token.
    """
    rows, width = values.shape[:2]
    if head.tokens == "first":
        return torch.zeros(rows, dtype=torch.long)
    if head.padding_token is None:
        if rows > 1:
            raise FitError(
                "several rows, but the model has no pad_token_id to tell where each ends", file="config.json"
            )
        return torch.full((rows,), width - 1)
    front = width - ids.shape[1]
    found = [[place for place, token in enumerate(row) if token != head.padding_token] for row in ids.tolist()]
    return torch.tensor([front + row[-1] if row else max(0, front - 1) for row in found])


def _logits(reference: Reference, values: torch.Tensor, head: LanguageHead) -> torch.Tensor:
    if head.before is not None:
        values = activate(project(values, head.before, reference.load), head.activation)
    values = normalise(values, head.norm, reference.load)
    for network in reversed(head.inverted):
        values = uncouple(values, network, reference.load)
    output = head.projection
    height = max(1, _BLOCK // output.inputs)
    logits = torch.cat(
        [
            values @ reference.weights.load(output.weight, start, start + height).to(reference.dtype).T
            for start in range(0, output.outputs, height)
        ],
        dim=-1,
    )
    if output.bias:
        logits = logits + reference.load(output.bias)
    logits = logits / head.divisor
    if head.bias:
        logits = logits + reference.load(head.bias)
    logits = stored(logits, "the logits")
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
