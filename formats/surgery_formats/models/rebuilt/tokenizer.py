# SPDX-License-Identifier: Apache-2.0
"""The tokenizer beside a model: how many tokens it has, and the same tokenizer with fewer of them.

Fewer tokens are chosen so that every text whose tokens are all kept is cut into the same tokens: of BPE all merges that lead
to a kept token are kept (what is merged first is then what was merged first before), WordPiece's longest match and Unigram's
best path are still there and still the longest and the best. Single characters and bytes are kept, so that other texts can
still be written.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery_formats.errors import FitError, MalformedError, SurgeryError
from surgery_formats.files.bounded_json import INDEX_LIMIT, json_bytes, read_object
from surgery_formats.text import show

__all__ = ["SmallerTokenizer", "smaller_tokenizer", "token_ids", "tokenizer_size", "with_token_ids"]

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_ENDINGS = ("_token_id", "_token_ids", "_token_index")
_LOSSY = ("suppress_tokens", "begin_suppress_tokens")
"""Lists of which a token that is gone is simply left out."""
_OTHER_FORMS = ("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
"""The same tokens once more, for slow tokenizers."""


@dataclass(frozen=True, slots=True)
class SmallerTokenizer:
    """A tokenizer with fewer tokens.

    Attributes:
        kept: Old ids in the order of the new ones.
        files: Side files by name, made anew; None for one that is left out.
    """

    kept: tuple[int, ...]
    files: Mapping[str, bytes | None]


def tokenizer_size(files: Mapping[str, Path]) -> int:
    """One more than the greatest id of a tokenizer.

    Raises:
        FitError: no ``tokenizer.json``.
    """
    vocabulary, added = _tokens(_read(files))
    return max([*vocabulary.values(), *added.values()], default=-1) + 1


def token_ids(config: Mapping[str, Any]) -> set[int]:
    """Ids of tokens that a configuration names."""
    return {number for key, value in config.items() if key.endswith(_ENDINGS) for number in _numbers(value)}


def with_token_ids(config: Mapping[str, Any], places: Mapping[int, int]) -> dict[str, Any]:
    """A configuration with the new ids of its tokens."""

    def moved(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [moved(key, one) for one in value if key not in _LOSSY or one in places]
        return places.get(value, value) if type(value) is int and value >= 0 else value

    known = (*_LOSSY, "forced_bos_token_id", "forced_eos_token_id")
    return {
        key: moved(key, value) if key.endswith(_ENDINGS) or key in known else value for key, value in config.items()
    }


def smaller_tokenizer(files: Mapping[str, Path], used: Collection[int], always: Collection[int]) -> SmallerTokenizer:
    """The tokenizer with the tokens `used`, and those that it needs besides.

    Args:
        files: Side files of the model, by name.
        used: Ids to keep.
        always: Ids that configurations name.

    Raises:
        FitError: no ``tokenizer.json``, one of a kind that is not known, or ids that it lacks.
        MalformedError: a file of it has not the form that tokenizers writes.
    """
    whole = copy.deepcopy(dict(_read(files)))
    try:
        return _smaller(whole, files, used, always)
    except SurgeryError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # any part may be of any type
        raise MalformedError("it is not understood as a tokenizer", file=files[_FILE]) from error


def _smaller(
    whole: dict[str, Any], files: Mapping[str, Path], used: Collection[int], always: Collection[int]
) -> SmallerTokenizer:
    vocabulary, added = _tokens(whole)
    by_id = {number: token for token, number in {**vocabulary, **added}.items()}
    if unknown := sorted(set(used) - by_id.keys()):
        raise FitError(f"the tokenizer has no token {unknown[0]}", file=files[_FILE])
    model = whole["model"]
    merges = _merges(model)
    wanted = {by_id[number] for number in used} | set(added) | _single(vocabulary) | _named(model, whole)
    wanted |= {by_id[number] for number in always if number in by_id}
    parts: dict[str, list[tuple[str, str]]] = {}
    for left, right in merges:
        parts.setdefault(left + right, []).append((left, right))
    waiting = list(wanted)
    while waiting:  # every way in which a kept token is put together
        for pair in parts.get(waiting.pop(), ()):
            for token in pair:
                if token not in wanted:
                    wanted.add(token)
                    waiting.append(token)
    numbers = {**vocabulary, **added}
    kept = tuple(sorted(numbers[token] for token in wanted if token in numbers))
    places = {old: new for new, old in enumerate(kept)}
    if isinstance(model.get("vocab"), list):
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
        if type(unk := model.get("unk_id")) is int:
            model["unk_id"] = places[unk]
    else:
        model["vocab"] = {token: places[old] for token, old in vocabulary.items() if token in wanted}
    if merges:
        holding = [pair for pair in merges if {*pair, "".join(pair)} <= wanted]
        paired = isinstance(model["merges"][0], list)
        model["merges"] = [list(pair) if paired else " ".join(pair) for pair in holding]
    for entry in whole.get("added_tokens") or ():
        entry["id"] = places[entry["id"]]
    _processor_ids(whole.get("post_processor"), places)
    made: dict[str, bytes | None] = {_FILE: json_bytes(whole)}
    if _CONFIG in files:
        config = dict(read_object(files[_CONFIG], INDEX_LIMIT))
        decoder = config.get("added_tokens_decoder")
        if isinstance(decoder, Mapping):
            config["added_tokens_decoder"] = {str(places[int(key)]): value for key, value in decoder.items()}
        made[_CONFIG] = json_bytes(config)
    made |= {name: None for name in files if name in _OTHER_FORMS or name.endswith((".model", ".tiktoken", ".spm"))}
    return SmallerTokenizer(kept, made)


def _read(files: Mapping[str, Path]) -> Mapping[str, Any]:
    if _FILE not in files:
        raise FitError(
            f"has no {_FILE}, which tells the tokens", hint="load and save the tokenizer with transformers 5"
        )
    return read_object(files[_FILE], INDEX_LIMIT)


def _tokens(whole: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Ids by token: of the model, and of the tokens added to it."""
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    listed = whole.get("added_tokens") or []
    try:
        added = {entry["content"]: entry["id"] for entry in listed}
        if isinstance(vocabulary, Mapping):
            found = dict(vocabulary)
        elif isinstance(vocabulary, list):
            found = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        else:
            raise FitError(f"{_FILE} has a model whose tokens are not known")
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedError(f"{_FILE} lists tokens in a way that is not understood") from error
    if not all(type(number) is int and number >= 0 for number in (*found.values(), *added.values())):
        raise MalformedError(f"{_FILE} has ids that are no numbers")
    return found, added


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for entry in model.get("merges") or ():
        pair = entry if isinstance(entry, list) else str(entry).split(" ")
        if len(pair) != 2:
            raise MalformedError(f"{_FILE} has a merge '{show(str(entry), 40)}' that is no pair")
        merges.append((str(pair[0]), str(pair[1])))
    return merges


