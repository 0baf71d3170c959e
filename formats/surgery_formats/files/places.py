# SPDX-License-Identifier: Apache-2.0
"""What lies at a path, in the file system or in a bucket.

Unlike for the methods of `Path`, a name that is too long or a loop of links is no fault.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from surgery_formats.files.remote.path import RemotePath

__all__ = ["entries", "exists", "is_file", "is_folder", "is_own_folder", "names_in", "size_and_version"]


def is_folder(path: Path) -> bool:
    """Whether it is a folder."""
    return path.is_dir() if isinstance(path, RemotePath) else os.path.isdir(path)


def is_own_folder(path: Path) -> bool:
    """Whether it is a folder, and no link to one."""
    return is_folder(path) and not path.is_symlink()


def is_file(path: Path) -> bool:
    """Whether it is a regular file."""
    return path.is_file() if isinstance(path, RemotePath) else os.path.isfile(path)


def exists(path: Path, *, links: bool = False) -> bool:
    """Whether there is anything; `links` that lead nowhere are something, if it is asked for them."""
    if isinstance(path, RemotePath):
        return path.exists()
    return os.path.lexists(path) if links else os.path.exists(path)


def size_and_version(path: Path) -> tuple[int, int | str]:
    """The size of a regular file and its time of modification in ns, or of an object and its etag, as of now; -1 if it is none."""
    if isinstance(path, RemotePath):
        facts = path.bucket.facts_if_any(path.key)
        return (-1, "") if facts is None else (facts.size, facts.etag)
    try:
        status = os.lstat(path)
    except OSError:
        return -1, 0
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (-1, 0)


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted.

    Raises:
        OSError: it cannot be listed.
    """
    if isinstance(folder, RemotePath):
        return [path.name for path in folder.iterdir()]
    return sorted(os.listdir(folder))


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, by name.

    Raises:
        OSError: it cannot be listed.
    """
    return [folder / name for name in names_in(folder)]
