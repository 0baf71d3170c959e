# SPDX-License-Identifier: Apache-2.0
"""The metadata of a model card: what the base's card says and still holds, and which base it was."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from surgery_formats.binding.bind import Binding
from surgery_formats.canonical.quantised_base import quantised_base_of
from surgery_formats.errors import SurgeryError
from surgery_formats.files.raw import open_file, stays_inside

__all__ = ["card_metadata"]

_LIMIT = 1 << 20  # bytes of a card that are looked at
_KEY = re.compile(r"([A-Za-z_][\w-]*):(?:\s.*)?")
_NOT_KEPT = re.compile(
    r"base_model.*|model[-_]index|model_name|library_name|tags|extra_gated_.*|co2_eq_emissions|widget|datasets|metrics"
)
"""What a card says of the base alone: how it was made, what it scored, who may download it."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_TASKS = ("text-classification", "token-classification", "question-answering")


def card_metadata(binding: Binding) -> list[str]:
    """The lines of a card's metadata, without the fences."""
    base = binding.checkpoint
    kept = _kept(base.path)
    if task := next((adapter.task for adapter, _ in binding.adapters if adapter.task in _TASKS), ""):
        kept["pipeline_tag"] = [f"pipeline_tag: {task}"]
    tags = [line for line in kept.pop("tags", [])[1:] if re.fullmatch(r"\s*- [\w.:/-]+", line)]
    name = _hub_name(binding)
    return [
        *([f"base_model: {name}", "base_model_relation: merge"] if name else []),
        f"library_name: {'diffusers' if base.is_pipeline else 'transformers'}",
        *(line for lines in kept.values() for line in lines),
        "tags:",
        "- merge",
        *(f"- {tag}" for tag in dict.fromkeys(line.strip()[2:] for line in tags) if tag != "merge"),
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


def _hub_name(binding: Binding) -> str:
    """The hub's name of the base that was given, or nothing.

    It is that of the folder in the hub's cache, or what an adapter or the base's configuration calls a model of the
    folder's name.
    """
    base = binding.checkpoint
    for folder in (base.path, *base.path.parents):
        organisation, _, name = folder.name.removeprefix("models--").partition("--")
        if folder.name.startswith("models--") and _HUB_NAME.fullmatch(f"{organisation}/{name}"):
            return f"{organisation}/{name}"
    known = [str(component.config.get("_name_or_path", "")) for component in base.components.values()]
    known += [adapter.base_name for adapter, _ in binding.adapters if quantised_base_of(adapter) is None]
    own = base.path.resolve().name
    return next((name for name in known if _HUB_NAME.fullmatch(name) and name.rpartition("/")[2] == own), "")
