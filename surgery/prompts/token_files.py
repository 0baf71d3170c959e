# SPDX-License-Identifier: Apache-2.0
"""The files of a tokenizer with virtual tokens: words of their own, put before every text and every conversation.

A text that is encoded as the start of a sequence gets them by the post-processor, before its own first token, as PEFT puts them
there. A chat template writes them as words.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.prompts.vocabulary import spelt_tokens
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.bounded_json import TOKENIZER_LIMIT, read_object
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

__all__ = ["TokenFiles", "first_id", "token_files"]

FILE, CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
_TEMPLATE = 1 << 20  # bytes of a chat template
_TEMPLATE_TYPE = "TemplateProcessing"
_CLASS = "PreTrainedTokenizerFast"
"""Takes tokenizer.json as it is; classes of model families make some of it anew, the post-processor above all."""


@dataclass(frozen=True)
class TokenFiles:
    """What the tokenizer's files become.

    Attributes:
        words: How each virtual token is written.
        files: By name, made anew.
        template: Whether there is a chat template.
    """

    words: tuple[str, ...]
    files: Mapping[str, bytes]
    template: bool

    @property
    def text(self) -> str:
        """All of them, as they are written before a text."""
        return "".join(self.words)


def first_id(side_files: Mapping[str, Path]) -> int | None:
    """The id that the package tokenizers gives the next token that is added; None without a ``tokenizer.json``."""
    if FILE not in side_files:
        return None
    vocabulary, added = _ids(read_object(side_files[FILE], TOKENIZER_LIMIT))
    last = max(added.values(), default=-1)
    return max(last + 1, vocabulary)


def token_files(
    side_files: Mapping[str, Path], config: Mapping[str, Any], count: int, first: int, name: str
) -> TokenFiles:
    """The files with `count` tokens ``<name_0>`` ... from id `first` on.

    Args:
        side_files: The model's.
        config: Its config.json.
        count: How many.
        first: Id of the first.
        name: What they are called.

    Raises:
        FitError: a token is called so already, or has one of the ids.
        MalformedError: a tokenizer's file that is not understood.
    """
    words = tuple(f"<{name}_{number}>" for number in range(count))
    ids = list(range(first, first + count))
    files: dict[str, bytes] = {GENERATION: _generation(side_files, config, ids)}
    if FILE not in side_files:
        return TokenFiles(words, files, False)
    whole = copy.deepcopy(dict(read_object(side_files[FILE], TOKENIZER_LIMIT)))
    spelt = spelt_tokens(whole)
    if taken := set(words).intersection(spelt.values()):
        raise FitError(
            f"the tokenizer has a token '{min(taken)}'", file=side_files[FILE], hint="choose another `name=`"
        )
    if held := sorted(spelt.keys() & set(ids)):
        raise FitError(
            f"the ids of its tokens have gaps: the next ones would be {ids[0]} to {ids[-1]}, and {held[0]} is "
            f"'{show(spelt[held[0]], 40)}'",
            file=side_files[FILE],
            hint='keys and values need no ids: `form="kv"`',
        )
    whole["added_tokens"] = [*(whole.get("added_tokens") or []), *map(_added, words, ids)]
    whole["post_processor"] = _processor(whole.get("post_processor"), name, words, ids)
    files[FILE] = _dumped(whole)
    text = "".join(words)
    settings = dict(read_object(side_files[CONFIG], TOKENIZER_LIMIT)) if CONFIG in side_files else {}
    settings["tokenizer_class"] = _CLASS
    settings.pop("auto_map", None)
    if isinstance(decoder := settings.get("added_tokens_decoder"), Mapping):
        more = {
            str(number): {k: v for k, v in _added(word, number).items() if k != "id"}
            for word, number in zip(words, ids, strict=True)
        }
        settings["added_tokens_decoder"] = {**decoder, **more}
    templates = [settings["chat_template"]] if "chat_template" in settings else []
    if templates:
        settings["chat_template"] = _templated(settings["chat_template"], text)
    files[CONFIG] = _dumped(settings)
    for file, path in side_files.items():
        if file.endswith(".jinja"):
            source = open_file(path)
            if source.size > _TEMPLATE:
                raise MalformedError(f"a chat template of {source.size} bytes", file=path)
            files[file] = text.encode() + bytes(source.read(0, source.size))
            templates.append(file)
    return TokenFiles(words, files, bool(templates))


def _ids(whole: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """How many tokens the model of a tokenizer has, and the ids of those added to it."""
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocabulary, Mapping | list):
        raise MalformedError(f"{FILE} has a model whose tokens are not known")
    try:
        added = {str(entry["content"]): int(entry["id"]) for entry in whole.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedError(f"{FILE} lists added tokens in a way that is not understood") from error
    return len(vocabulary), added


def _added(word: str, number: int) -> dict[str, Any]:
    kept = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": word, **kept, "special": True}


def _processor(before: Any, name: str, words: Sequence[str], ids: Sequence[int]) -> dict[str, Any]:
    """What puts the tokens in front of all that the post-processor adds already.

    A template that is there gets them: of two, one behind the other, tokenizers can make no pair of texts.
    """
    label = f"<{name}>"
    special = {"SpecialToken": {"id": label, "type_id": 0}}
    entry = {label: {"id": label, "ids": list(ids), "tokens": list(words)}}
    inner = before.get("processors") if isinstance(before, dict) and before.get("type") == "Sequence" else [before]
    steps: list[Any] = [step for step in inner if step is not None] if isinstance(inner, list) else [inner]
    if not all(isinstance(step, dict) for step in steps):
        raise MalformedError(f"{FILE} has a post-processor that is not understood")
    place = next((n for n, step in enumerate(steps) if step.get("type") == _TEMPLATE_TYPE), None)
    if place is None:
        first, second = ({"Sequence": {"id": each, "type_id": 0}} for each in "AB")
        steps.append(
            {
                "type": _TEMPLATE_TYPE,
                "single": [special, first],
                "pair": [special, first, second],
                "special_tokens": entry,
            }
        )
    else:
        there = steps[place]
        parts = [there.get(part) for part in ("single", "pair")]
        if not all(isinstance(part, list) for part in parts):
            raise MalformedError(f"{FILE} has a template that is not understood")
        single, pair = ([special, *part] for part in parts)
        known = {**(there.get("special_tokens") or {}), **entry}
        steps[place] = {**there, "single": single, "pair": pair, "special_tokens": known}
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}


def _templated(template: Any, text: str) -> Any:
    """A chat template, or several by name, that begins with `text`."""
    if isinstance(template, str):
        return text + template
    if isinstance(template, list):
        return [
            {**entry, "template": text + entry["template"]}
            if isinstance(entry, Mapping) and isinstance(entry.get("template"), str)
            else entry
            for entry in template
        ]
    return template


def _generation(side_files: Mapping[str, Path], config: Mapping[str, Any], ids: Sequence[int]) -> bytes:
    """generation_config.json with the tokens among those that are never chosen."""
    if GENERATION in side_files:
        settings = dict(read_object(side_files[GENERATION], TOKENIZER_LIMIT))
    else:  # what transformers takes from config.json where there is none
        settings = {
            key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None
        }
    suppressed = settings.get("suppress_tokens")
    settings["suppress_tokens"] = [*(suppressed if isinstance(suppressed, list) else []), *ids]
    return _dumped(settings)


def _dumped(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=True).encode() + b"\n"
