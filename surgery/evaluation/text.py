# SPDX-License-Identifier: Apache-2.0
"""The text that models are evaluated on: its bytes, its tokens, and the token that is put in front of every window."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.arrays import read_array
from surgery.onnx.run.tokenizer import NAME, open_tokenizer
from surgery_formats.errors import FitError, NotFoundError
from surgery_formats.files.bounded_json import CONFIG_LIMIT, TOKENIZER_LIMIT, read_object
from surgery_formats.files.raw import open_file
from surgery_formats.files.text_file import read_text_file

__all__ = ["EvaluationText", "check_same_vocabulary", "read_evaluation_text"]

_OTHERWISE = "give token ids with `ids=`"


@dataclass(frozen=True)
class EvaluationText:
    """Tokens to predict.

    Attributes:
        ids: ``(tokens,)`` int64, without special tokens.
        begin: The token in front of every window, which is not predicted.
        nbytes: UTF-8 bytes of the text; None where tokens alone were given.
        limited: Whether the file goes on.
        digest: sha256 of these bytes, empty without them.
    """

    ids: npt.NDArray[np.int64]
    begin: int
    nbytes: int | None
    limited: bool = False
    digest: str = ""


def read_evaluation_text(folder: Path, text: Path | None, ids: Path | None, limit: int | None) -> EvaluationText:
    """Read a text, or its tokens, or both; one of them is there.

    Args:
        folder: The model's, with its tokenizer and configuration.
        text: UTF-8.
        ids: ``.npy`` with the tokens of `text`, or tokens alone: then no tokenizer is needed.
        limit: Most bytes of `text`; what is left of a character at their end is left out too.

    Raises:
        FitError: no tokens, a limit for tokens, or no token that begins a text.
        NotFoundError, MalformedError: a file or the tokenizer is not there, or not what it should be; a text in another
            encoding.
        MissingPackageError: the package tokenizers is not installed.
    """
    if limit is not None and ids is not None:
        raise FitError("a limit of bytes is one of a text, and tokens were given", hint="give fewer tokens")
    data, limited = (None, False) if text is None else read_text_file(text, limit)
    if ids is not None:
        tokens = _tokens(ids)
    else:
        assert text is not None
        assert data is not None
        encoded = open_tokenizer(folder, otherwise=_OTHERWISE).encode(data.decode(), begins=False)
        tokens = np.array(encoded, np.int64)
        if not len(tokens):
            raise FitError("the tokenizer makes no token of the text", file=text, hint="give a text of its language")
    digest = "" if data is None else hashlib.sha256(data).hexdigest()
    return EvaluationText(tokens, _begin(folder), None if data is None else len(data), limited, digest)


def check_same_vocabulary(one: Path, other: Path) -> None:
    """Refuse two models whose tokens are not the same, as far as their folders tell.

    Raises:
        FitError: a token of one is another of the other.
        NotFoundError, MalformedError, MissingPackageError: see `open_tokenizer`.
    """
    paths = [folder / NAME for folder in (one, other)]
    if not all(path.exists() for path in paths):
        return
    a, b = (open_file(path) for path in paths)
    if a.size == b.size <= TOKENIZER_LIMIT and a.read(0, a.size) == b.read(0, b.size):
        return
    if open_tokenizer(one).vocabulary != open_tokenizer(other).vocabulary:
        raise FitError(
            "the two models have different vocabularies, so that a token of one is none of the other",
            file=paths[1],
            hint="evaluate each by itself: bits per byte can be compared",
        )


def _tokens(path: Path) -> npt.NDArray[np.int64]:
    """Raises FitError: no row of whole numbers from 0 on, or none at all."""
    found = read_array(path)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise FitError(f"holds {found.dtype} of the shape {list(found.shape)}, not a row of token ids", file=path)
    if not len(found):
        raise FitError("there are no tokens to evaluate on", file=path, hint="give at least one token id")
    if int(found.min()) < 0 or int(found.max()) > np.iinfo(np.int32).max:
        raise FitError("a token id is below 0 or beyond every vocabulary", file=path)
    return found.astype(np.int64)


def _begin(folder: Path) -> int:
    """The token that begins a text: the tokenizer's, or the configuration's; the one that ends it where none begins it.

    Raises:
        FitError: there is neither.
        MalformedError: a file that cannot be read.
    """
    if (named := _object(folder / "tokenizer_config.json").get("bos_token")) is not None:
        spelt = named.get("content") if isinstance(named, dict) else named
        number = _added(folder).get(spelt) if isinstance(spelt, str) else None
        if number is not None:
            return number
    config = _object(folder / "config.json")
    texts = config.get("text_config")
    configs = [config, *([texts] if isinstance(texts, dict) else []), _object(folder / "generation_config.json")]
    for key in ("bos_token_id", "eos_token_id"):
        for each in configs:
            value = each.get(key)
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, int) and not isinstance(first, bool) and first >= 0:
                return first
    raise FitError(
        "no token begins a text: there is neither bos_token_id nor eos_token_id",
        file=folder / "config.json",
        hint="write the token that texts began with in training as bos_token_id",
    )


def _added(folder: Path) -> Mapping[str, int]:
    """Special tokens by their spelling, as ``tokenizer.json`` has them; read without the package tokenizers."""
    try:
        entries: Any = read_object(folder / NAME, TOKENIZER_LIMIT).get("added_tokens")
    except NotFoundError:
        return {}
    entries = entries if isinstance(entries, list) else []
    named = [(e.get("content"), e.get("id")) for e in entries if isinstance(e, dict)]
    return {text: number for text, number in named if isinstance(text, str) and isinstance(number, int)}


def _object(path: Path) -> dict[str, Any]:
    try:
        return dict(read_object(path, CONFIG_LIMIT))
    except NotFoundError:
        return {}
