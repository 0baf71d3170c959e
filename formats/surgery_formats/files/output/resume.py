# SPDX-License-Identifier: Apache-2.0
"""What an interrupted run left: the journal of its finished files, and how far each is believed."""

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
    """Records of an earlier run, each checked at its first look-up and gone if it fails."""

    def __init__(self, noted: dict[str, FileRecord], is_good: Callable[[FileRecord], bool]) -> None:
        self._noted = noted
        self._is_good = is_good
        self._claimed: set[str] = set()

    def __getitem__(self, name: str) -> FileRecord:
        found = self._noted[name]
        if name not in self._claimed:
            if not self._is_good(found):
                raise KeyError(name)
            self._claimed.add(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return (name for name in sorted(self._noted) if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def claimed(self) -> dict[str, FileRecord]:
        """Those that were looked up and are good."""
        return {name: self._noted[name] for name in sorted(self._claimed)}

    def unclaimed(self) -> list[str]:
        """Names nobody asked for, or that failed."""
        return sorted(self._noted.keys() - self._claimed)

    def forget(self, name: str) -> bool:
        """Offer `name` no longer, for it is written anew; whether it was there."""
        self._claimed.discard(name)
        return self._noted.pop(name, None) is not None


def same_digest(path: Path, found: FileRecord) -> bool:
    """Whether the whole file has the hash in its record; False without one."""
    return "xxh3" in found.record and file_digest(path, "xxh3") == found.record["xxh3"]


def parse_line(line: bytes, plan_id: str) -> FileRecord | None:
    """The record in one journal line; None for a torn line, or one this plan did not write."""
    try:
        entry = json.loads(line)
        if entry["plan"] != plan_id or not isinstance(entry["record"], dict):
            return None
        safe_name(entry["name"])
        return FileRecord(entry["name"], int(entry["size"]), entry["record"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SurgeryError):
        return None


def has_size(path: Path, size: int) -> bool:
    """Whether `path` is a regular file, and no link, of `size` bytes."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size
