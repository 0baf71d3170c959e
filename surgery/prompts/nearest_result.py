# SPDX-License-Identifier: Apache-2.0
"""The vocabulary tokens nearest to virtual ones, beside what a nearest token is worth, as reported."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.prompts.search import NearToken
from surgery.prompts.spacing import Reading, Spacing
from surgery.reports.output import PATH, counted
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.to_json import plain
from surgery.reports.values import Cell, Name, Phrase, Value

__all__ = ["NearestReport", "VirtualToken"]


@dataclass(frozen=True)
class VirtualToken:
    """A virtual token and the tokens near it.

    Attributes:
        number: From 0.
        norm: Of its row.
        nearest: By cosine, distance and dot product, the nearest first.
        reading: What the nearest are worth.
    """

    number: int
    norm: float
    nearest: dict[str, tuple[NearToken, ...]]
    reading: Reading


@summarised
@dataclass(frozen=True)
class NearestReport:
    """The tokens of a vocabulary that are nearest to virtual ones.

    Attributes:
        path: The prompt.
        base: The model whose vocabulary was searched.
        kind: Of the prompt.
        tokens: Every virtual token.
        spacing: How the vocabulary's tokens lie among themselves.
        texts: How the tokenizer spells the tokens found, by id; empty without one.
        decoded: The same as people read them.
        nbytes: Of the embedding that was read.
        warnings: What the user should know.
        seconds: How long it took.
    """

    path: Path
    base: Path
    kind: str
    tokens: tuple[VirtualToken, ...]
    spacing: Spacing
    texts: dict[int, str]
    decoded: dict[int, str]
    nbytes: int
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        result: dict[str, Any] = plain(self)
        return result

    def summary(self, *, verbose: bool = False) -> Summary:
        """The vocabulary's own spacing, then the nearest tokens of each virtual one; all that were found if `verbose`."""
        space = self.spacing
        asked = f" ({space.tokens} of {space.size} tokens)" if space.sampled else ""
        verdicts = Counter(token.reading.verdict for token in self.tokens)
        facts: list[tuple[Phrase, Phrase]] = [
            ("prompt", (Name(self.path, PATH), " (", Name(self.kind), ")")),
            ("vocabulary", (Name(self.base, PATH), f": {space.size} tokens, norms ", *_range(space.norm))),
            ("neighbours", ("distance ", *_range(space.distance), asked)),
            ("", ("cosine ", *_range(space.cosine), asked)),
            ("chance", ("a random direction comes as near as a cosine of ", Value(space.chance, "fixed"))),
            ("readings", counted({_WORDS[verdict]: number for verdict, number in verdicts.items()})),
        ]
        sections: list[Section] = [Facts(tuple(facts)), self._table(), *self._more(verbose)]
        return Summary(self.path.resolve().name, (*sections, *warning_notes(self.warnings)))

    def _table(self) -> Table:
        columns = (
            Column("token", "integer"), Column("norm", "number", 3), Column("by cosine"), Column("", "fixed"),
            Column("by distance"), Column("", "number", 3), Column("by dot", spare=1),
            Column("", "number", 3, spare=1), Column("reading"),
        )  # fmt: skip
        rows = []
        for token in self.tokens:
            cosine, distance, dot = (token.nearest[measure][0] for measure in ("cosine", "distance", "dot"))
            rows.append(
                (
                    token.number, token.norm, self._cell(cosine.id), cosine.cosine,
                    self._cell(distance.id), distance.distance, self._cell(dot.id), dot.dot, token.reading.why,
                )
            )  # fmt: skip
        return Table(columns, tuple(rows), "The tokens of the vocabulary that are nearest")

    def _more(self, verbose: bool) -> list[Section]:
        if not any(len(near) > 1 for token in self.tokens for near in token.nearest.values()):
            return []
        if not verbose:
            return [Note("the tokens behind the nearest", "omitted")]
        columns = Column("token", "integer"), Column("by"), Column("nearest")
        rows: list[tuple[Cell, ...]] = [
            (token.number, measure, (", ".join(f"{self._spelt(n.id)} {getattr(n, measure):.3g}" for n in near),))
            for token in self.tokens
            for measure, near in token.nearest.items()
        ]
        return [Table(columns, tuple(rows), "The tokens behind the nearest")]

    def _spelt(self, row: int) -> str:
        return self.decoded.get(row, f"#{row}")

    def _cell(self, row: int) -> Cell:
        return (self._spelt(row),)  # a phrase: what is escaped already would be escaped again as a name


_WORDS = {
    "itself": "a token itself",
    "near": "near a token",
    "by direction": "near by direction alone",
    "none": "near no token",
}


def _range(quantiles: dict[str, float]) -> tuple[str | Value, ...]:
    """The least, the median and the greatest."""
    low, middle, high = (Value(quantiles[share], "number", 3) for share in ("0", "0.5", "1"))
    return low, " to ", high, ", median ", middle
