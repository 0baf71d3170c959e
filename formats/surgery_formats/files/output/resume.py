# SPDX-License-Identifier: Apache-2.0
"""The finished files that an interrupted run left, and the checks before they are reused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from surgery_formats.files.output.manifest import FileRecord, file_digest

__all__ = ["Finished", "remove", "same_digest", "sweep"]


class Finished(Mapping[str, FileRecord]):
    """Records of an earlier run; each is checked at its first lookup and dropped if the check fails."""

    def __init__(self, noted: dict[str, FileRecord], is_good: Callable[[FileRecord], bool]) -> None:
        self._noted = noted
        self._is_good = is_good
        self._claimed: set[str] = set()

    def __getitem__(self, name: str) -> FileRecord:
        record = self._noted[name]
        if name not in self._claimed:
            if not self._is_good(record):
                raise KeyError(name)
            self._claimed.add(name)
        return record

    def __iter__(self) -> Iterator[str]:
        return (name for name in sorted(self._noted) if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def claimed(self) -> dict[str, FileRecord]:
        """Return the records that were looked up and are good."""
        return {name: self._noted[name] for name in sorted(self._claimed)}

    def unclaimed(self) -> list[str]:
        """Return the names that were never looked up, or whose check failed."""
        return sorted(self._noted.keys() - self._claimed)

    def add(self, record: FileRecord) -> None:
        """A file that somebody else has finished, and proved, is there and is wanted."""
        self._noted[record.name] = record
        self._claimed.add(record.name)

    def forget(self, name: str) -> bool:
        """Drop `name` because it is written anew; whether it was present."""
        self._claimed.discard(name)
        return self._noted.pop(name, None) is not None


def same_digest(path: Path, record: FileRecord) -> bool:
    """Whether the whole file has the recorded hash; False if none is recorded."""
    kind = next((kind for kind in ("xxh3", "sha256") if kind in record.record), None)
    return kind is not None and file_digest(path, kind) == record.record[kind]


def sweep(folder: Path, kept: Collection[str]) -> None:
    """Delete all of `folder` but the files `kept`, which lie in it or one folder down."""
    folders = {name.split("/")[0] for name in kept if "/" in name}
    for name in os.listdir(folder):
        if name in folders:
            for inner in os.listdir(folder / name):
                if f"{name}/{inner}" not in kept:
                    remove(folder / name / inner)
        elif name not in kept:
            remove(folder / name)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder; one that is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
