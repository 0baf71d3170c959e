# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from surgery.reports.output import PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.to_json import plain
from surgery.reports.values import Name, Phrase, Value
from surgery_formats.text import numbered

__all__ = ["EvalResult", "ScoredModel"]


@dataclass(frozen=True)
class ScoredModel:
    """How well one model predicts the text.

    Attributes:
        path: The model.
        adapters: What was attached to it, or fills its slots.
        computed_by: ``reference``, or ``onnxruntime on cpu``.
        nats: Negative log-likelihood of all tokens, summed.
        bits_per_token: Mean over the tokens.
        bits_per_byte: By UTF-8 bytes of the text; None where tokens alone were given.
    """

    path: Path
    adapters: tuple[str, ...]
    computed_by: str
    nats: float
    bits_per_token: float
    bits_per_byte: float | None

    @staticmethod
    def bits_of(nats: float) -> float:
        """Nats in bits."""
        return nats / math.log(2)

    @classmethod
    def of(
        cls, path: Path, adapters: tuple[str, ...], computed_by: str, nats: float, tokens: int, nbytes: int | None
    ) -> ScoredModel:
        """From the sum of negative log-likelihoods, in nats."""
        bits = cls.bits_of(nats)
        return cls(path, adapters, computed_by, nats, bits / tokens, None if nbytes is None else bits / nbytes)


@summarised
@dataclass(frozen=True)
class EvalResult:
    """How well a model predicts a text, and how near it is to another.

    Attributes:
        model: The model.
        against: The other, or None.
        divergence: Mean Kullback-Leibler divergence of the model's distribution from the other's, ``KL(other || model)``, in
            nats per token; None without another.
        agreement: Share of tokens for which both expect the same one most; None without another.
        text: The text, or the tokens if they were given alone.
        text_bytes: UTF-8 bytes that were evaluated; None where tokens alone were given.
        limited: Whether the text goes on.
        tokens: Tokens that were predicted.
        windows: Windows that they were read in.
        context: Tokens of a window, without the one in front.
        stride: Tokens between the beginnings of two windows.
        begin: The token in front of every window.
        warnings: What the user should know.
        seconds: How long it took.
    """

    model: ScoredModel
    against: ScoredModel | None
    divergence: float | None
    agreement: float | None
    text: Path
    text_bytes: int | None
    limited: bool
    tokens: int
    windows: int
    context: int
    stride: int
    begin: int
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()
    nbytes: ClassVar[int] = 0  # not counted for this verb

    @property
    def bits_per_byte(self) -> float | None:
        """The model's."""
        return self.model.bits_per_byte

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = plain(self)
        return found

    def summary(self, *, verbose: bool = False) -> Summary:
        """The figures of each model, and how far they are apart."""
        begins = "its first " if self.limited else ""
        nbytes = () if self.text_bytes is None else (f" ({begins}{numbered(self.text_bytes, 'byte')})",)
        apart = "" if self.windows == 1 else f", {self.stride:,} apart"
        measured: list[tuple[Phrase, Phrase]] = [
            ("text", (Name(self.text, PATH), *nbytes)),
            (
                "measured on",
                f"{numbered(self.tokens, 'token')}, in {numbered(self.windows, 'window')} of at most {self.context:,}{apart}",
            ),
        ]
        columns = (
            Column("model", "name"), Column("with", "name"), Column("computed by", spare=1),
            Column("bits per byte", "fixed", 4), Column("bits per token", "fixed", 4),
        )  # fmt: skip
        sides = [self.model] if self.against is None else [self.model, self.against]
        rows = tuple(
            (str(s.path), ", ".join(s.adapters) or None, s.computed_by, s.bits_per_byte, s.bits_per_token)
            for s in sides
        )
        between: list[tuple[Phrase, Phrase]] = []
        if self.divergence is not None and self.agreement is not None and self.against is not None:
            between = [
                ("KL divergence", (Value(self.divergence, "number", 3), " nats per token")),
                ("same top token", (Value(self.agreement, "share", 2), f" of {self.tokens:,}")),
                ("bits", _better(self.model.nats, self.against.nats)),
            ]
        sections: list[Section] = [Facts(tuple(measured)), Table(columns, rows)]
        if between:
            sections.append(Facts(tuple(between)))
        return Summary("Evaluation", (*sections, *warning_notes(self.warnings)))


def _better(nats: float, other: float) -> Phrase:
    """Where two places behind the point are zeros, the sign would be of noise."""
    share = 1 - nats / other if other else 0.0
    if abs(share) < 0.00005:
        return "as many for both, to 0.01%"
    said = " fewer than the second needs: the first predicts the text better"
    if share < 0:
        said = " more than the second needs: the first predicts the text worse"
    return Value(abs(share), "share", 2), said
