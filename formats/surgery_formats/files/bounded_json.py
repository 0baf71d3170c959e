# SPDX-License-Identifier: Apache-2.0
"""Untrusted JSON: bounded in size and depth, without duplicate keys, NaN or giant integers; and written as it was read."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

__all__ = [
    "CONFIG_LIMIT",
    "INDEX_LIMIT",
    "MANIFEST_LIMIT",
    "TOKENIZER_LIMIT",
    "json_bytes",
    "parse_object",
    "read_object",
]

CONFIG_LIMIT = 4 << 20
INDEX_LIMIT = 64 << 20
TOKENIZER_LIMIT = 256 << 20
MANIFEST_LIMIT = 256 << 20  # with about 700 bytes for each tensor that was computed
_DEPTH = 64
_OPENINGS = 8_000_000  # brackets and braces; a list or object of nothing takes 64 bytes, and two or three in the file
_DIGITS = 300  # per number; Python parses integers in quadratic time


def parse_object(raw: bytes | bytearray, *, file: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse the JSON object in `raw`.

    Raises:
        MalformedError: not UTF-8, not JSON, not an object, nested too deep, too many values, a repeated key, NaN or Infinity, or a
            number that float64 cannot hold.
    """

    def fail(what: str) -> MalformedError:
        return MalformedError(what, file=file)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(items)
        if len(values) != len(items):
            repeated = next(key for key, count in Counter(key for key, _ in items).items() if count > 1)
            raise fail(f"the key '{show(repeated)}' appears twice")
        return values

    def constant(text: str) -> Any:
        raise fail(f"{text} is not JSON")

    def integer(text: str) -> int:
        if len(text) > _DIGITS:
            raise fail(f"a number of {len(text)} digits")
        return int(text)

    def real(text: str) -> float:
        value = float(text)
        if len(text) > _DIGITS or value in (float("inf"), float("-inf")):
            raise fail(f"the number {show(text, 40)} does not fit a double")
        return value

    if raw.count(b"[") + raw.count(b"{") > _OPENINGS:
        raise fail(f"more than {_OPENINGS} lists and objects")
    try:
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_int=integer, parse_float=real
        )
    except MalformedError:
        raise
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise fail(f"not JSON ({show(error)})") from error
    if not isinstance(document, dict):
        raise fail("not a JSON object")
    if _too_deep(document):
        raise fail(f"nested deeper than {_DEPTH}")
    return document


def _too_deep(document: dict[str, Any]) -> bool:
    """Whether the document is nested too deep; iterative, so that depth cannot overflow the stack."""
    level: list[Any] = [document]
    for _ in range(_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def read_object(path: str | os.PathLike[str], limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """Read the JSON object in the file `path`, of at most `limit` bytes.

    Raises:
        NotFoundError: no such file.
        MalformedError: the file is too large, or as `parse_object`.
    """
    opened = open_file(path)
    if opened.size > limit:
        raise MalformedError(f"{opened.size} bytes of JSON (at most {limit} are read)", file=path)
    return parse_object(opened.read(0, opened.size), file=path)


def json_bytes(value: object) -> bytes:
    """`value` as JSON in UTF-8, with a line break at its end.

    Half of a surrogate pair, which JSON can hold and UTF-8 cannot, stays escaped.
    """
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
