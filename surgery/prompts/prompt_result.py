# SPDX-License-Identifier: Apache-2.0
"""What was made of soft prompts by combining, converting or transferring them, as reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.reports.output import DRY_RUN, PATH, nbytes_of, written, wrote
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Facts, Section
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.to_json import plain
from surgery.reports.values import Name, Phrase, Value

__all__ = ["PromptResult", "TransferScore"]


@dataclass(frozen=True)
class TransferScore:
    """How well a map between two vocabularies holds, on tokens that it was not fitted to.

    Attributes:
        method: ``ridge`` or ``orthogonal``.
        fitted: Tokens it was fitted to.
        held_out: Tokens it was tried on.
        explained: Share of their variance that it explains; 0 is what their mean would explain.
        found: Share of them whose image is nearer to the right token than to any other, by cosine.
        near: How many of the virtual tokens lie within the spacing of the vocabulary that the map was fitted to.
        losses: Nats per token on texts: of the old base without and with the prompt, and of the new one; empty without texts.
    """

    method: str
    fitted: int
    held_out: int
    explained: float
    found: float
    near: int
    losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> float | None:
        """The gain on the new base by the gain on the old one; None without texts, or without a gain."""
        if not self.losses:
            return None
        before = self.losses["old without"] - self.losses["old with"]
        return (self.losses["new without"] - self.losses["new with"]) / before if before > 0 else None


@summarised
@dataclass(frozen=True)
class PromptResult:
    """A soft prompt that was made, or (dry run) would be.

    Attributes:
        output: Folder or file; None for a dry run.
        verb: ``combine``, ``convert``, ``transfer``.
        sources: The prompts it was made of, with their weights.
        kind: What it is.
        tokens: How many virtual tokens it has.
        how: What was done, and whether it does the same.
        exact: Whether a model does with it what it did before.
        score: Of a transfer.
        warnings: What the user should know.
        seconds: How long it took.
    """

    output: Path | None
    verb: str
    sources: tuple[tuple[Path, float], ...]
    kind: str
    tokens: int
    how: str
    exact: bool
    score: TransferScore | None = None
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
        scored = {} if self.score is None else {"score": {**plain(self.score), "kept": plain(self.score.kept)}}
        return {
            "verb": f"prompt {self.verb}",
            "sources": [{"name": path.name, "weight": weight} for path, weight in self.sources],
            "kind": self.kind,
            "tokens": self.tokens,
            "how": self.how,
            "exact": self.exact,
            **scored,
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """What was made of what, and what it is worth.

        Args:
            verbose: Changes nothing.
            output: Where a dry run would write.
        """
        rows: list[tuple[Phrase, Phrase]] = [
            (self.verb, (Name(path, PATH), "" if weight == 1 else f" at {weight:g}")) for path, weight in self.sources
        ]
        rows += self._made()
        if self.output is not None:
            rows.append(("wrote", (Name(self.output, PATH), ": ", *wrote(self.output, self.seconds))))
        elif output is not None:
            rows.append(("would write", Name(output, PATH)))
        sections: list[Section] = [Facts(tuple(rows)), *([DRY_RUN] if self.output is None else [])]
        return Summary("Soft prompt", (*sections, *warning_notes(self.warnings)))

    def figures(self) -> tuple[tuple[Phrase, Phrase], ...]:
        """What was made, for a model card."""
        return tuple(self._made())

    def _made(self) -> list[tuple[Phrase, Phrase]]:
        rows: list[tuple[Phrase, Phrase]] = [
            ("kind", Name(self.kind)), ("tokens", str(self.tokens)), ("how", self.how),
        ]  # fmt: skip
        if (score := self.score) is not None:
            rows.append(("map", f"{score.method}, fitted to {score.fitted} tokens that both have"))
            rows.append(
                (
                    "held out",
                    (
                        Value(score.explained, "share", 1), f" of the variance of {score.held_out} tokens; ",
                        Value(score.found, "share", 1), " of them are nearest to themselves",
                    ),
                )
            )  # fmt: skip
            rows.append(("within reach", f"{score.near} of {self.tokens} virtual tokens lie among tokens"))
            if score.losses:
                rows += [
                    (f"{which} base", _losses(score.losses[f"{which} without"], score.losses[f"{which} with"]))
                    for which in ("old", "new")
                ]
            if score.kept is not None:
                rows.append(("kept", (Value(score.kept, "share", 0), " of what the prompt gains")))
        return rows


def _losses(without: float, with_it: float) -> Phrase:
    return Value(without, "fixed", 4), " nats without the prompt, ", Value(with_it, "fixed", 4), " with it"
