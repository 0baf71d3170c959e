# SPDX-License-Identifier: Apache-2.0
"""The metadata of a model card: what the base's card says and still holds, and which base it was."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from surgery_formats.binding.bind import Binding
from surgery_formats.canonical.quantised_base import quantised_base_of
from surgery_formats.errors import SurgeryError
from surgery_formats.files.raw import open_file, stays_inside
from surgery_formats.models.base_name import hub_name
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["card_metadata", "merge_metadata"]

_LIMIT = 1 << 20  # bytes of a card that are looked at
_KEY = re.compile(r"([A-Za-z_][\w-]*):(?:\s.*)?")
_NOT_KEPT = re.compile(
    r"base_model.*|model[-_]index|model_name|library_name|tags|extra_gated_.*|co2_eq_emissions|widget|datasets|metrics"
)
"""What a card says of the base alone: how it was made, what it scored, who may download it."""
_TASKS = ("text-classification", "token-classification", "question-answering")


def merge_metadata(binding: Binding) -> list[str]:
    """The metadata of a merged model's card."""
    base = binding.checkpoint
    task = next((adapter.task for adapter, _ in binding.adapters if adapter.task in _TASKS), "")
    told = [adapter.base_name for adapter, _ in binding.adapters if quantised_base_of(adapter) is None]
    library = "diffusers" if base.is_pipeline else "transformers"
    return card_metadata(base, hub_name(base, told), relation="merge", library=library, task=task, tags=("merge",))


def card_metadata(
    base: Checkpoint, name: str, *, relation: str, library: str, task: str = "", tags: Sequence[str] = ()
) -> list[str]:
    """The lines of a card's metadata, without the fences.

    Args:
        base: The base, of whose own card what still holds is kept.
        name: Its name on the hub, or empty.
        relation: What was made of it (``merge``, ``adapter``), as the hub calls it.
        library: What loads it.
        task: What it does, as the hub names it, where another than the base.
        tags: In front of those of the base.
    """
    kept = _kept(base.path)
    if task:
        kept["pipeline_tag"] = [f"pipeline_tag: {task}"]
    of_base = [line.strip()[2:] for line in kept.pop("tags", [])[1:] if re.fullmatch(r"\s*- [\w.:/-]+", line)]
    return [
        *([f"base_model: {name}", f"base_model_relation: {relation}"] if name else []),
        f"library_name: {library}",
        *(line for lines in kept.values() for line in lines),
        "tags:",
        *(f"- {tag}" for tag in dict.fromkeys([*tags, *of_base])),
    ]


def _kept(folder: Path) -> dict[str, list[str]]:
    """The base's metadata by key, each with its lines; keys of the base alone are left out, but for its tags."""
    card = folder / "README.md"
    if not card.is_file() or not stays_inside(card):
        return {}
    try:
        file = open_file(card)
        lines = bytes(file.read(0, min(file.size, _LIMIT))).decode().splitlines()
    except (SurgeryError, UnicodeDecodeError):
        return {}
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    return _by_key(lines[1 : lines.index("---", 1)])


def _by_key(lines: Iterable[str]) -> dict[str, list[str]]:
    kept: dict[str, list[str]] = {}
    key = ""
    for line in lines:
        if match := _KEY.fullmatch(line):
            key = match[1]
        elif not line.startswith((" ", "-")):
            key = ""  # a comment, or what is no metadata
        if key and line.isprintable() and (key == "tags" or not _NOT_KEPT.fullmatch(key)):
            kept.setdefault(key, []).append(line)
    return kept
