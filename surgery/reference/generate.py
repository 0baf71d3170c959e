# SPDX-License-Identifier: Apache-2.0
"""Greedy generation with a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.reference.model import Cache, Encoded, forward
from surgery.reference.reference import Reference
from surgery_formats.errors import FitError

__all__ = ["Greedy", "greedy"]


@dataclass(frozen=True)
class Greedy:
    """Generated tokens.

    Attributes:
        tokens: ``(B, steps)``.
        logits: ``(B, steps, V)``: the logits that each token was chosen by.
    """

    tokens: torch.Tensor
    logits: torch.Tensor


def greedy(
    reference: Reference,
    ids: torch.Tensor,
    steps: int,
    *,
    real: torch.Tensor | None = None,
    past: Cache | None = None,
    encoded: Encoded | None = None,
) -> Greedy:
    """Generate the most likely token, `steps` times.

    If rotary factors change with the length (``longrope``), the whole sequence is recomputed once it passes the trained
    length, because keys rotated by one set do not fit queries rotated by the other.

    Args:
        reference: A decoder.
        ids: ``(B, S)``, padded on either side.
        steps: Number of tokens.
        real: ``(B, S)``: which tokens are not padding.
        past: Cache of a soft prompt.
        encoded: What the decoder of an encoder-decoder looks at.

    Raises:
        FitError: not a decoder.
    """
    if not reference.model.generates:
        raise FitError("this model has no head to generate with")
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
    prompt = past
    output = forward(reference, ids, real=real, past=past, encoded=encoded)
    last = real.long().cumsum(1).argmax(1)  # the last real token of each row
    chosen = output.logits[torch.arange(len(ids)), last]
    tokens, logits = [chosen.argmax(-1)], [chosen]
    trained = _trained_length(reference)
    for _ in range(steps - 1):
        new = tokens[-1][:, None]
        ids = torch.cat((ids, new), dim=1)
        real = torch.cat((real, torch.ones_like(new, dtype=torch.bool)), dim=1)
        length = int(output.cache.real.sum(1).max()) + 1
        if trained is not None and length == trained + 1:
            output = forward(reference, ids, real=real, past=prompt, encoded=encoded)
        else:
            output = forward(reference, new, past=output.cache, encoded=encoded)
        tokens.append(output.logits[:, -1].argmax(-1))
        logits.append(output.logits[:, -1])
    return Greedy(torch.stack(tokens, dim=1), torch.stack(logits, dim=1))


def _trained_length(reference: Reference) -> int | None:
    """Length beyond which another set of rotary factors applies, or None."""
    ropes = (layer.attention.rope for layer in reference.model.layers)
    return next(
        (
            int(rope.parameters["original_max_position_embeddings"])
            for rope in ropes
            if rope is not None and rope.parameters["rope_type"] == "longrope"
        ),
        None,
    )
