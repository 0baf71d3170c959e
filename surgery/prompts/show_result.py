# SPDX-License-Identifier: Apache-2.0
"""What a soft prompt is, as ``surgery prompt show`` reports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.reports.output import PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.to_json import plain
from surgery.reports.values import Name, Phrase, Value
from surgery_formats.canonical.prompts import Prefix

__all__ = ["PromptPart", "PromptReport"]

_LISTED = 32


@dataclass(frozen=True)
class PromptPart:
    """The virtual tokens for one network.

    Attributes:
        component: Part of a pipeline, or empty.
        tokens: Number of virtual tokens.
        dim: Numbers per token: of an embedding; of all key heads of one layer.
        submodules: 2 for an encoder and its decoder.
        prefix: Layout of keys and values; None for embeddings.
        dtype: Type they are stored in.
        norms: Of each row of embeddings; or of the keys of each token, over all layers.
        value_norms: Of the values of each token of a prefix; else empty.
        vocabulary_norm: The median norm of the base's tokens, where a base was given and there is something to compare.
        alike: The greatest cosine between two of its tokens; None with one token, or keys and values.
        fits: Whether its sizes are known to be the base's. A prompt of other sizes is refused.
    """

    component: str
    tokens: int
    dim: int
    submodules: int
    prefix: Prefix | None
    dtype: str
    norms: tuple[float, ...] = ()
    value_norms: tuple[float, ...] = ()
    vocabulary_norm: float | None = None
    alike: float | None = None
    fits: bool = False


@summarised
@dataclass(frozen=True)
class PromptReport:
    """A soft prompt.

    Attributes:
        path: The adapter.
        format: Of its files.
        kind: What they say it is.
        parts: By the network that they go before.
        parameters: Numbers trained.
        nbytes: Of its weight files.
        base_name: The base it says it was trained on, or empty.
        told: What its files tell of its making.
        base: The base that it was compared with, or None.
        warnings: What the user should know.
        seconds: How long it took.
    """

    path: Path
    format: str
    kind: str
    parts: tuple[PromptPart, ...]
    parameters: int
    nbytes: int
    base_name: str
    told: Mapping[str, str]
    base: Path | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        result: dict[str, Any] = plain(self)
        return result

    def summary(self, *, verbose: bool = False) -> Summary:
        """Sizes and origin, and the norm of every virtual token; of more than 32 the first, unless `verbose`."""
        rows: list[tuple[Phrase, Phrase]] = [
            ("prompt", Name(self.path, PATH)),
            ("format", Name(self.format)),
            ("kind", Name(self.kind)),
            *(("tokens", _sizes(part)) for part in self.parts),
            ("trained", (Value(self.parameters, "count"), " parameters, ", Value(self.nbytes, "bytes"))),
        ]
        rows += [(label, Name(text, 200)) for label, text in self.told.items()]
        if self.base_name:
            rows.append(("trained for", Name(self.base_name, PATH)))
        if self.base is not None:
            known = all(part.fits for part in self.parts)
            rows.append(("fits" if known else "base", Name(self.base, PATH)))
        shown = (_norms(part, part.tokens * part.submodules if verbose else _LISTED) for part in self.parts)
        return Summary(self.path.resolve().name, (Facts(tuple(rows)), *shown, *warning_notes(self.warnings)))


def _sizes(part: PromptPart) -> Phrase:
    where = (f" for {part.component}",) if part.component else ()
    twice = f", for each of {part.submodules} submodules" if part.submodules > 1 else ""
    if part.prefix is None:
        likeness = () if part.alike is None else (", the two most alike have the cosine ", Value(part.alike, "fixed"))
        return f"{part.tokens} of {part.dim} numbers ({part.dtype})", *where, twice, *likeness
    layout = f"{part.prefix.layers} layers, {part.prefix.kv_heads} heads of {part.prefix.head_dim}"
    return f"{part.tokens}, as keys and values of {layout} ({part.dtype})", *where, twice


def _norms(part: PromptPart, most: int) -> Table:
    if part.prefix is not None:
        columns = Column("token", "integer"), Column("norm of keys", "number", 3), Column("norm of values", "number", 3)
        return Table(columns, tuple(enumerate_rows(part.norms, part.value_norms))[:most])
    median = part.vocabulary_norm
    columns = Column("token", "integer"), Column("norm", "number", 3), Column("by a token's", "figure")
    relative = [None if not median else f"{norm / median:.1f}x" for norm in part.norms]
    return Table(columns, tuple(enumerate_rows(part.norms, relative))[:most])


def enumerate_rows(*columns: Any) -> list[tuple[Any, ...]]:
    """Rows of a table, numbered from 0."""
    return [(number, *cells) for number, cells in enumerate(zip(*columns, strict=True))]
