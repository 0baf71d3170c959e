# SPDX-License-Identifier: Apache-2.0
"""YAML as plain values with the lines they stand on: bounded, without tags, anchors, aliases or repeated keys.

Only events of the parser are used, so that nothing is constructed that a file could choose. JSON is YAML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

__all__ = ["Collection", "Scalar", "Value", "read_document"]

_LIMIT = 1 << 20  # bytes
_EVENTS, _DEPTH = 50_000, 16
_POWER_OF_TEN = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""Numbers such as 1e-3, which are texts in YAML 1.1."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A scalar.

    Attributes:
        text: As it stands there.
        value: What it means: a text, a number, yes or no, or nothing.
        line: Counted from 1.
    """

    text: str
    value: str | int | float | bool | None
    line: int


@dataclass(frozen=True, slots=True)
class Collection:
    """A list or a mapping with the line that it begins on; mappings have text keys."""

    items: list[Value] | dict[str, Value]
    line: int


Value = Scalar | Collection


def read_document(path: Path) -> Collection:
    """The mapping in a file.

    Raises:
        NotFoundError: no such file.
        MalformedError: too large, no YAML, or more than plain values; the message has the line.
    """
    import yaml

    file = open_file(path)
    if file.size > _LIMIT:
        raise MalformedError(f"{file.size} bytes of YAML (at most {_LIMIT} are read)", file=path)
    raw = bytes(file.read(0, file.size))
    try:
        events = _plain_events(yaml.parse(raw.decode(), Loader=yaml.SafeLoader), path)
        root = _Reader(events, path, yaml.SafeLoader("")).value(0)
        if next(events, None) is not None:
            raise MalformedError("holds several documents", file=path)
    except UnicodeDecodeError as error:
        raise MalformedError("is no text", file=path) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise MalformedError(f"{where}no YAML ({show(getattr(error, 'problem', None) or error)})", file=path) from error
    if not isinstance(root, Collection) or not isinstance(root.items, dict):
        raise MalformedError("is no mapping", file=path)
    return root


def _plain_events(events: Iterator[Any], path: Path) -> Iterator[Any]:
    import yaml

    outside = (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)
    for number, event in enumerate(events):
        line = event.start_mark.line + 1
        if number > _EVENTS:
            raise MalformedError(f"line {line}: more than {_EVENTS} values", file=path)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise MalformedError(f"line {line}: anchors and aliases are not read", file=path)
        if getattr(event, "tag", None):
            raise MalformedError(f"line {line}: tags are not read", file=path)
        if not isinstance(event, outside):
            yield event


class _Reader:
    """Makes values of events."""

    def __init__(self, events: Iterator[Any], path: Path, loader: Any) -> None:
        self._events, self._path, self._loader = events, path, loader

    def value(self, depth: int, event: Any = None) -> Value:
        """The next value."""
        import yaml

        event = event or next(self._events, None)
        if event is None:
            raise MalformedError("is empty", file=self._path)
        line = event.start_mark.line + 1
        if depth > _DEPTH:
            raise MalformedError(f"line {line}: nested deeper than {_DEPTH}", file=self._path)
        if isinstance(event, yaml.ScalarEvent):
            return Scalar(event.value, self._scalar(event, line), line)
        if isinstance(event, yaml.SequenceStartEvent):
            found: list[Value] = []
            while not isinstance(inner := next(self._events), yaml.SequenceEndEvent):
                found.append(self.value(depth + 1, inner))
            return Collection(found, line)
        items: dict[str, Value] = {}
        while not isinstance(key := next(self._events), yaml.MappingEndEvent):
            at = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarEvent):
                raise MalformedError(f"line {at}: a key that is no text", file=self._path)
            if key.value in items:
                raise MalformedError(f"line {at}: '{show(key.value)}' stands there twice", file=self._path)
            items[key.value] = self.value(depth + 1)
        return Collection(items, line)

    def _scalar(self, event: Any, line: int) -> str | int | float | bool | None:
        import yaml

        if not event.implicit[0]:
            return str(event.value)
        tag = self._loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        known: dict[str, Callable[[Any], Any]] = {
            "null": lambda node: None,
            "bool": self._loader.construct_yaml_bool,
            "int": self._loader.construct_yaml_int,
            "float": self._loader.construct_yaml_float,
        }
        kind = tag.rpartition(":")[2]
        if kind == "str" and len(event.value) < 100 and _POWER_OF_TEN.fullmatch(event.value):
            return float(event.value)
        if kind not in known or ":" in event.value:
            return str(event.value)  # dates, and YAML 1.1's 1:30, which is 90, are texts here
        if len(event.value) > 100:
            raise MalformedError(f"line {line}: a number of {len(event.value)} characters", file=self._path)
        try:
            value: str | int | float | bool | None = known[kind](yaml.ScalarNode(tag, event.value))
        except ValueError as error:
            raise MalformedError(f"line {line}: '{show(event.value)}' is no {kind}", file=self._path) from error
        return value
