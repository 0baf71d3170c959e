# SPDX-License-Identifier: Apache-2.0
"""Containers by name, and the one that a path is of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from surgery_formats.containers.base import Container, FileContainer, ShardSet
from surgery_formats.containers.gguf.splits import GGUF_SPLITS
from surgery_formats.containers.pipeline import PIPELINE
from surgery_formats.containers.sharded import SHARDED, is_index
from surgery_formats.containers.weight_files import (
    ENTRY_POINTS,
    GRAPH_FILES,
    WEIGHT_FILES,
    container_of_file,
    open_weight_file,
)
from surgery_formats.errors import NotFoundError
from surgery_formats.files.places import is_folder
from surgery_formats.files.remote.path import to_path
from surgery_formats.plugins import with_plugins

__all__ = ["BUILT_IN", "ENTRY_POINTS", "container_at", "containers", "open_weights"]

BUILT_IN: tuple[Container, ...] = (*WEIGHT_FILES, *GRAPH_FILES, SHARDED, PIPELINE, GGUF_SPLITS)


def containers() -> dict[str, Container]:
    """Every container by name: the built-in ones, then plugins'.

    Raises:
        SurgeryError: a plugin cannot be imported, or takes a name that is taken.
    """
    return with_plugins(ENTRY_POINTS, BUILT_IN, "container")


def container_at(path: Path) -> Container:
    """The container of a file or folder: a special kind of folder by its content, a file by its name.

    Raises:
        MalformedError: a file that is not one of weights by its name.
    """
    special = (c for c in containers().values() if c is not SHARDED and not isinstance(c, FileContainer))
    if (container := next((container for container in special if container.detect(path)), None)) is not None:
        return container
    return SHARDED if is_folder(path) or is_index(path.name) else container_of_file(path)


def open_weights(path: str | os.PathLike[str]) -> Mapping[str, ShardSet]:
    """The weights of a model in any container, by component; a plain model has one, called "".

    Raises:
        NotFoundError: nothing there, or no weights in the folder.
        MalformedError: a file is not what its container says.
    """
    where = to_path(path)
    if not where.exists():
        raise NotFoundError("no such file or folder", file=where)
    container = container_at(where)
    return open_weight_file(where) if isinstance(container, FileContainer) else container.open(where)
