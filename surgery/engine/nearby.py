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
        for path in (folder / name for name in sorted(_names(folder))[:_LOOKED_AT] if not name.startswith(".")):
            if holds_weights(path.name) if path.is_file() else any(map(holds_weights, _names(path))):
                yield path


def _names(folder: Path) -> list[str]:
    """What lies in a folder; nothing where there is none, or none that may be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []
