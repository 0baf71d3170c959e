# SPDX-License-Identifier: Apache-2.0
"""A diffusers pipeline: model_index.json, and a folder for each of its parts, some of which are networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery_formats.containers.base import ShardSet
from surgery_formats.containers.onnx.container import ONNX
from surgery_formats.containers.sharded import SHARDED, open_folder_tensors
from surgery_formats.errors import MalformedError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.files.places import exists, is_folder, names_in

__all__ = ["PIPELINE", "part_folders"]

_INDEX = "model_index.json"


def part_folders(pipeline: Path) -> dict[str, Path]:
    """The folders that the pipeline's index names, by name.

    Raises:
        MalformedError: the index is not a JSON object.
    """
    names = sorted(read_object(pipeline / _INDEX))
    plain = (name for name in names if not name.startswith("_") and "/" not in name and "\\" not in name)
    return {name: pipeline / name for name in plain if name not in (".", "..") and is_folder(pipeline / name)}


@dataclass(frozen=True, slots=True)
class _Pipeline:
    name: str = "pipeline"
    title: str = "diffusers: model_index.json and a folder per network"
    written_as: str = "pipeline"

    def detect(self, path: Path) -> bool:
        """A folder with a model_index.json."""
        return exists(path / _INDEX)

    def open(self, path: Path) -> dict[str, ShardSet]:
        """The networks among the parts that the index names."""
        networks = {name: folder for name, folder in part_folders(path).items() if _is_network(folder)}
        if not networks:
            raise MalformedError("a pipeline without weights", file=path / _INDEX)
        return {name: open_folder_tensors(folder) for name, folder in networks.items()}


def _is_network(folder: Path) -> bool:
    """Whether a part has weights: files of them, or a graph with its own."""
    try:
        return SHARDED.detect(folder) or any(name.endswith(ONNX.suffixes) for name in names_in(folder))
    except OSError:  # it may not be listed
        return False


PIPELINE = _Pipeline()
