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

__all__ = ["TextStream", "Tokenizer", "open_tokenizer", "stop_tokens"]

NAME = "tokenizer.json"
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_PARTS = 3  # broken characters that the next token may still make one of: a character has at most four bytes
_PENDING = (
    64  # tokens that are held back at most: bounds the work per token where a model writes nothing but broken bytes
)


class Tokenizer:
    """Encodes and decodes."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """Ids of `text`, with the tokens for beginning and end that the model's own template adds; without, if it begins nothing."""
        found: list[int] = self._inner.encode(text, add_special_tokens=begins).ids
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
        raise FitError("text needs the package tokenizers", hint="pip install tokenizers, or give --ids") from error
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


class TextStream:
    """Text of tokens as they come.

    A token may be part of a character, and what a token looks like may depend on the one before it (spaces). So new tokens are decoded
    together with those before the last whole character, and what may still become a character is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the last whole piece, as context, and what came after it
        self._context = 0  # how many of them are context
        self._out = ""  # what has been let out of their text

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is not whole."""
        self._ids.append(token)
        whole = self._decode(self._ids)
        held = min(len(whole) - len(whole.rstrip(_BROKEN)), _PARTS)
        settled = whole.startswith(
            self._out
        )  # decoders with byte tokens show a whole run of them as broken until it is right
        if not (settled and not held) and len(self._ids) - self._context < _PENDING:
            piece = whole[len(self._out) : len(whole) - held] if settled else ""
            self._out += piece
            return piece
        piece = whole[len(self._out) :]
        self._ids = self._ids[self._context :]
        self._context, self._out = len(self._ids), self._decode(self._ids)
        return piece

    def close(self) -> str:
        """What was held back."""
        return self._decode(self._ids)[len(self._out) :]
