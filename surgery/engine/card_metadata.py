# SPDX-License-Identifier: Apache-2.0
"""The head of a model card: what the card of the base says and still holds, and which base it was."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, get_args

from surgery.engine.card_yaml import Metadata, fenced, read_metadata
from surgery_formats.errors import SurgeryError
from surgery_formats.files.raw import open_file, stays_inside
from surgery_formats.models.base_name import is_hub_name

__all__ = ["Relation", "base_of_card", "card_metadata", "relation_of_card"]

Relation = Literal["merge", "adapter", "quantized", "finetune", ""]
"""What the hub can say that a model is of its base (ADR 71); empty where none of the four is true."""

_LIMIT = 1 << 20  # bytes of a card that are looked at
_NOT_KEPT = re.compile(
    r"base_model.*|model[-_]index|model_name|library_name|tags|extra_gated_.*|co2_eq_emissions|widget|datasets|metrics"
)
"""What a card says of the base alone: how it was made, what it scored, who may download it."""
_WORDS = ("language", "license", "license_name", "license_link", "pipeline_tag", "tags")
"""Keys whose values are texts or lists of them."""
_HEADS = ("text-classification", "token-classification", "question-answering")


def card_metadata(
    folder: Path | None,
    name: str,
    *,
    relation: Relation,
    library: str,
    behind: str = "",
    task: str = "",
    tags: Sequence[str] = (),
    gone: Collection[str] = (),
) -> str:
    """The head of a card, fences included.

    Args:
        folder: Of what it was made of: what its own card says and still holds is kept, such as the licence, which is
            never guessed, and languages.
        name: Of the base on the hub, or empty.
        relation: What was made of it.
        library: What loads it.
        behind: The base of the base, told where the base has no name: without `relation`, which is none to that one.
        task: What it does, as the hub names it. A head of its own decides; else the base's card goes before.
        tags: In front of those of the base.
        gone: Tags of the base that are no longer true.
    """
    kept = {} if folder is None else _kept(_told_in(folder))
    of_base = kept.pop("tags", [])
    if task and (task in _HEADS or "pipeline_tag" not in kept):
        kept["pipeline_tag"] = task
    given = {"base_model": name or behind} if name or behind else {}
    given |= {"base_model_relation": relation} if name and relation else {}
    told = [tag for tag in ([of_base] if isinstance(of_base, str) else of_base) if isinstance(tag, str)]
    told = [tag for tag in told if tag not in gone]
    return fenced({**given, "library_name": library, **kept, "tags": list(dict.fromkeys([*tags, *told]))})


def base_of_card(folder: Path) -> str:
    """The base that the card in a folder names, where it names one on the hub; else nothing."""
    named = _told_in(folder).get("base_model")
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    return named if isinstance(named, str) and is_hub_name(named) else ""


def relation_of_card(folder: Path) -> Relation:
    """What the card in a folder says that the model is of its base; empty where it says none of the hub's words."""
    told = _told_in(folder).get("base_model_relation")
    return next((word for word in get_args(Relation) if word == told), "")


def _told_in(folder: Path) -> Metadata:
    """The metadata of the card in a folder."""
    card = folder / "README.md"
    if not card.is_file() or not stays_inside(card):
        return {}
    try:
        file = open_file(card)
        text = bytes(file.read(0, min(file.size, _LIMIT))).decode()
    except (SurgeryError, UnicodeDecodeError):
        return {}  # a card is no part of a model
    return read_metadata(text)


def _kept(told: Metadata) -> Metadata:
    """Without keys of that model alone, but for its tags."""
    return {
        key: value
        for key, value in told.items()
        if (key == "tags" or not _NOT_KEPT.fullmatch(key)) and (key not in _WORDS or _are_words(value))
    }


def _are_words(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))
