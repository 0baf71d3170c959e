# SPDX-License-Identifier: Apache-2.0
"""What virtual tokens do: each is taken away, and what the model then expects of a text is compared with what it did.

The reference computes it (`surgery.reference`). A token that is taken away is hidden from every layer's attention; all others
keep their positions, so that nothing else changes. Of embeddings, each is also put in the place of the row of a vocabulary
token: the nearest one, and, to tell what that is worth, one drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from surgery.progress import Callback, Progress
from surgery.reference import Cache, Reference, forward

__all__ = ["Effects", "Measured", "Subject", "measure_effects"]

_LOGITS = 1 << 25  # numbers in memory at a time: rows, positions and tokens


@dataclass(frozen=True)
class Subject:
    """A soft prompt as tensors.

    Attributes:
        embeddings: ``(n, D)``, or None.
        prefix: Keys and values, or None.
        nearest: ``(n, D)``: the row of the token nearest to each; None for keys and values.
        drawn: ``(draws, n, D)``: rows of tokens drawn at random; None for keys and values.
    """

    embeddings: torch.Tensor | None = None
    prefix: Cache | None = None
    nearest: torch.Tensor | None = None
    drawn: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of virtual tokens."""
        if self.prefix is not None:
            return self.prefix.real.shape[1]
        return 0 if self.embeddings is None else self.embeddings.shape[0]


@dataclass
class Measured:
    """Sums over the positions of texts.

    Attributes:
        divergence: KL from what the whole prompt makes the model expect, in nats.
        loss: Negative log-likelihood of the tokens that follow.
        change: ``(V,)``: probability that the whole prompt adds to each token; empty where it is not kept.
    """

    divergence: float = 0.0
    loss: float = 0.0
    change: torch.Tensor | None = None


@dataclass
class Effects:
    """Sums over all texts; divide by `positions`, or by `followed` for losses.

    Attributes:
        whole: With the whole prompt.
        without: Without any.
        hidden: By virtual token, without it.
        as_nearest: By virtual token, with its nearest vocabulary token in its place.
        as_drawn: The same with tokens drawn at random, the mean of the draws.
        all_nearest: With all of them as their nearest.
        all_drawn: With all of them as tokens drawn at random, the mean of the draws.
        attention: ``(layers, n)``: the share of its attention that a token of the text pays to each.
        positions: Tokens of the texts.
        followed: Of these, those that have a next one.
    """

    whole: Measured = field(default_factory=Measured)
    without: Measured = field(default_factory=Measured)
    hidden: list[Measured] = field(default_factory=list)
    as_nearest: list[Measured] = field(default_factory=list)
    as_drawn: list[Measured] = field(default_factory=list)
    all_nearest: Measured | None = None
    all_drawn: Measured | None = None
    attention: torch.Tensor | None = None
    positions: int = 0
    followed: int = 0


@torch.no_grad()
def measure_effects(
    reference: Reference, subject: Subject, texts: Sequence[Sequence[int]], progress: Callback | None = None
) -> Effects:
    """Measure on texts, as token ids; `progress` is told the tokens that are done.

    Raises:
        FitError: an id beyond the vocabulary, or more tokens than the model has positions.
    """
    count = subject.tokens
    effects = Effects(hidden=[Measured() for _ in range(count)])
    if subject.nearest is not None:
        effects.as_nearest, effects.as_drawn = ([Measured() for _ in range(count)] for _ in "ab")
        effects.all_nearest, effects.all_drawn = Measured(), Measured()
    for text in texts:
        _add_text(effects, _Text(reference, subject, torch.tensor([list(text)])))
        if progress is not None:
            progress(Progress(effects.positions, sum(map(len, texts)), "measuring"))
    return effects


class _Text:
    """One text, and the model under one prompt or another before it."""

    def __init__(self, reference: Reference, subject: Subject, ids: torch.Tensor) -> None:
        self.reference, self.subject, self.ids = reference, subject, ids
        self.attention: list[torch.Tensor] = []
        self.log_whole = self._log_probabilities(subject.embeddings, subject.prefix, watch=True)[0]

    def without(self) -> torch.Tensor:
        """``(S, V)``: without the prompt."""
        return self._log_probabilities(None, None)[0]

    def hiding(self, first: int, stop: int) -> torch.Tensor:
        """``(tokens, S, V)``: without each of the virtual tokens from `first`."""
        rows, count = stop - first, self.subject.tokens
        hidden = torch.zeros(rows, count + self.ids.shape[1], dtype=torch.bool)
        hidden[torch.arange(rows), torch.arange(first, stop)] = True
        return self._log_probabilities(self.subject.embeddings, self.subject.prefix, hidden)

    def with_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """``(B, S, V)``: with prompts of other rows ``(B, n, D)``."""
        return self._log_probabilities(rows, None)

    def _log_probabilities(
        self,
        virtual: torch.Tensor | None,
        past: Cache | None,
        hidden: torch.Tensor | None = None,
        *,
        watch: bool = False,
    ) -> torch.Tensor:
        rows = 1 if hidden is None else len(hidden)
        rows = virtual.shape[0] if virtual is not None and virtual.ndim == 3 else rows
        count, length = self.subject.tokens, self.ids.shape[1]

        def pay(weights: torch.Tensor) -> None:  # (B, kv_heads, group, S, T)
            self.attention.append(weights[..., -length:, :count].mean((0, 1, 2, 3)))

        output = forward(
            self.reference,
            self.ids.expand(rows, -1),
            past=None if past is None else past.expand(rows),
            virtual=virtual,
            hidden=hidden,
            watch=pay if watch else None,
        )
        return torch.log_softmax(output.logits[:, -length:].double(), -1)


def _add_text(effects: Effects, text: _Text) -> None:
    ids, whole = text.ids[0], text.log_whole
    count, length = text.subject.tokens, len(ids)
    effects.positions += length
    effects.followed += length - 1
    attention = torch.stack(text.attention) * length
    effects.attention = attention if effects.attention is None else effects.attention + attention
    _add(effects.whole, whole, whole, ids)
    _add(effects.without, whole, text.without(), ids, keep=True)
    together = max(1, _LOGITS // ((length + count) * whole.shape[-1]))
    for first in range(0, count, together):
        stop = min(first + together, count)
        for number, row in zip(range(first, stop), text.hiding(first, stop), strict=True):
            _add(effects.hidden[number], whole, row, ids, keep=True)
    rows, nearest, drawn = text.subject.embeddings, text.subject.nearest, text.subject.drawn
    if rows is None or nearest is None or drawn is None or effects.all_nearest is None or effects.all_drawn is None:
        return
    _add(effects.all_nearest, whole, text.with_rows(nearest[None])[0], ids)
    for one in drawn:
        _add(effects.all_drawn, whole, text.with_rows(one[None])[0], ids, 1 / len(drawn))
    for into, others, share in ((effects.as_nearest, nearest[None], 1.0), (effects.as_drawn, drawn, 1 / len(drawn))):
        for one in others:
            for first in range(0, count, together):
                numbers = torch.arange(first, min(first + together, count))
                prompts = rows.expand(len(numbers), -1, -1).clone()
                prompts[torch.arange(len(numbers)), numbers] = one[numbers]
                for number, row in zip(numbers.tolist(), text.with_rows(prompts), strict=True):
                    _add(into[number], whole, row, ids, share)


def _add(
    measured: Measured,
    whole: torch.Tensor,
    other: torch.Tensor,
    ids: torch.Tensor,
    share: float = 1.0,
    *,
    keep: bool = False,
) -> None:
    """Add a text: `whole` and `other` are log-probabilities ``(S, V)`` with the prompt and with what is in its place."""
    probabilities = whole.exp()
    measured.divergence += share * float((probabilities * (whole - other)).sum())
    measured.loss -= share * float(other[:-1].gather(1, ids[1:, None]).sum())
    if keep:
        change = (probabilities - other.exp()).sum(0)
        measured.change = change if measured.change is None else measured.change + change
