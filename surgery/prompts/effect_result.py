# SPDX-License-Identifier: Apache-2.0
"""What virtual tokens do, as ``surgery prompt nearest --by effect`` reports it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.reports.output import PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.to_json import plain
from surgery.reports.values import Name, Phrase, Value

__all__ = ["EffectReport", "Substitute", "VirtualEffect"]


@dataclass(frozen=True)
class Substitute:
    """What a prompt is worth with other rows in the place of some.

    Attributes:
        divergence: Mean KL from what the whole prompt makes the model expect, in nats per token.
        loss: Mean negative log-likelihood of the texts, in nats per token.
    """

    divergence: float
    loss: float


@dataclass(frozen=True)
class VirtualEffect:
    """What one virtual token does.

    Attributes:
        number: From 0.
        without: The prompt without it.
        attention: Share of its attention that a token of the texts pays to it, the mean of all layers.
        by_layer: The same of each layer.
        raises: Tokens that it makes likelier, with the probability it adds to each, the mean over the texts.
        lowers: Tokens that it makes less likely.
        nearest: The vocabulary token nearest to it by cosine; None for keys and values.
        as_nearest: The prompt with that token's row in its place.
        as_drawn: The prompt with a token drawn at random in its place, the mean of several draws.
    """

    number: int
    without: Substitute
    attention: float
    by_layer: tuple[float, ...]
    raises: tuple[tuple[int, float], ...]
    lowers: tuple[tuple[int, float], ...]
    nearest: int | None = None
    as_nearest: Substitute | None = None
    as_drawn: Substitute | None = None


@summarised
@dataclass(frozen=True)
class EffectReport:
    """What a soft prompt and each of its virtual tokens do.

    Attributes:
        path: The prompt.
        base: The model.
        kind: Of the prompt.
        texts: Number of texts.
        positions: Their tokens.
        given: Tokens of all that was given to measure on; the texts are spread evenly over them.
        whole: With the whole prompt.
        without: Without it.
        all_nearest: With the nearest vocabulary tokens in the place of all; None for keys and values.
        all_drawn: With tokens drawn at random in their place, the mean of several draws.
        tokens: Every virtual token.
        spelt: How the tokenizer spells the tokens found, by id; empty without one.
        decoded: The same as people read them.
        nbytes: Of the model's weight files.
        warnings: What the user should know.
        seconds: How long it took.
    """

    path: Path
    base: Path
    kind: str
    texts: int
    positions: int
    given: int
    whole: Substitute
    without: Substitute
    all_nearest: Substitute | None
    all_drawn: Substitute | None
    tokens: tuple[VirtualEffect, ...]
    spelt: dict[int, str]
    decoded: dict[int, str]
    nbytes: int
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    @property
    def gain(self) -> float:
        """Nats per token that the prompt saves on the texts."""
        return self.without.loss - self.whole.loss

    def kept(self, other: Substitute | None) -> float | None:
        """The share of the gain that is left with other rows; None where there is no gain, or nothing to compare."""
        return None if other is None or self.gain <= 0 else (self.without.loss - other.loss) / self.gain

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        kept = {"nearest_keeps": self.kept(self.all_nearest), "drawn_keeps": self.kept(self.all_drawn)}
        return {**plain(self), "gain": self.gain, **plain(kept)}

    def summary(self, *, verbose: bool = False) -> Summary:
        """What the prompt does as a whole, then what each token does; the attention of every layer if `verbose`."""
        plural = "s" if self.texts != 1 else ""
        part = f" of {self.given}, spread evenly" if self.positions < self.given else ""
        facts: list[tuple[Phrase, Phrase]] = [
            ("prompt", (Name(self.path, PATH), " (", Name(self.kind), ")")),
            ("base", Name(self.base, PATH)),
            ("measured on", f"{self.texts} text{plural}, {self.positions} tokens{part}"),
            ("loss", (*_nats(self.whole.loss), " with the prompt, ", *_nats(self.without.loss), " without")),
        ]
        for label, other in (("nearest tokens", self.all_nearest), ("random tokens", self.all_drawn)):
            if other is not None:
                kept = self.kept(other)
                share = () if kept is None else (", ", Value(kept, "share", 0), " of what the prompt gains")
                facts.append((label, (*_nats(other.loss), " in the place of all", *share)))
        sections: list[Section] = [Facts(tuple(facts)), self._table()]
        if verbose:
            sections.append(self._layers())
        else:
            sections.append(Note("the attention of each layer", "omitted"))
        return Summary(self.path.resolve().name, (*sections, *warning_notes(self.warnings)))

    def _table(self) -> Table:
        columns = (
            Column("token", "integer"), Column("KL without it", "number", 3), Column("loss", "figure"),
            Column("attention", "share", 1), Column("KL as nearest", "number", 3), Column("nearest"),
            Column("KL as random", "number", 3), Column("makes likelier", spare=1),
            Column("less likely", spare=2),
        )  # fmt: skip
        rows = tuple(
            (
                token.number, token.without.divergence, f"{token.without.loss - self.whole.loss:+.4f}", token.attention,
                None if token.as_nearest is None else token.as_nearest.divergence,
                None if token.nearest is None else (self._spelt(token.nearest),),
                None if token.as_drawn is None else token.as_drawn.divergence,
                self._changes(token.raises), self._changes(token.lowers),
            )
            for token in self.tokens
        )  # fmt: skip
        return Table(columns, rows, "What each virtual token does")

    def _layers(self) -> Table:
        columns = (Column("layer", "integer"), *(Column(f"to {t.number}", "share", 1) for t in self.tokens))
        layers = len(self.tokens[0].by_layer) if self.tokens else 0
        return Table(columns, tuple((n, *(token.by_layer[n] for token in self.tokens)) for n in range(layers)))

    def _changes(self, changes: tuple[tuple[int, float], ...]) -> Phrase:
        """As a phrase: tokens are escaped already, and would be again as a name."""
        return (", ".join(f"{self._spelt(row)} {by:+.1%}" for row, by in changes),)

    def _spelt(self, row: int) -> str:
        return self.decoded.get(row, f"#{row}")


def _nats(loss: float) -> tuple[Value, str]:
    return Value(loss, "fixed", 4), " nats"
