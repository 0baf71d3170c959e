# SPDX-License-Identifier: Apache-2.0
"""Files of prompts: one on each line, or JSON on each line (``.jsonl``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.onnx.run.inputs import Given
from surgery_formats.errors import MalformedError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.files.raw import open_file

__all__ = ["read_batch"]

_LIMIT = 1 << 28  # bytes


def read_batch(file: Path) -> list[Given]:
    """The inputs of a file; empty lines are none.

    A line of JSON is an object with ``prompt`` (a text), ``pair`` (two texts), ``ids`` or ``messages`` (a conversation).

    Raises:
        NotFoundError: no such file.
        MalformedError: not UTF-8, a line that is no such object, or no input at all.
    """
    source = open_file(file)
    if source.size > _LIMIT:
        raise MalformedError(f"has {source.size} bytes (at most {_LIMIT} are read)", file=file)
    try:
        text = bytes(source.read(0, source.size)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedError("not UTF-8", file=file) from error
    lines = text.replace("\r\n", "\n").split("\n")  # no other separator: texts may hold it
    found = list(_records(lines, file) if file.suffix == ".jsonl" else (line for line in lines if line.strip()))
    if not found:
        raise MalformedError("has no line with a prompt", file=file)
    return found


def _records(lines: list[str], file: Path) -> Iterator[Given]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = parse_object(line.encode(), file=file)
        given = [(key, record[key]) for key in ("prompt", "pair", "ids", "messages") if key in record]
        if len(given) != 1 or (value := _input(*given[0])) is None:
            raise MalformedError(f"line {number} has not one prompt, pair, ids or messages", file=file)
        yield value


def _input(key: str, value: Any) -> Given | None:
    if key == "prompt":
        return value if isinstance(value, str) else None
    if not isinstance(value, list):
        return None
    if key == "pair":
        return (value[0], value[1]) if len(value) == 2 and all(isinstance(one, str) for one in value) else None
    if key == "ids":
        return [*value] if all(type(one) is int for one in value) else None
    return [*value] if value and all(isinstance(one, Mapping) for one in value) else None
