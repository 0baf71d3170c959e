# SPDX-License-Identifier: Apache-2.0
"""KerasHub's LoRA files, and what a preset has beside them."""

from __future__ import annotations

from pathlib import Path

from surgery_formats.files.places import is_folder, names_in

__all__ = ["CONFIG", "ENDING", "METADATA", "TENSOR_FILE", "own_file"]

ENDING = ".lora.h5"
TENSOR_FILE = f"adapter{ENDING}"
CONFIG, METADATA = "config.json", "metadata.json"


def own_file(path: Path) -> Path | None:
    """The file that `path` is, or the only one in a folder."""
    if not is_folder(path):
        return path if path.name.endswith(ENDING) else None
    try:
        found = [name for name in names_in(path) if name.endswith(ENDING)]
    except OSError:
        return None
    return path / found[0] if len(found) == 1 else None
