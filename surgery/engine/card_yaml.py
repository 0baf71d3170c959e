# SPDX-License-Identifier: Apache-2.0
"""The YAML at the head of a model card, read from a foreign one and written to the byte as huggingface_hub writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["Metadata", "fenced", "read_metadata"]

Metadata = dict[str, Any]
"""Plain values by key."""

_MOST_EVENTS, _DEEPEST = 20_000, 8
_LONGEST = 1000  # characters of a text
_ORDER = (
    "base_model",
    "language",
    "library_name",
    "license",
    "license_name",
    "license_link",
    "pipeline_tag",
    "tags",
)
"""Of huggingface_hub's `ModelCardData`; other keys follow, in the order in which they were given."""


def fenced(metadata: Mapping[str, Any]) -> str:
    """`metadata` as the head of a card, with its fences: as `ModelCardData(**metadata).to_yaml()` has it."""
    import yaml

    ordered = {
        key: metadata[key] for key in (*_ORDER, *(key for key in metadata if key not in _ORDER)) if key in metadata
    }
    return f"---\n{yaml.dump(ordered, allow_unicode=True, sort_keys=False)}---\n"


def read_metadata(card: str) -> Metadata:
    """What the head of a card says, in plain values; nothing where it has none, or one that is no plain YAML.

    Words are read as YAML 1.2 and the hub have them: ``no`` is the code of a language, and not false.
    """
    lines = card.splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    text = "\n".join(lines[1 : lines.index("---", 1)])
    import yaml

    try:
        if not _is_tame(text):
            return {}
        found = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(key, str) and _is_plain(key) and _is_plain(value)}


def _is_tame(text: str) -> bool:
    """Whether it is small, shallow, and without anchors, which would make it larger than it is."""
    import yaml

    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if count > _MOST_EVENTS or depth > _DEEPEST or getattr(event, "anchor", None):
            return False
    return True


def _loader() -> Any:
    """PyYAML's safe loader with the words of YAML 1.2's core schema alone."""
    import re

    import yaml

    class Core(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name, filled below

    for kind, pattern, first in (
        ("bool", r"true|false", "tf"),
        ("int", r"[-+]?[0-9]{1,18}", "-+0123456789"),
        ("float", r"[-+]?[0-9]{1,18}\.[0-9]{1,18}", "-+0123456789"),
        ("null", r"null|~|", ["n", "~", ""]),
    ):
        Core.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"), list(first))
    return Core


def _is_plain(value: object) -> bool:
    """Whether it may be repeated: printable texts, numbers, and lists and objects of them."""
    match value:
        case str():
            return value.isprintable() and 0 < len(value) <= _LONGEST
        case bool() | int():
            return True
        case float():
            return math.isfinite(value)
        case list():
            return all(map(_is_plain, value))
        case dict():
            return all(isinstance(key, str) and _is_plain(key) and _is_plain(inner) for key, inner in value.items())
    return False
