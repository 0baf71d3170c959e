# SPDX-License-Identifier: Apache-2.0
"""What the decoder of an encoder-decoder begins with, and what it never says, by the model's own configuration.

The keys are transformers'. Of `generate`'s other settings (beams, penalties, least lengths) none is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery_formats.errors import FitError, NotFoundError
from surgery_formats.files.bounded_json import read_object

__all__ = ["Starts", "read_starts"]

_ASKED = -1  # in place of a token that the model is asked for: the language of speech


@dataclass(frozen=True)
class Starts:
    """How a decoder begins.

    Attributes:
        tokens: Its first ids.
        never: Ids that are never chosen.
        never_first: Ids that are not chosen right behind the first ones.
        languages: Ids of languages, of which the model is asked for the likeliest behind the first id.
    """

    tokens: tuple[int, ...]
    never: frozenset[int] = frozenset()
    never_first: frozenset[int] = frozenset()
    languages: tuple[int, ...] = ()

    def rows(self, number: int, ask: Callable[[list[list[int]]], npt.NDArray[Any]]) -> list[list[int]]:
        """The first ids of `number` rows; `ask` gives the logits after some."""
        if not self.languages:
            return [list(self.tokens)] * number
        place = self.tokens.index(_ASKED)
        logits = ask([list(self.tokens[:place])] * number)[:, self.languages]
        found = (self.languages[index] for index in np.argmax(logits, -1).tolist())
        return [[*self.tokens[:place], language, *self.tokens[place + 1 :]] for language in found]

    def within(self, vocabulary: int) -> Starts:
        """What of it is in the vocabulary: ids beyond it are never chosen anyway.

        Raises:
            FitError: a first id, or a language, that is not.
        """
        beyond = [token for token in (*self.tokens, *self.languages) if token >= vocabulary]
        if beyond:
            raise FitError(f"the decoder would begin with {max(beyond)}, beyond its vocabulary")
        never, first = (frozenset(one for one in ids if one < vocabulary) for ids in (self.never, self.never_first))
        return replace(self, never=never, never_first=first)


def read_starts(folder: Path, tokens: Sequence[int] = ()) -> Starts:
    """Read ``generation_config.json`` and ``config.json`` beside a graph; `tokens` are the first ids instead of theirs.

    Raises:
        FitError: there are no first ids, or one is negative.
    """
    if any(token < 0 for token in tokens):
        raise FitError(f"the decoder would begin with {min(tokens)}, which is no token")
    settings: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        try:
            found = read_object(folder / name)
        except NotFoundError:
            continue
        settings |= {key: value for key, value in found.items() if value is not None}
    first = next(
        (settings[key] for key in ("decoder_start_token_id", "bos_token_id") if _is_id(settings.get(key))), None
    )
    if first is None and not tokens:
        raise FitError("no decoder_start_token_id beside the graph", file=folder, hint="`start=` names the first ids")
    never, never_first = (frozenset(_ids(settings.get(key))) for key in ("suppress_tokens", "begin_suppress_tokens"))
    bad = settings.get("bad_words_ids")
    never |= frozenset(ids[0] for ids in map(_ids, bad if isinstance(bad, list) else ()) if len(ids) == 1)
    if tokens:
        return Starts(tuple(tokens), never, never_first)
    begun: list[int | None] = [first, *_forced(settings)]
    languages: tuple[int, ...] = ()
    if isinstance(settings.get("lang_to_id"), dict) or _is_id(settings.get("no_timestamps_token_id")):
        begun, languages = _spoken(settings, begun)
    elif _is_id(settings.get("forced_bos_token_id")):
        begun = [first, int(settings["forced_bos_token_id"])]
    return Starts(tuple(token for token in begun if token is not None), never, never_first, languages)


def _spoken(settings: Mapping[str, Any], tokens: list[int | None]) -> tuple[list[int | None], tuple[int, ...]]:
    """Whisper's: the language, which the model is asked for unless it is told, the task, and no times."""
    known, tasks = (
        found if isinstance(found := settings.get(key), dict) else {} for key in ("lang_to_id", "task_to_id")
    )
    language, task = settings.get("language"), settings.get("task")
    if language is not None or task is not None:
        tokens = tokens[:1]
    asked: tuple[int, ...] = ()
    if language is not None:
        told = known.get(language, known.get(f"<|{language}|>")) if isinstance(language, str) else None
        if not _is_id(told):
            raise FitError("the language in generation_config.json is none of its lang_to_id", hint="`start=`")
        tokens, task = [*tokens[:1], told], task or "transcribe"
    elif known and (len(tokens) == 1 or tokens[1] is None):
        asked, tokens = tuple(_ids(list(known.values()))), [tokens[0], _ASKED, *tokens[2:]]
    if isinstance(task, str) and _is_id(tasks.get(task)):
        tokens = [*tokens, tasks[task]]
    times = settings.get("no_timestamps_token_id")
    if _is_id(times) and not settings.get("return_timestamps") and tokens[-1] != times:
        tokens = [*tokens, times]
    return tokens, asked


def _forced(settings: Mapping[str, Any]) -> list[int | None]:
    """``forced_decoder_ids``: pairs of place and id, from place 1 on; None for a language that is asked for."""
    pairs = settings.get("forced_decoder_ids")
    tokens: list[int | None] = []
    for pair in pairs if isinstance(pairs, list) else ():
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] != len(tokens) + 1:
            raise FitError(
                "forced_decoder_ids beside the graph are no ids in order", hint="`start=` names the first ids"
            )
        tokens.append(int(pair[1]) if _is_id(pair[1]) else None)
    return tokens


def _ids(value: object) -> list[int]:
    return [item for item in value if _is_id(item)] if isinstance(value, list) else []


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
