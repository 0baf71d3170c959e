# SPDX-License-Identifier: Apache-2.0
"""What an interrupted run left: the journal of its finished files, and the checks before they are reused."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from surgery_formats.errors import SurgeryError
from surgery_formats.files.output.manifest import FileRecord, file_digest, safe_name

__all__ = ["Finished", "has_size", "parse_line", "same_digest"]


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
