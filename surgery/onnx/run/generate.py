# SPDX-License-Identifier: Apache-2.0
"""Generation: one prefill, then one token per row and step, until every row has ended."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from surgery.onnx.run.decoder import Decoder
from surgery.onnx.run.rows import Rows
from surgery.onnx.run.sampling import Sampling, choose

__all__ = ["Continuation", "Reason", "generate"]

Reason = Literal["stop", "length", "full"]
"""``stop``: a stop token came; ``length``: enough tokens; ``full``: the graph takes no longer sequence."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """The new tokens of one row.

    Attributes:
        tokens: Token ids, without the stop token.
        reason: Why the row ended.
    """

    tokens: tuple[int, ...]
    reason: Reason


def generate(
    decoder: Decoder,
    rows: Rows,
    *,
    max_new: int,
    sampling: Sampling,
    stop: Collection[int] = (),
    on_token: Callable[[int, int], object] | None = None,
) -> tuple[Continuation, ...]:
    """Continue `rows` by at most `max_new` tokens each; ids in `stop` end a row.

    One generator draws for all rows, in order. `on_token` is called with row and token as they are generated; if it
    returns True, the row ends.

    Raises:
        FitError: an empty row, more tokens than the cache holds, or logits that are not finite.
    """
    generator = np.random.default_rng(sampling.seed)
    generated: list[list[int]] = [[] for _ in rows]
    reasons: list[Reason | None] = [None] * len(rows)
    if max_new < 1:
        return tuple(Continuation((), "length") for _ in rows)
    sequences = [list(row) for row in rows]
    logits = decoder.prefill(sequences)
    while True:
        tokens = choose(logits, sampling, generator)
        for row, token in enumerate(tokens.tolist()):
            if reasons[row] is not None:
                continue
            if token in stop:
                reasons[row] = "stop"
                continue
            generated[row].append(token)
            if on_token is not None and on_token(row, token) is True:
                reasons[row] = "stop"
            elif len(generated[row]) == max_new:
                reasons[row] = "length"
        if all(reasons):
            break
        if decoder.room < 1:
            reasons = [reason or "full" for reason in reasons]
            break
        sequences = [[*row, token] for row, token in zip(sequences, tokens.tolist(), strict=True)]
        if decoder.switch and int(decoder.lengths.max()) == decoder.switch:
            logits = decoder.prefill(sequences)
        else:
            logits = decoder.step(tokens)  # finished rows run along, ignored: a step has a fixed number of rows
    return tuple(Continuation(tuple(ids), reason or "full") for ids, reason in zip(generated, reasons, strict=True))
