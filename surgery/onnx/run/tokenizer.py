# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back: ``tokenizer.json`` through the package tokenizers, which runs no code of a model.

Only this part of the runner needs an optional package; ids in, ids out works without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.extras import require
from surgery_formats.files.bounded_json import CONFIG_LIMIT, TOKENIZER_LIMIT, read_object
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

__all__ = ["TextStream", "Tokenizer", "open_tokenizer", "stop_tokens"]

NAME = "tokenizer.json"
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_PARTS = 3  # trailing broken characters that the next token may complete: a character has at most four bytes
_PENDING = 64  # tokens held back at most: bounds the work per token if a model writes only broken bytes


class Tokenizer:
    """Encodes text and decodes ids."""

    def __init__(self, inner: Any, mask: int | None = None, file: Path = Path(NAME)) -> None:
        """`mask` is the id of the token that stands for a word to be filled in; `file` is named in messages."""
        self._inner = inner
        self._file = file
        self.mask = mask

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Ids of all tokens, special ones included."""
        result: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        return result

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """Ids of `text`; if it `begins` a sequence, with the begin and end tokens of the model's template.

        Raises:
            FitError: not a text that UTF-8 can hold, or one that the vocabulary cannot express.
            MalformedError: the tokenizer contradicts itself.
        """
        _check_text(text)
        with _asked(self._file, "cannot encode the text"):
            result: list[int] = self._inner.encode(text, add_special_tokens=begins).ids
        return result

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int], tuple[tuple[int, int] | None, ...]]:
        """Ids of two texts in one sequence, their types, and of the second one's tokens where they stand in it.

        Raises:
            FitError: not texts that UTF-8 can hold, or that the vocabulary cannot express.
            MalformedError: the tokenizer contradicts itself.
        """
        _check_text(first)
        _check_text(second)
        with _asked(self._file, "cannot encode the texts"):
            found = self._inner.encode(first, second)
        places = (place if text == 1 else None for place, text in zip(found.offsets, found.sequence_ids, strict=True))
        return found.ids, found.type_ids, tuple(places)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens."""
        result: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return result


@contextmanager
def _asked(file: Path, what: str) -> Iterator[None]:
    """What the package tokenizers raises, as errors of ours: plain Exception, and a panic of Rust, which is none."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception):
            raise FitError(f"{what} ({show(error, 300)})", file=file, hint="give token ids") from error
        if type(error).__name__ == "PanicException":  # which no module exports
            raise MalformedError(f"{what} ({show(error, 300)})", file=file, hint="give token ids") from error
        raise


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FitError("a text has half of a surrogate pair, which is no character") from error


def open_tokenizer(folder: Path, *, otherwise: str = "give token ids") -> Tokenizer:
    """Open the tokenizer in `folder`.

    Args:
        folder: Of a model or a graph.
        otherwise: What to do without a tokenizer, for messages.

    Raises:
        NotFoundError: no ``tokenizer.json``.
        MalformedError: it cannot be read.
        MissingPackageError: the package tokenizers is not installed.
    """
    file = folder / NAME
    if not file.exists():
        is_graph = any(folder.glob("*.onnx"))
        raise NotFoundError(
            f"no {NAME} beside the {'graph' if is_graph else 'model'}",
            file=folder,
            hint=f"copy the {'base model' if is_graph else 'model'}'s, or {otherwise}",
        )
    tokenizers = require("tokenizers", "texts", otherwise=otherwise)
    source = open_file(file)
    if source.size > TOKENIZER_LIMIT:
        raise MalformedError(f"has {source.size} bytes (at most {TOKENIZER_LIMIT} are read)", file=file)
    try:
        inner = tokenizers.Tokenizer.from_buffer(bytes(source.read(0, source.size)))
    except Exception as error:  # tokenizers raises plain Exception
        raise MalformedError(f"not a tokenizer ({show(error, 300)})", file=file) from error
    inner.no_padding()  # both may remain from training
    inner.no_truncation()
    return Tokenizer(inner, _mask(folder, inner), file)


def _mask(folder: Path, inner: Any) -> int | None:
    """The id of ``mask_token`` of the tokenizer's configuration."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            value = read_object(folder / name, CONFIG_LIMIT).get("mask_token")
        except NotFoundError:
            continue
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            number: int | None = inner.token_to_id(value)
            return number
    return None


def stop_tokens(folder: Path) -> frozenset[int]:
    """``eos_token_id`` of generation_config.json, or else of config.json; empty if missing."""
    for name in ("generation_config.json", "config.json"):
        try:
            value = read_object(folder / name, CONFIG_LIMIT).get("eos_token_id")
        except NotFoundError:
            continue
        ids = value if isinstance(value, list) else [value]
        if tokens := frozenset(token for token in ids if isinstance(token, int) and not isinstance(token, bool)):
            return tokens
    return frozenset()


class TextStream:
    """The text of a stream of tokens.

    A token may be part of a character, and its text may depend on the previous token (spaces). So new tokens are
    decoded together with those since the last complete character, and text that may still change is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the last complete piece, as context, and the tokens after it
        self._context = 0  # number of context tokens
        self._out = ""  # the text returned so far

    def push(self, token: int) -> str:
        """Return the text that `token` completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        incomplete = min(len(text) - len(text.rstrip(_BROKEN)), _PARTS)
        # byte-token decoders show a whole run of tokens as broken until it is valid
        is_stable = text.startswith(self._out)
        if not (is_stable and not incomplete) and len(self._ids) - self._context < _PENDING:
            piece = text[len(self._out) : len(text) - incomplete] if is_stable else ""
            self._out += piece
            return piece
        piece = text[len(self._out) :]
        self._ids = self._ids[self._context :]
        self._context, self._out = len(self._ids), self._decode(self._ids)
        return piece

    def close(self) -> str:
        """Return the text held back."""
        return self._decode(self._ids)[len(self._out) :]
