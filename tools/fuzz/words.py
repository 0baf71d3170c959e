# SPDX-License-Identifier: Apache-2.0
"""What files hold that others may be damaged with: names of tensors, keys and values of JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Words", "json_of", "places_of", "safetensors_of"]


@dataclass(frozen=True)
class Words:
    """What other files hold.

    Attributes:
        names: Names of tensors.
        segments: Parts of such names.
        keys: Keys of JSON objects, headers' free strings among them.
        values: Values of JSON objects.
    """

    names: tuple[str, ...]
    segments: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, files: Iterable[bytes]) -> Words:
        """Those of these files."""
        names: dict[str, None] = {}
        keys: dict[str, None] = {}
        values: dict[str, Any] = {}
        for raw in files:
            document = json_of(raw)
            if (taken := safetensors_of(raw)) is not None:
                document = taken[0].pop("__metadata__", {})
                names |= dict.fromkeys(taken[0])
            if document is not None:
                for place, key in places_of(document):
                    keys |= {key: None} if isinstance(key, str) else {}
                    values[repr(place[key])[:200]] = place[key]
        segments = dict.fromkeys(part for name in names for part in name.replace("_", ".").split("."))
        leaves = dict.fromkeys(name.split(".", 1)[-1] for name in names)
        return cls(tuple(names), (*segments, *leaves), tuple(keys), tuple(values.values()))


def json_of(raw: bytes) -> Any:
    """The object or list that a file is; None if it is none."""
    if raw[:1] not in (b"{", b"["):
        return None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def places_of(document: Any) -> list[tuple[Any, Any]]:
    """Every place of a document: its object or list, and the key in it."""
    found: list[tuple[Any, Any]] = []
    left = [document]
    while left:
        value = left.pop()
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in inner:
            found.append((value, key))
            left.append(item)
    return found


def safetensors_of(raw: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Header and data; None if it is no such file."""
    if len(raw) < 10 or raw[8:9] != b"{":
        return None
    length = struct.unpack_from("<Q", raw)[0]
    header = json_of(raw[8 : 8 + length]) if length <= len(raw) - 8 else None
    return (header, raw[8 + length :]) if isinstance(header, dict) else None
