# SPDX-License-Identifier: Apache-2.0
"""What a run is given, and the rows of token ids that it is: a text, a pair of texts, token ids, or a conversation."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.engine.inputs import as_list
from surgery.onnx.run.chat import Message, render_chats
from surgery.onnx.run.tokenizer import Tokenizer
from surgery_formats.errors import FitError, UsageError

__all__ = ["Given", "InputRow", "given_inputs", "input_rows", "needs_text", "said"]

Given = str | tuple[str, str] | Sequence[int] | Sequence[Message]
"""One input."""

_PAIR = 2


@dataclass(frozen=True)
class InputRow:
    """One row.

    Attributes:
        ids: Token ids.
        types: Type of each token: 1 in the second text of a pair.
        places: Of each token of the second text, where it stands in it; None for others.
        second: The second text of a pair.
    """

    ids: list[int]
    types: list[int]
    places: tuple[tuple[int, int] | None, ...] = ()
    second: str = ""


def given_inputs(inputs: Any) -> list[Given]:
    """The batch; one text, row or conversation by itself is a batch of one.

    Raises:
        UsageError: something else.
        FitError: none.
    """
    if not isinstance(inputs, Iterable):
        raise UsageError(f"inputs are texts or rows of token ids, not {type(inputs).__name__}")
    batch: list[Any] = as_list(inputs)
    if not batch:
        raise FitError("no text to run on")
    if _is_row(batch) or _is_conversation(batch):
        return [batch]
    for number, item in enumerate(batch):
        if not (isinstance(item, str) or _is_row(item) or _is_pair(item) or _is_conversation(item)):
            raise UsageError(f"inputs[{number}] is neither a text nor a pair, a row of token ids or a conversation")
    return batch


def needs_text(given: Given) -> bool:
    """Whether an input needs the tokenizer."""
    return isinstance(given, str) or _is_pair(given) or _is_conversation(given)


def said(given: Any) -> str | tuple[int, ...]:
    """An input as it is shown."""
    if isinstance(given, str):
        return given
    if _is_row(given):
        return tuple(map(operator.index, given))
    return str(given[-1].get("content", "")) if _is_conversation(given) else " / ".join(given)


def input_rows(
    batch: Sequence[Any], tokenizer: Tokenizer | None, folder: Path, *, begins: bool, chat: bool, system: str
) -> list[InputRow]:
    """The rows of inputs; a text is what a user says if it is a `chat`.

    Raises:
        MalformedError, FitError: see `render_chats` and `Tokenizer`.
    """
    talks = {
        number: _conversation(given, system)
        for number, given in enumerate(batch)
        if _is_conversation(given) or (chat and isinstance(given, str))
    }
    texts = dict(zip(talks, render_chats(folder, [*talks.values()]) if talks else (), strict=True))
    return [
        _row(texts.get(number, given), tokenizer, begins=begins and number not in texts)
        for number, given in enumerate(batch)
    ]


def _conversation(given: Any, system: str) -> list[Message]:
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else [*given]
    if system and all(message.get("role") != "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _row(given: Any, tokenizer: Tokenizer | None, *, begins: bool) -> InputRow:
    if tokenizer is not None and _is_pair(given):
        return InputRow(*tokenizer.encode_pair(*given), given[1])
    if tokenizer is not None and isinstance(given, str):
        ids = tokenizer.encode(given, begins=begins)
    else:
        ids = [operator.index(token) for token in given]
    return InputRow(ids, [0] * len(ids))


def _is_row(item: Any) -> bool:
    try:
        return all(operator.index(token) is not None for token in item)
    except TypeError:
        return False


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == _PAIR and all(isinstance(text, str) for text in item)


def _is_conversation(item: Any) -> bool:
    return isinstance(item, list | tuple) and bool(item) and all(isinstance(one, Mapping) for one in item)
