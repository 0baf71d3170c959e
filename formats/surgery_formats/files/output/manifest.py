# SPDX-License-Identifier: Apache-2.0
"""What an output folder says about itself: names, records, the manifest, and the check against it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import xxhash

from surgery_formats.errors import FitError, MalformedError, NotFoundError, ProofError
from surgery_formats.files.bounded_json import INDEX_LIMIT, read_object
from surgery_formats.files.raw import open_file
from surgery_formats.text import listing, show

__all__ = [
    "FORMAT",
    "MANIFEST",
    "FileRecord",
    "file_digest",
    "is_safe_name",
    "manifest_bytes",
    "safe_name",
    "verify_files",
    "verify_folder",
]

MANIFEST = "surgery_manifest.json"
FORMAT = "surgery-manifest/1"

_CHUNK = 4 << 20
_NAME_LIMIT = 240  # bytes; file systems stop at 255 and ".part" is added while writing
# Names that mean a device on Windows, where an output may be copied to.
_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?\Z", re.DOTALL)
_FORBIDDEN = frozenset('<>:"|?*\\/')


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One finished file of an output folder.

    Attributes:
        name: Relative to the folder, with ``/``.
        size: In bytes.
        record: What the writer noted: ``xxh3`` (xxh3-128 of the whole file, hex), ``sha256``, or anything of
            its own.
    """

    name: str
    size: int
    record: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return {**self.record, "size": self.size}


def safe_name(name: str) -> tuple[str, ...]:
    """The one or two components of `name`.

    Names may come from files (an index, a pipeline), so anything but plain components is refused: no absolute
    or parent paths, no separators of another system, nothing unprintable, nothing this writer uses itself.

    Raises:
        FitError: `name` cannot be the name of an output file.
    """
    parts = tuple(name.split("/"))
    reserved = parts[0] == MANIFEST or name.startswith(".surgery") or any(part.endswith(".part") for part in parts)
    if reserved or len(parts) > 2 or not all(_is_plain(part) for part in parts):
        raise FitError(f"'{show(name)}' cannot be the name of an output file")
    return parts


def is_safe_name(name: str) -> bool:
    """Whether `safe_name` takes it."""
    try:
        safe_name(name)
    except FitError:
        return False
    return True


def _is_plain(part: str) -> bool:
    return (
        part.isprintable()
        and part not in ("", ".", "..")
        and not part.endswith((".", " "))
        and not _FORBIDDEN.intersection(part)
        and not _DEVICE.match(part)
        and len(part.encode("utf-8", "surrogatepass")) <= _NAME_LIMIT
    )


def file_digest(path: str | os.PathLike[str], kind: str) -> str:
    """Hex digest of the whole file; `kind` is ``xxh3`` (xxh3-128) or ``sha256``.

    Raises:
        NotFoundError, MalformedError: the file cannot be read.
    """
    state: _Hash = xxhash.xxh3_128() if kind == "xxh3" else hashlib.sha256()
    opened = open_file(path)
    buffer = memoryview(bytearray(min(_CHUNK, opened.size)))
    for offset in range(0, opened.size, _CHUNK):
        block = buffer[: opened.size - offset]
        opened.read_into(block, offset)
        state.update(block)
    return state.hexdigest()


def manifest_bytes(manifest: Mapping[str, Any], plan_id: str, files: Mapping[str, FileRecord]) -> bytes:
    """The manifest as written: sorted keys, no NaN, one newline at the end; equal inputs give equal bytes.

    Its plan is `plan_id`, unless `manifest` names one that does not depend on where the inputs lie.
    """
    entries = {name: found.as_json() for name, found in files.items()}
    whole = {"plan": plan_id, **manifest, "format": FORMAT, "files": entries}
    return json.dumps(whole, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def verify_folder(path: str | os.PathLike[str], *, added: Collection[str] = ()) -> dict[str, Any]:
    """Check that the folder holds the files of its manifest, no others, with their sizes and recorded hashes.

    Args:
        path: The folder.
        added: Names of files that may have been put beside them since.

    Returns:
        The manifest.

    Raises:
        NotFoundError: no manifest.
        MalformedError: the manifest is not one.
        ProofError: a file is missing, unknown, or not what it was when written.
    """
    folder = Path(path)
    source = folder / MANIFEST
    found = read_object(source, INDEX_LIMIT)
    entries = found.get("files")
    if found.get("format") != FORMAT or not isinstance(entries, dict):
        raise MalformedError(f"not a {FORMAT} manifest", file=source)
    present = _files_below(folder) - {MANIFEST}
    if missing := sorted(entries.keys() - present):
        raise ProofError(f"missing: {listing(missing)}", file=folder)
    if extra := sorted(present - entries.keys() - set(added)):
        raise ProofError(f"not in the manifest: {listing(extra)}", file=folder)
    verify_files(folder, entries, source)
    return found


def verify_files(folder: Path, entries: Mapping[str, Any], source: Path) -> None:
    """Check that the files of `entries` are in `folder`, with their sizes and recorded hashes.

    Args:
        folder: Of the files.
        entries: By name, as `FileRecord.as_json`.
        source: The file that holds them, for messages.

    Raises:
        MalformedError: an entry that is none.
        ProofError: a file is missing, or not what it was when written.
    """
    for name, entry in sorted(entries.items()):
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
            raise MalformedError(f"the entry of '{show(name)}' has no size", file=source)
        if not is_safe_name(name):
            raise MalformedError(f"'{show(name)}' cannot be the name of an output file", file=source)
    if missing := sorted(name for name in entries if not os.path.lexists(folder / name)):
        raise ProofError(f"missing: {listing(missing)}", file=folder)
    for name, entry in sorted(entries.items()):
        _verify_file(folder / name, entry)


def _verify_file(path: Path, entry: Mapping[str, Any]) -> None:
    size = open_file(path).size
    if size != entry["size"]:
        raise ProofError(f"{size} bytes, {entry['size']} when written", file=path)
    for kind in ("xxh3", "sha256"):
        if kind in entry and file_digest(path, kind) != entry[kind]:
            raise ProofError(f"its bytes changed since it was written ({kind})", file=path)


def _files_below(folder: Path) -> set[str]:
    """Names of everything that is not a real folder, with ``/``; links are not followed into."""
    found: set[str] = set()
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(folder / prefix) as entries:
                listed = [(prefix + entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except OSError as error:
            raise NotFoundError(error.strerror or "cannot be listed", file=folder / prefix) from error
        found.update(name for name, is_folder in listed if not is_folder)
        waiting += [name + "/" for name, is_folder in listed if is_folder]
    return found
