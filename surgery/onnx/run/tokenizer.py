# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back: ``tokenizer.json`` through the package tokenizers, which runs no code of a model's repository.

It is the only part of the runner that needs an optional package; ids in, ids out works without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.files.bounded_json import CONFIG_LIMIT, TOKENIZER_LIMIT, read_object
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

__all__ = ["Stream", "Tokenizer", "open_tokenizer", "stop_tokens"]

NAME = "tokenizer.json"
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_PENDING = 8  # tokens that one character may be spread over; beyond that it is broken for good


class Tokenizer:
    """Encodes and decodes."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the tokens for beginning and end that the model's own template adds."""
        found: list[int] = self._inner.encode(text).ids
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        found: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return found


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`.

    Raises:
        NotFoundError: no ``tokenizer.json``.
        MalformedError: one that cannot be read.
        FitError: the package tokenizers is not installed.
    """
    file = folder / NAME
    if not file.exists():
        raise NotFoundError(f"no {NAME} beside the graph", file=folder, hint="copy the base model's, or give --ids")
    try:
        import tokenizers
    except ImportError as error:
        raise FitError(
            "text needs the package tokenizers", hint="pip install 'model-surgery[run]', or give --ids"
        ) from error
    opened = open_file(file)
    if opened.size > TOKENIZER_LIMIT:
        raise MalformedError(f"{opened.size} bytes (at most {TOKENIZER_LIMIT} are read)", file=file)
    try:
        inner = tokenizers.Tokenizer.from_buffer(bytes(opened.read(0, opened.size)))
    except Exception as error:  # tokenizers raises plain Exception
        raise MalformedError(f"not a tokenizer ({show(error, 300)})", file=file) from error
    inner.no_padding()  # both may be left over from training
    inner.no_truncation()
    return Tokenizer(inner)


def stop_tokens(folder: Path) -> frozenset[int]:
    """``eos_token_id`` of generation_config.json, or else of config.json; empty if neither says."""
    for name in ("generation_config.json", "config.json"):
        try:
            value = read_object(folder / name, CONFIG_LIMIT).get("eos_token_id")
        except NotFoundError:
            continue
        ids = value if isinstance(value, list) else [value]
        if found := frozenset(one for one in ids if isinstance(one, int) and not isinstance(one, bool)):
            return found
    return frozenset()


class Stream:
    """Text of tokens as they come.

    A token may be part of a character, and what a token looks like may depend on the one before it (spaces). So the tokens since the
    last whole character are decoded together, and nothing is let out that ends in a broken one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0  # ids before this one have been let out, and are kept as context
        self._begin = 0  # context begins here

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is not whole."""
        self._ids.append(token)
        whole = self._decode(self._ids[self._begin :])
        if whole.endswith(_BROKEN) and len(self._ids) - self._shown < _PENDING:
            return ""
        return self._release(whole)

    def close(self) -> str:
        """What was held back."""
        return self._release(self._decode(self._ids[self._begin :]))

    def _release(self, whole: str) -> str:
        before = self._decode(self._ids[self._begin : self._shown])
        self._begin, self._shown = self._shown, len(self._ids)
        return whole[len(before) :]
