# SPDX-License-Identifier: Apache-2.0
"""What a graph without a cache says of its inputs, by its task: answers, words for masks, choices, labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgery.onnx.run.encoder import EncoderOutput, softmax
from surgery.onnx.run.inputs import InputRow
from surgery.onnx.run.tokenizer import Tokenizer

__all__ = ["task_scores"]

Scores = tuple[dict[str, float], ...]
_LONGEST = 15  # tokens of an answer, as in transformers' pipeline
_WORDS = 5  # for a mask


def task_scores(
    task: str,
    encoded: EncoderOutput,
    number: int,
    row: InputRow,
    names: Sequence[str],
    tokenizer: Tokenizer | None,
) -> Scores:
    """Scores of an input: of its answer, of the words for each mask, of itself among the choices, or by label."""
    if "start_logits" in encoded.arrays:
        return _answer(encoded, number, row)
    if task == "fill-mask":
        return _masks(encoded, number, row, tokenizer)
    if task == "multiple-choice":
        return ({"chosen": float(softmax(encoded.arrays["logits"][0])[number])},)
    return encoded.scores(number, names)


def _answer(encoded: EncoderOutput, number: int, row: InputRow) -> Scores:
    """The likeliest span: of the second text of a pair, else of the tokens, which are then named by their places."""
    length = encoded.lengths[number]
    begin, end = (encoded.arrays[name][number, :length] for name in ("start_logits", "end_logits"))
    inside = np.array([place is not None for place in row.places] or [True] * length)
    if not inside.any():
        return ()
    starts, ends = (softmax(np.where(inside, one.astype(np.float64), -np.inf)) for one in (begin, end))
    table = np.tril(np.triu(np.outer(starts, ends)), _LONGEST - 1)
    first, last = map(int, np.unravel_index(table.argmax(), table.shape))
    if not row.places:
        return ({f"tokens {first} to {last}": float(table[first, last])},)
    places = [place or (0, 0) for place in row.places]  # those chosen are of the second text
    return ({row.second[places[first][0] : places[last][1]]: float(table[first, last])},)


def _masks(encoded: EncoderOutput, number: int, row: InputRow, tokenizer: Tokenizer | None) -> Scores:
    mask = None if tokenizer is None else tokenizer.mask
    places = [place for place, token in enumerate(row.ids) if token == mask]
    found = []
    for place in places:
        words: dict[str, float] = {}
        shares = softmax(encoded.arrays["logits"][number, place])
        best = np.argsort(-shares)[:_WORDS].tolist()
        assert tokenizer is not None
        for token in best:
            word = tokenizer.decode([token]).strip() or str(token)
            words[f"{word} ({token})" if word in words else word] = float(shares[token])  # with a space before it, too
        found.append(words)
    return tuple(found)
