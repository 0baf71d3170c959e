# SPDX-License-Identifier: Apache-2.0
"""Containers of one file, by file ending. Add one as an object like these and a line in `WEIGHT_FILES`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from surgery_formats.containers.base import Container, FileContainer, Shard, ShardSet, WritableContainer
from surgery_formats.containers.gguf.container import GGUF
from surgery_formats.containers.onnx.container import ONNX
from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.containers.torch import TORCH
from surgery_formats.errors import FitError, MalformedError, SurgeryError
from surgery_formats.files.places import names_in
from surgery_formats.files.raw import open_file
from surgery_formats.files.remote.path import to_path
from surgery_formats.plugins import with_plugins
from surgery_formats.text import show

__all__ = [
    "ENTRY_POINTS",
    "GRAPH_FILES",
    "UNREAD_SUFFIXES",
    "WEIGHT_FILES",
    "container_of_file",
    "file_containers",
    "holds_weights",
    "is_of_one_file",
    "is_weight_file",
    "open_shard",
    "open_weight_file",
    "output_container",
]

WEIGHT_FILES: tuple[FileContainer, ...] = (
    SAFETENSORS,
    TORCH,
    GGUF,
)  # in order of preference where a folder holds several
GRAPH_FILES: tuple[FileContainer, ...] = (ONNX,)
"""Graphs hold a model's weights beside its computation. They are no shard of a model and no part of an adapter, and a folder's is
opened only where no other file is."""
ENTRY_POINTS = "surgery.containers"  # a plugin's entry point is an object like those above

UNREAD_SUFFIXES = (".onnx", ".onnx_data", ".msgpack", ".h5", ".ot", ".npz")
"""Endings of weights that no container reads, and of graphs; outputs do not carry such files."""

_MAGIC = (
    (b"version https://git-lfs", "this is a Git LFS pointer, not the weights: run 'git lfs pull'"),
    (b"PK\x03\x04", "this is a zip archive, but not one that torch.save wrote"),
    (b"\x80", "this looks like a pickle, but not one that torch.save wrote"),
    (b"\x93NUMPY", "this is a numpy array"),
    (b"\x89HDF", "this is an HDF5 file"),
    (b"7z\xbc\xaf\x27\x1c", "this is a 7z archive"),
    (b"\x1f\x8b", "this is a gzip archive: unpack it first"),
    (b"<", "this looks like a web page: download the file again"),
)


def is_of_one_file(container: Container) -> TypeGuard[FileContainer]:
    """Whether a container is one file; every name of a folder asks it, and `isinstance` would look at each member of the protocol."""
    return hasattr(container, "suffixes")


def file_containers() -> dict[str, FileContainer]:
    """Every container of one file by name: the built-in ones, then plugins'.

    Raises:
        SurgeryError: a plugin cannot be imported, or takes a name that is taken.
    """
    known = with_plugins(ENTRY_POINTS, (*WEIGHT_FILES, *GRAPH_FILES), "container")
    files = {name: container for name, container in known.items() if is_of_one_file(container)}
    return dict(sorted(files.items(), key=lambda entry: entry[1] in GRAPH_FILES))


def is_weight_file(name: str) -> bool:
    """Whether a file of this name is one of weights that can be read, and no graph."""
    return any(
        name.endswith(container.suffixes) for container in file_containers().values() if container not in GRAPH_FILES
    )


def holds_weights(name: str) -> bool:
    """Whether a file of this name is one of weights, of any program."""
    return is_weight_file(name) or name.endswith(UNREAD_SUFFIXES)


def container_of_file(path: Path) -> FileContainer:
    """The container that the name of `path` stands for; its content decides between several of the same ending.

    Raises:
        MalformedError: no container has files of that name.
    """
    named = [container for container in file_containers().values() if path.name.endswith(container.suffixes)]
    if not named:
        suffixes = ", ".join(suffix for container in file_containers().values() for suffix in container.suffixes)
        hint = _what_it_is(path) or _folder_of(path) or f"expected one of {suffixes}"
        raise MalformedError("not a file of weights by its name", file=path, hint=hint)
    return named[0] if len(named) == 1 else next((c for c in named if c.detect(path)), named[0])


def open_weight_file(path: str | os.PathLike[str]) -> Mapping[str, ShardSet]:
    """Open one file of weights by the container its name stands for; see `Container.open`.

    Raises:
        NotFoundError: no such file.
        MalformedError: no container has files of that name, or its content is another.
    """
    where = to_path(path)
    container = container_of_file(where)
    try:
        return container.open(where)
    except MalformedError as error:
        if error.hint is not None or container.detect(where):
            raise
        hint = _what_it_is(where)
        raise MalformedError(error.message, file=error.file, tensor=error.tensor, hint=hint) from error


def open_shard(path: str | os.PathLike[str]) -> Shard:
    """Open one file with the weights of one component.

    Raises:
        NotFoundError, MalformedError: as `open_weight_file`.
        FitError: the file holds several components.
    """
    opened = open_weight_file(path)
    if len(opened) != 1 or len(shards := next(iter(opened.values())).shards) != 1:
        raise FitError("several components where the weights of one were expected", file=path)
    return shards[0]


def output_container(name: str) -> WritableContainer:
    """The container that weights of the container `name` are written to.

    Raises:
        SurgeryError: a plugin names one that cannot be written.
    """
    known = file_containers()
    written = known.get(known[name].written_as)
    if not isinstance(written, WritableContainer):
        target = show(known[name].written_as)
        raise SurgeryError(f"the container '{name}' is written as '{target}', but that container cannot be written")
    return written


def _folder_of(path: Path) -> str | None:
    """The folder to name in the place of a configuration in it."""
    if path.suffix != ".json" or not path.is_file() or not any(map(holds_weights, names_in(path.parent))):
        return None
    return f"name the folder that it is in: {show(str(path.parent), 200)}"


def _what_it_is(path: Path) -> str | None:
    """What `path` really is, judged by its first bytes, if that is recognised."""
    for container in file_containers().values():
        if container.detect(path):
            *some, last = container.suffixes
            return f"this looks like a {container.name} file: name it {', '.join(some) + ' or ' if some else ''}{last}"
    try:
        file = open_file(path)
        head = bytes(file.read(0, min(file.size, 32)))
    except (SurgeryError, OSError):
        return None
    return next((what for magic, what in _MAGIC if head.startswith(magic)), None)
