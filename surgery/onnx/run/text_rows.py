# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens to measure a model on: of a user's text, or from all over the vocabulary."""

from __future__ import annotations

from pathlib import Path

from surgery_formats.errors import FitError
from surgery_formats.files.text_file import read_text_file

__all__ = ["rows_of_text"]

_ROWS, _WIDTH = 8, 128  # tokens that are measured
_READ = 1 << 20  # bytes of a text


def rows_of_text(folder: Path, text: str | Path, vocabulary: int, most: int) -> list[list[int]]:
    """At most 8 rows of at most 128 tokens.

    Args:
        folder: Where the tokenizer is.
        text: File of a text, or ``words``: tokens from all over the vocabulary.
        vocabulary: Number of tokens.
        most: Positions of the model; 0 for no bound.

    Raises:
        NotFoundError, MalformedError: no text, another encoding, no tokenizer, or it cannot be read.
        FitError: an empty text.
    """
    width = min(_WIDTH, most or _WIDTH)
    if text == "words":
        chosen = min(vocabulary, _ROWS * width)
        ids = [number * vocabulary // chosen for number in range(chosen)]
        ids = [number for start in range(_ROWS) for number in ids[start::_ROWS]]  # each row from all over
    else:
        from surgery.onnx.run.tokenizer import open_tokenizer

        data, _ = read_text_file(text, _READ)
        ids = open_tokenizer(folder).encode(data.decode())
    if not ids:
        raise FitError("the text to measure on has no tokens")
    return [ids[start : start + width] for start in range(0, min(len(ids), _ROWS * width), width)]
