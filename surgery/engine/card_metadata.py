# SPDX-License-Identifier: Apache-2.0
"""The head of a model card: what the card of the base says and still holds, and which base it was."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from surgery.engine.card_yaml import Metadata, fenced, read_metadata
from surgery_formats.binding.bind import Binding
from surgery_formats.canonical.quantised_base import quantised_base_of
from surgery_formats.errors import SurgeryError
from surgery_formats.files.raw import open_file, stays_inside
from surgery_formats.models.base_name import hub_name

__all__ = ["card_metadata", "merge_metadata"]

_LIMIT = 1 << 20  # bytes of a card that are looked at
_NOT_KEPT = re.compile(
    r"base_model.*|model[-_]index|model_name|library_name|tags|extra_gated_.*|co2_eq_emissions|widget|datasets|metrics"
)
"""What a card says of the base alone: how it was made, what it scored, who may download it."""
_WORDS = ("language", "license", "license_name", "license_link", "pipeline_tag", "tags")
"""Keys whose values are texts or lists of them."""
_HEADS = ("text-classification", "token-classification", "question-answering")


def merge_metadata(binding: Binding) -> str:
    """The head of a merged model's card."""
    base = binding.checkpoint
    task = next((adapter.task for adapter, _ in binding.adapters if adapter.task), "")
    told = [adapter.base_name for adapter, _ in binding.adapters if quantised_base_of(adapter) is None]
    library = "diffusers" if base.is_pipeline else "transformers"
    return card_metadata(base.path, hub_name(base, told), relation="merge", library=library, task=task, tags=("merge",))


def card_metadata(
    folder: Path | None, name: str, *, relation: str, library: str, task: str = "", tags: Sequence[str] = ()
) -> str:
    """The head of a card, fences included.

    Args:
        folder: Of what it was made of: what its own card says and still holds is kept, such as the licence, which is
            never guessed, and languages.
        name: Of the base on the hub, or empty.
        relation: What was made of it (``merge``, ``adapter``, ``quantized``, ``finetune``), as the hub calls it.
        library: What loads it.
        task: What it does, as the hub names it. A head of its own decides; else the base's card goes before.
        tags: In front of those of the base.
    """
    kept = {} if folder is None else _kept(folder)
    of_base = kept.pop("tags", [])
    if task and (task in _HEADS or "pipeline_tag" not in kept):
        kept["pipeline_tag"] = task
    given = {"base_model": name, "base_model_relation": relation} if name else {}
    told = [tag for tag in ([of_base] if isinstance(of_base, str) else of_base) if isinstance(tag, str)]
    return fenced({**given, "library_name": library, **kept, "tags": list(dict.fromkeys([*tags, *told]))})


def _kept(folder: Path) -> Metadata:
    """A card's metadata; keys of that model alone are left out, but for its tags."""
    card = folder / "README.md"
    if not card.is_file() or not stays_inside(card):
        return {}
    try:
        file = open_file(card)
        text = bytes(file.read(0, min(file.size, _LIMIT))).decode()
    except (SurgeryError, UnicodeDecodeError):
        return {}  # a card is no part of a model
    told = read_metadata(text)
    return {
        key: value
        for key, value in told.items()
        if (key == "tags" or not _NOT_KEPT.fullmatch(key)) and (key not in _WORDS or _are_words(value))
    }


def _are_words(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))
