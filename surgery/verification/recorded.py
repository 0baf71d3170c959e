# SPDX-License-Identifier: Apache-2.0
"""What an export wrote down of its codes: how far each weight's are from what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from surgery_formats.files.bounded_json import MANIFEST_LIMIT, read_object
from surgery_formats.files.output.manifest import MANIFEST

__all__ = ["recorded_errors"]


def recorded_errors(where: Path) -> dict[str, float]:
    """Errors of weights as the manifest's ledger has them."""
    source = where / MANIFEST
    ledger = read_object(source, MANIFEST_LIMIT).get("ledger") if source.exists() else None
    tensors = ledger.get("tensors") if isinstance(ledger, Mapping) else None
    rows = tensors.values() if isinstance(tensors, Mapping) else ()
    found = {}
    for row in rows:
        said = row.get("quantised") if isinstance(row, Mapping) else None
        if (
            isinstance(said, Mapping)
            and isinstance(said.get("error"), float | int)
            and isinstance(row.get("weight"), str)
        ):
            found[row["weight"]] = float(said["error"])
    return found
