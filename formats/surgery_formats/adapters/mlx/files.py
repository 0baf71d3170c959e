# SPDX-License-Identifier: Apache-2.0
"""Names of an MLX-LM adapter's files, by which it is told from other formats."""

from __future__ import annotations

from pathlib import Path

from surgery_formats.containers.base import Shard
from surgery_formats.containers.npz import open_npz
from surgery_formats.containers.weight_files import open_shard
from surgery_formats.errors import NotFoundError, SurgeryError
from surgery_formats.files.places import is_file, is_folder

__all__ = ["OLD_FILE", "TENSOR_FILE", "is_old_file", "open_mlx"]

TENSOR_FILE = "adapters.safetensors"
OLD_FILE = "adapters.npz"
"""Of mlx-lm before 2024-04, and of mlx-examples, where the user names it."""


def is_old_file(path: Path) -> bool:
    """Whether `path` is an archive of arrays with the names of MLX's factors."""
    if not path.name.endswith(".npz") or not is_file(path):
        return False
    try:
        names = [tensor.name for tensor in open_npz(path).tensors]
    except (SurgeryError, OSError):
        return False
    return bool(names) and all(name.endswith((".lora_a", ".lora_b")) for name in names)


def open_mlx(path: Path) -> tuple[Path, Shard]:
    """The file of weights that `path` is, or the one in a folder, and what it holds.

    Raises:
        NotFoundError, MalformedError: no such file, or not what its name says.
    """
    if not is_folder(path):
        return path, open_npz(path)
    if (path / TENSOR_FILE).exists():
        return path / TENSOR_FILE, open_shard(path / TENSOR_FILE)
    if (path / OLD_FILE).exists():
        return path / OLD_FILE, open_npz(path / OLD_FILE)
    raise NotFoundError(f"no {TENSOR_FILE}", file=path)
