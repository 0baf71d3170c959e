# SPDX-License-Identifier: Apache-2.0
"""Generation: prefill once, then a token for each row at a time, until every row has ended."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from surgery.onnx.run.decoder import Decoder
from surgery.onnx.run.rows import Rows
from surgery.onnx.run.sampling import Sampling, choose

__all__ = ["Generated", "Reason", "generate"]

Reason = Literal["stop", "length", "full"]
"""``stop``: a stop token came; ``length``: as many tokens as asked for; ``full``: the graph takes no longer sequence."""


@dataclass(frozen=True, slots=True)
class Generated:
    """New tokens of one row.

    Attributes:
        tokens: Without the stop token.
        reason: Why it ended.
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
    on_token: Callable[[int, int], None] | None = None,
) -> tuple[Generated, ...]:
    """Continue `rows`.

    Args:
        decoder: With as many rows.
        rows: Token ids.
        max_new: Most new tokens per row.
        sampling: How they are chosen; one generator draws for all rows, in order.
        stop: Ids that end a row.
        on_token: Called with row and token as they come.

    Raises:
        FitError: no token in a row, more than the cache holds, logits that are not finite.
    """
    generator = np.random.default_rng(sampling.seed)
    found: list[list[int]] = [[] for _ in rows]
    reasons: list[Reason | None] = [None] * len(rows)
    if max_new < 1:
        return tuple(Generated((), "length") for _ in rows)
    whole = [list(row) for row in rows]
    logits = decoder.prefill(whole)
    while True:
        tokens = choose(logits, sampling, generator)
        for row, token in enumerate(tokens.tolist()):
            if reasons[row] is not None:
                continue
            if token in stop:
                reasons[row] = "stop"
                continue
            found[row].append(token)
            if on_token is not None:
                on_token(row, token)
            if len(found[row]) == max_new:
                reasons[row] = "length"
        if all(reasons):
            break
        if decoder.room < 1:
            reasons = [reason or "full" for reason in reasons]
            break
        whole = [[*row, token] for row, token in zip(whole, tokens.tolist(), strict=True)]
        if decoder.switch and int(decoder.lengths.max()) == decoder.switch:
            logits = decoder.prefill(whole)
        else:
            logits = decoder.step(tokens)  # rows that have ended go on unseen: a step has a fixed number of rows
    return tuple(Generated(tuple(ids), reason or "full") for ids, reason in zip(found, reasons, strict=True))
