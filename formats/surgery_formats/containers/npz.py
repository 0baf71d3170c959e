# SPDX-License-Identifier: Apache-2.0
"""Numpy's ``.npz``: a zip archive of arrays, stored as they are (what ``numpy.savez`` and ``mlx.core.savez`` write)."""

from __future__ import annotations

import os

from surgery_formats.containers.base import Shard
from surgery_formats.containers.npy import npy_array
from surgery_formats.containers.stored_zip import members
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

__all__ = ["open_npz"]


def open_npz(path: str | os.PathLike[str]) -> Shard:
    """The arrays of a file by name, in its order; only headers are read.

    Raises:
        NotFoundError: no such file.
        MalformedError: not such an archive, or a member that is no array of numbers.
    """
    file = open_file(path)
    tensors = []
    for name, member in members(file).items():
        stem = name.removesuffix(".npy")
        if stem == name or not stem.isprintable():
            raise MalformedError(f"the member '{show(name)}' is no array", file=file.path)
        tensors.append(npy_array(file, stem, member.offset, member.nbytes))
    return Shard(file.path, "npz", file, tuple(tensors))
