# SPDX-License-Identifier: Apache-2.0
"""Where inputs that a manifest knows by their content alone are looked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from surgery_formats.containers.weight_files import holds_weights

__all__ = ["nearby_inputs"]

_LOOKED_AT = 500  # entries of a folder


def nearby_inputs(manifest: Path) -> Iterator[Path]:
    """Files of weights and folders with some, here and beside the manifest's folder."""
    for folder in dict.fromkeys((Path.cwd(), manifest.resolve().parent.parent)):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)[:_LOOKED_AT]:
            if entry.name.startswith("."):
                continue
            if os.path.isfile(entry.path):
                if holds_weights(entry.name):
                    yield Path(entry.path)
            elif any(map(holds_weights, _names(entry.path))):
                yield Path(entry.path)


def _names(folder: str) -> list[str]:
    """What lies in a folder; nothing where there is none, or none that may be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []
