# SPDX-License-Identifier: Apache-2.0
"""Frozen results as plain JSON values: one rule for every report, so that no two differ in how they say nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any

from surgery_formats.text import encodable

__all__ = ["plain", "without_empty"]


def plain(value: Any) -> Any:
    """`value` as JSON knows it.

    Dataclasses and mappings become objects, tuples lists, paths strings, NaN and infinities null. A field whose
    metadata says ``json: False`` is left out.

    Raises:
        TypeError: a value of another type; a report that holds one is a defect.
    """
    if isinstance(value, str):
        return encodable(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.metadata.get("json", True)
        }
    if isinstance(value, Mapping):
        return {encodable(str(key)): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, PurePath):
        return encodable(str(value))
    raise TypeError(f"{type(value).__name__} is not a plain value")


def without_empty(value: Any, names: Collection[str]) -> Any:
    """Plain values without the fields called `names` that hold nothing: what few results have does not clutter the others."""
    if isinstance(value, dict):
        kept = {key: without_empty(item, names) for key, item in value.items()}
        return {key: item for key, item in kept.items() if key not in names or item not in (None, [], {})}
    return [without_empty(item, names) for item in value] if isinstance(value, list) else value
