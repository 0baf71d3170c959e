# SPDX-License-Identifier: Apache-2.0
"""The JSON Schemas of what ``--json`` writes, one file per command (draft 2020-12)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "error_schema", "schema_of"]

FOLDER = Path(__file__).parent


def schema_of(command: str) -> dict[str, Any]:
    """The schema of a command's document on stdout: ``merge``, ``prompt bake``."""
    return _read(command.replace(" ", "-"))


def error_schema() -> dict[str, Any]:
    """The schema of an error on stderr."""
    return _read("error")


def _read(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return schema
