# SPDX-License-Identifier: Apache-2.0
"""What ``--vocab`` says, done to a checkpoint: rows to the tokenizer's size, those of a list of tokens, or a multiple."""

from __future__ import annotations

from pathlib import Path

from surgery_formats.errors import FitError, UsageError
from surgery_formats.files.bounded_json import json_bytes, read_object
from surgery_formats.files.raw import open_file
from surgery_formats.models.rebuilt.rebuilt import Rebuilt, one_network, with_configs
from surgery_formats.models.rebuilt.tokenizer import smaller_tokenizer, token_ids, tokenizer_size, with_token_ids
from surgery_formats.models.rebuilt.vocabulary import vocabulary_size, with_rows
from surgery_formats.text import show

__all__ = ["with_vocabulary"]

_GENERATION = "generation_config.json"
_LIMIT = 64 << 20  # bytes of a list of tokens


def with_vocabulary(rebuilt: Rebuilt, text: str) -> Rebuilt:
    """`rebuilt` with another vocabulary.

    Args:
        rebuilt: What has been made so far.
        text: ``trim``, ``trim=FILE`` or ``pad=MULTIPLE``.

    Raises:
        UsageError: anything else.
        FitError, NothingChangedError: as `with_rows` and `smaller_tokenizer`.
    """
    way, _, value = text.partition("=")
    component = one_network(rebuilt.checkpoint)
    if way == "pad" and value.isdecimal() and 0 < int(value) <= 1 << 20:
        size = vocabulary_size(component)
        return with_rows(rebuilt, range(size), -size % int(value))
    if way != "trim" or (value == "") != (text == "trim"):
        raise UsageError(f"'{show(text)}' is no change of a vocabulary", hint="trim, trim=FILE or pad=64")
    files = dict(rebuilt.checkpoint.side_files)
    if not value:
        size = tokenizer_size(files)
        if size > vocabulary_size(component):
            raise FitError(f"the tokenizer has {size} tokens, which are more than the model's rows")
        _check_named(rebuilt, size)
        return with_rows(rebuilt, range(size))
    return _listed(rebuilt, files, _numbers(Path(value)))


def _check_named(rebuilt: Rebuilt, size: int) -> None:
    """Refuse configurations that name tokens without a row.

    Raises:
        FitError: one does.
    """
    files = dict(rebuilt.checkpoint.side_files)
    configs = {"config.json": rebuilt.checkpoint.main.config}
    if _GENERATION in files:
        configs[_GENERATION] = read_object(files[_GENERATION])
    for name, config in configs.items():
        inner = config.get("text_config")
        named = token_ids(config) | (token_ids(inner) if isinstance(inner, dict) else set())
        if named and max(named) >= size:
            raise FitError(
                f"{name} names the token {max(named)}, and the tokenizer has {size}",
                file=rebuilt.checkpoint.path,
                hint="correct it: the model could not be loaded",
            )


def _listed(rebuilt: Rebuilt, files: dict[str, Path], used: list[int]) -> Rebuilt:
    """Only the tokens of a list, and those that are needed besides; all get new ids."""
    config = rebuilt.checkpoint.main.config
    generation = dict(read_object(files[_GENERATION])) if _GENERATION in files else {}
    smaller = smaller_tokenizer(files, used, token_ids(config) | token_ids(generation))
    size = vocabulary_size(rebuilt.checkpoint.main)
    if (last := smaller.kept[-1]) >= size:
        raise FitError(f"the tokenizer has a token {last}, and the model {size} rows")
    cut = with_rows(rebuilt, smaller.kept)
    places = {old: new for new, old in enumerate(smaller.kept)}
    side_files = dict(smaller.files)
    if generation:
        made = with_token_ids(generation, places)
        side_files[_GENERATION] = json_bytes(made)
    out = [name for name, data in side_files.items() if data is None]
    told = (f"left out, because they list all tokens: {', '.join(out)}",) if out else ()
    return with_configs(cut, with_token_ids(cut.checkpoint.main.config, places), side_files, told)


def _numbers(path: Path) -> list[int]:
    """Ids in a file: a JSON list, or numbers with white space between."""
    file = open_file(path)
    if file.size > _LIMIT:
        raise FitError(f"is larger than {_LIMIT >> 20} MB", file=path)
    text = bytes(file.read(0, file.size)).decode(errors="replace")
    words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    if not words or not all(word.isdecimal() and len(word) < 10 for word in words):
        raise FitError("is no list of the ids of tokens", file=path, hint="numbers, with commas or white space between")
    return sorted({int(word) for word in words})
