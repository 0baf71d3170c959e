# SPDX-License-Identifier: Apache-2.0
"""What was baked of a soft prompt, as reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.reports.output import DRY_RUN, PATH, nbytes_of, written, wrote
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Facts, Section, Verbatim
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Name, Phrase, Value

__all__ = ["BakeResult"]


@summarised
@dataclass(frozen=True)
class BakeResult:
    """A soft prompt, or a text, as a part of a model's files, or (dry run) what would be.

    Attributes:
        output: Folder; None for a dry run.
        form: ``tokens``: a model whose vocabulary has them; ``kv``: keys and values.
        prompt: Where it is from; None for a text.
        base: The model.
        kind: Of the prompt, or ``TEXT``.
        tokens: How many.
        ids: Of the tokens that were added.
        words: How the tokenizer writes all of them; empty without one.
        head: What became of the head's rows.
        rounding: Greatest rounding error of a value, by the greatest value.
        files: What the output has of its own, by name: what it is for.
        loading: How to load it.
        warnings: What the user should know.
        seconds: How long it took.
    """

    output: Path | None
    form: str
    prompt: Path | None
    base: Path
    kind: str
    tokens: int
    ids: tuple[int, ...] = ()
    words: str = ""
    head: str = ""
    rounding: float = 0.0
    files: Mapping[str, str] = field(default_factory=dict)
    loading: str = ""
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    @property
    def nbytes(self) -> int:
        """Size of all files written; 0 for a dry run."""
        return nbytes_of(self.output)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return written(self.output, self.seconds) | self.as_manifest()

    def as_manifest(self) -> dict[str, Any]:
        """The record in the manifest: the same for the same inputs and options, without paths and times."""
        return {
            "verb": "prompt bake",
            "as": self.form,
            "kind": self.kind,
            "tokens": self.tokens,
            "ids": list(self.ids),
            "words": self.words,
            "head": self.head,
            "rounding": self.rounding,
            "files": dict(self.files),
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """What was made, and how it is loaded.

        Args:
            verbose: Changes nothing.
            output: Where a dry run would write.
        """
        source: Phrase = "a text" if self.prompt is None else (Name(self.prompt, PATH), " (", Name(self.kind), ")")
        rows: list[tuple[Phrase, Phrase]] = [
            ("prompt", source),
            ("base", Name(self.base, PATH)),
            *self._made(),
        ]
        if self.output is not None:
            rows.append(("wrote", (Name(self.output, PATH), ": ", *wrote(self.output, self.seconds))))
        elif output is not None:
            rows.append(("would write", Name(output, PATH)))
        sections: list[Section] = [Facts(tuple(rows))]
        if self.output is None:
            sections.append(DRY_RUN)
        elif self.loading:
            sections.append(Verbatim(self.loading))
        return Summary("Baked prompt", (*sections, *warning_notes(self.warnings)))

    def figures(self) -> tuple[tuple[Phrase, Phrase], ...]:
        """What was made, for a model card."""
        return tuple(self._made())

    def _made(self) -> Iterator[tuple[Phrase, Phrase]]:
        yield "tokens", f"{self.tokens}" + (f", ids {self.ids[0]} to {self.ids[-1]}" if self.ids else "")
        if self.words:
            yield "written as", Name(self.words)
        if self.head:
            yield "head", self.head
        yield "rounding", (Value(self.rounding, "number"), " of the greatest value")
        yield from ((Name(name), what) for name, what in self.files.items())
