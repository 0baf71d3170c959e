# SPDX-License-Identifier: Apache-2.0
"""Texts to measure on, as rows of token ids: cut into pieces of one length, each begun as the tokenizer begins a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path

from surgery.arguments import wrong_type
from surgery.onnx.run.tokenizer import Tokenizer, open_tokenizer
from surgery_formats.errors import FitError, UsageError

__all__ = ["Texts", "spread", "token_rows"]

_GREATEST = (1 << 31) - 1  # of ids that graphs and torch take

Texts = str | Sequence[int] | Iterable[str | Sequence[int]]


def token_rows(texts: Texts | None, folder: Path, length: int) -> list[list[int]]:
    """Rows of at most `length` tokens.

    Args:
        texts: A text, token ids, or several of these.
        folder: Where the tokenizer lies; needed for texts alone.
        length: Longer ones are cut.

    Raises:
        UsageError: neither texts nor ids, or none.
        FitError: no tokenizer, no token id, or rows too short to predict anything.
    """
    if texts is None:
        raise UsageError("what virtual tokens do is measured on texts", hint="give some, or token ids")
    tokenizer: Tokenizer | None = None
    rows: list[list[int]] = []
    for text in _several(texts):
        if isinstance(text, str):
            tokenizer = tokenizer or open_tokenizer(folder)
            first, ids = tokenizer.encode(""), tokenizer.encode(text, begins=False)
        else:
            first, ids = [], list(text)
        if any(not 0 <= token <= _GREATEST for token in ids):
            raise FitError("a token id is beyond every vocabulary")
        step = length - len(first)
        if step < 1:
            raise FitError(
                f"the tokenizer begins a text with {len(first)} tokens, so that pieces of {length} have none of the text",
                hint=f"`length={2 * len(first) + 2}` or more",
            )
        rows += [[*first, *ids[at : at + step]] for at in range(0, len(ids), step)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise FitError("the texts have not two tokens in a row, so that nothing follows")
    return rows


def spread(rows: list[list[int]], most: int) -> list[list[int]]:
    """Of rows of tokens as many as have at most `most` tokens, spread evenly over all; one at least."""
    tokens = sum(map(len, rows))
    count = max(1, len(rows) * most // max(tokens, most))
    while True:
        chosen = [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]
        if count == 1 or sum(map(len, chosen)) <= most:
            return chosen
        count -= 1


def _several(texts: Texts) -> list[str | Sequence[int]]:
    if isinstance(texts, str):
        return [texts]
    listed = list(texts) if isinstance(texts, Iterable) else []
    numbers = [int(item) for item in listed if isinstance(item, Integral)]
    if listed and len(numbers) == len(listed):
        return [numbers]
    rows: list[str | Sequence[int]] = []
    for item in listed:
        if isinstance(item, str):
            rows.append(item)
        elif isinstance(item, Sequence) and all(isinstance(token, Integral) for token in item):
            rows.append([int(token) for token in item])
        else:
            raise wrong_type(item, "texts", "a text or token ids, or several")
    return rows
