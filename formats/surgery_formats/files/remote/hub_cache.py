# SPDX-License-Identifier: Apache-2.0
"""Which file of the hub a path is, read there or from the hub's cache: the same answer on every machine."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cached_repository", "hub_file"]

_HUB = "hf://"


def hub_file(path: Path) -> str | None:
    """``org/name@commit/file`` of a file of the hub, or of a snapshot in the hub's cache; None for any other file."""
    if (text := str(path)).startswith(_HUB):
        return text.removeprefix(_HUB)
    if (found := cached_repository(path)) is None:
        return None
    repo, rest = found
    return f"{repo}@{rest[1]}/{'/'.join(rest[2:])}" if rest[:1] == ("snapshots",) and len(rest) > 2 else None


def cached_repository(path: Path) -> tuple[str, tuple[str, ...]] | None:
    """``org/name`` of the repository in whose cache `path` lies, and what follows in the path; None for any other path."""
    parts = path.absolute().parts
    at = next((at for at in reversed(range(len(parts))) if parts[at].startswith("models--")), None)
    return None if at is None else (parts[at].removeprefix("models--").replace("--", "/", 1), parts[at + 1 :])
