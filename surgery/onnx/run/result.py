# SPDX-License-Identifier: Apache-2.0
"""What a run gives: texts or scores, and how long they took."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from surgery.reports.result import summarised
from surgery.reports.sections import Note, Verbatim
from surgery.reports.summary import Summary
from surgery.reports.to_json import plain
from surgery_formats.text import numbered, show

__all__ = ["RunResult", "RunText"]

_BEST = 3  # labels of an encoder that are shown


@dataclass(frozen=True)
class RunText:
    """The output for one input.

    Attributes:
        prompt: Ids that went in, virtual ones not among them.
        tokens: New ids.
        text: Of the new ids; None without a tokenizer.
        reason: Why it ended: ``stop``, ``length`` or ``full``; empty for an encoder.
        scores: Of an encoder that classifies: label to probability (of a regression: value), of the text or of each
            token.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    text: str | None = None
    reason: str = ""
    scores: tuple[dict[str, float], ...] = ()


@summarised
@dataclass(frozen=True)
class RunResult:
    """All that came out.

    Attributes:
        texts: One per input.
        device: It ran on.
        virtual_tokens: Of the soft prompt in use.
        load_seconds: Until the session stood.
        first_seconds: Prefill and first token.
        seconds: Of the whole generation.
        new_tokens: Of all rows.
        arrays: Raw outputs of an encoder, by name.
        inputs: As they were given.
    """

    texts: tuple[RunText, ...]
    device: str
    virtual_tokens: int
    load_seconds: float
    first_seconds: float
    seconds: float
    new_tokens: int
    arrays: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str | tuple[int, ...], ...] = ()

    warnings: ClassVar[tuple[str, ...]] = ()  # a text that reached the longest sequence has the reason full
    nbytes: ClassVar[int] = 0  # not counted for this verb

    def as_json(self) -> dict[str, Any]:
        """The result as plain values, for ``--json``."""
        record: dict[str, Any] = plain(replace(self, arrays={}))
        del record["inputs"]
        return record | {"arrays": {name: list(array.shape) for name, array in self.arrays.items()}}

    def summary(self, *, verbose: bool = False) -> Summary:
        """The text or the scores of every input, then device and times.

        With `verbose` also the input and output tokens of each.
        """
        lines = [line for number, text in enumerate(self.texts) for line in self._lines(number, text)]
        if not any(text.scores for text in self.texts):
            lines += [f"{show(name)}\t{'x'.join(map(str, array.shape))}" for name, array in self.arrays.items()]
        notes = [self._times()]
        if any(text.reason == "full" for text in self.texts):
            notes.append("the graph's longest sequence is reached")
        if verbose:
            notes += [
                f"{numbered(len(text.prompt), 'token')} in, {len(text.tokens)} out, ended by {text.reason or 'itself'}"
                for text in self.texts
            ]
        return Summary("Output", (*([Verbatim("\n".join(lines))] if lines else []), *map(Note, notes)))

    def _times(self) -> str:
        text = f"{self.device}: loaded in {self.load_seconds:.2f} s"
        if self.virtual_tokens:
            text += f", {numbered(self.virtual_tokens, 'virtual token')}"
        if self.new_tokens:
            text += f", first token {self.first_seconds * 1e3:.1f} ms, {numbered(self.new_tokens, 'token')}"
            following, left = self.new_tokens - len(self.texts), self.seconds - self.first_seconds
            text += f", {following / left:.1f} tokens/s" if left > 0 and following > 0 else ""
        return text

    def _lines(self, number: int, text: RunText) -> Iterator[str]:
        if len(self.texts) > 1:
            yield f"> {show(self.inputs[number])}"
        for token, scores in enumerate(text.scores):
            best = sorted(scores.items(), key=lambda pair: -pair[1])[:_BEST]
            place = f"{token}\t" if len(text.scores) > 1 else ""
            yield place + "  ".join(f"{show(label)} {share:.4f}" for label, share in best)
        if text.reason and not text.scores:
            yield ",".join(map(str, text.tokens)) if text.text is None else text.text
