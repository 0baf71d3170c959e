# SPDX-License-Identifier: Apache-2.0
"""The journal of a staging folder: a line for each file that is finished, by which the next run knows it."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Self

from surgery_formats.errors import SurgeryError
from surgery_formats.files.output.kernel_copy import write_all
from surgery_formats.files.output.manifest import FileRecord, safe_name

__all__ = ["JOURNAL", "Journal", "has_size", "parse_line"]

JOURNAL = ".surgery-journal"


class Journal:
    """The open journal of one plan. `note` is thread-safe."""

    def __init__(self, path: Path, plan_id: str, fd: int) -> None:
        self._path = path
        self._plan = plan_id
        self._fd = fd
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path, plan_id: str) -> Self:
        """Open the journal of `folder`, or begin it."""
        path = folder / JOURNAL
        return cls(path, plan_id, os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))

    def noted(self) -> dict[str, FileRecord]:
        """The files of this plan that are noted, and there with their sizes."""
        lines = os.pread(self._fd, os.fstat(self._fd).st_size, 0).split(b"\n")
        records = [record for line in lines if (record := parse_line(line, self._plan)) is not None]
        return {record.name: record for record in records if has_size(self._path.parent / record.name, record.size)}

    def note(self, record: FileRecord) -> None:
        """Write a line for a file that is on the disk under its name, and sync it."""
        entry = {"plan": self._plan, "name": record.name, "size": record.size, "record": record.record}
        # A line begins with a line break, so that a line torn by a kill cannot swallow the next.
        line = b"\n" + json.dumps(entry, sort_keys=True, allow_nan=False).encode() + b"\n"
        with self._lock:
            write_all(self._fd, memoryview(line), os.fstat(self._fd).st_size)
        os.fsync(self._fd)

    def remove(self) -> None:
        """All is finished."""
        self.close()
        os.unlink(self._path)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def parse_line(line: bytes, plan_id: str) -> FileRecord | None:
    """Parse one journal line; None for a torn line or one of another plan."""
    try:
        entry = json.loads(line)
        if entry["plan"] != plan_id or not isinstance(entry["record"], dict):
            return None
        safe_name(entry["name"])
        return FileRecord(entry["name"], int(entry["size"]), entry["record"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, SurgeryError):
        return None


def has_size(path: Path, size: int) -> bool:
    """Whether `path` is a regular file of `size` bytes, not a link."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size
