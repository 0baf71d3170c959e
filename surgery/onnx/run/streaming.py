# SPDX-License-Identifier: Apache-2.0
"""Rows that are generated group by group, timed, their text given out as it comes and cut off at stop words."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from surgery.onnx.run.generate import Continuation
from surgery.onnx.run.result import RunResult, RunText
from surgery.onnx.run.rows import Rows
from surgery.onnx.run.stop_words import CutText
from surgery.onnx.run.tokenizer import TextStream, Tokenizer

__all__ = ["Generation", "Prepare", "Streaming", "generate_groups"]

OnText = Callable[[int, str], None]
"""It is called with the number of a row and new text."""


class Generation(Protocol):
    """A generation that is prepared."""

    def __call__(self, *, on_token: Callable[[int, int], object]) -> tuple[Continuation, ...]:
        """Generate; `on_token` is called with row and token, and ends the row if it returns True."""


Prepare = Callable[[slice], Generation]
"""It prepares the generation of some of the rows."""


@dataclass(frozen=True)
class Streaming:
    """How rows become texts.

    Attributes:
        tokenizer: None for ids alone.
        stop: Texts that end a row, and are cut off.
        on_text: Called as text comes.
    """

    tokenizer: Tokenizer | None
    stop: Sequence[str] = ()
    on_text: OnText | None = None


def generate_groups(rows: Rows, size: int, prepare: Prepare, streaming: Streaming, blank: RunResult) -> RunResult:
    """Generate `rows`, at most `size` at a time.

    Args:
        rows: Ids that go in, one row at least.
        size: Most rows of a group.
        prepare: Prepares the generation of a group, whose buffers are free again before the next one is prepared.
        streaming: How rows become texts.
        blank: The result without texts: device, virtual tokens and seconds of loading.
    """
    results = [
        _streamed(rows[at : at + size], at, prepare(slice(at, at + size)), streaming, blank)
        for at in range(0, len(rows), size)
    ]
    return replace(
        results[0],
        texts=tuple(text for result in results for text in result.texts),
        seconds=sum(result.seconds for result in results),
        new_tokens=sum(result.new_tokens for result in results),
    )


def _streamed(rows: Rows, first: int, generation: Generation, streaming: Streaming, blank: RunResult) -> RunResult:
    """The result of one group, whose rows are counted from `first`."""
    tokenizer, stop, on_text = streaming.tokenizer, streaming.stop, streaming.on_text
    streams = [TextStream(tokenizer.decode) for _ in rows] if tokenizer else []
    cuts = [CutText(stop) for _ in rows]
    times: list[float] = []

    def on_token(row: int, token: int) -> bool:
        times.append(time.perf_counter())
        if not streams or (on_text is None and not stop):
            return False
        text = cuts[row].push(streams[row].push(token))
        if text and on_text is not None:
            on_text(first + row, text)
        return cuts[row].ended

    began = time.perf_counter()
    continuations = generation(on_token=on_token)
    ended = time.perf_counter()
    for row, stream in enumerate(streams):
        if (text := cuts[row].close(stream.close())) and on_text is not None:
            on_text(first + row, text)
    texts = tuple(
        RunText(
            tuple(row),
            found.tokens,
            (cut.text if cut.ended else tokenizer.decode(found.tokens)) if tokenizer else None,
            found.reason,
        )
        for row, found, cut in zip(rows, continuations, cuts, strict=True)
    )
    return replace(
        blank,
        texts=texts,
        first_seconds=(times[0] if times else ended) - began,
        seconds=ended - began,
        new_tokens=sum(len(found.tokens) for found in continuations),
    )