def _single(vocabulary: Iterable[str]) -> set[str]:
    """Characters and bytes."""
    return {token for token in vocabulary if len(token.removeprefix("##")) == 1 or _is_byte(token)}


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _named(model: Mapping[str, Any], whole: Mapping[str, Any]) -> set[str]:
    """Tokens that the tokenizer's own settings name."""
    names = {str(model["unk_token"])} if model.get("unk_token") else set()
    if type(unk := model.get("unk_id")) is int and isinstance(pieces := model.get("vocab"), list):
        if not 0 <= unk < len(pieces):
            raise MalformedError(f"{_FILE} has no token {unk}, its unk_id")
        names.add(str(pieces[unk][0]))
    names |= set(_special(whole.get("post_processor")))
    return names & set(_tokens(whole)[0])


def _special(value: Any) -> Iterable[str]:
    """Tokens in a post-processor: of a template by name, of BERT's and RoBERTa's in pairs with their ids."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in ("sep", "cls") and isinstance(inner, list) and inner:
                yield str(inner[0])
            elif key == "special_tokens" and isinstance(inner, Mapping):
                yield from map(str, inner)
            else:
                yield from _special(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _special(inner)


def _processor_ids(value: Any, places: Mapping[int, int]) -> None:
    """New ids in a post-processor, in place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("sep", "cls") and isinstance(inner, list) and len(inner) == 2:
                inner[1] = places.get(inner[1], inner[1])
            elif key == "special_tokens" and isinstance(inner, dict):
                for token in inner.values():
                    token["ids"] = [places.get(one, one) for one in token["ids"]]
            else:
                _processor_ids(inner, places)
    elif isinstance(value, list):
        for inner in value:
            _processor_ids(inner, places)


def _numbers(value: Any) -> Iterable[int]:
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif type(value) is int and value >= 0:
        yield value
