# SPDX-License-Identifier: Apache-2.0
"""The manifest of an output folder: safe names, file records, and the check of a folder against its manifest."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from surgery_formats.errors import FitError, MalformedError, NotFoundError, ProofError, UsageError
from surgery_formats.files.bounded_json import MANIFEST_LIMIT, read_object
from surgery_formats.files.output.hashing import hash_threads, new_hash, root_digest
from surgery_formats.files.places import exists
from surgery_formats.files.raw import open_file
from surgery_formats.files.remote.path import RemotePath, to_path
from surgery_formats.text import listing, show

__all__ = [
    "FORMAT",
    "MANIFEST",
    "UNFINISHED",
    "FileRecord",
    "check_output_name",
    "digests_of",
    "file_digest",
    "is_safe_name",
    "manifest_bytes",
    "safe_name",
    "verify_files",
    "verify_folder",
]

MANIFEST = "surgery_manifest.json"
UNFINISHED = ".surgery-unfinished"
"""What stands below a prefix while its objects appear (`surgery_formats.files.remote.stage`)."""
FORMAT = "surgery-manifest/1"

Explain = Callable[[str, Mapping[str, Any]], None]

_CHANGED = "its bytes have changed since it was written"
_LONGEST = 255  # bytes of a name, on nearly all file systems
_NAME_LIMIT = 240  # bytes; file systems allow 255, and ".part" is appended while writing
# Device names on Windows, where an output may be copied to.
_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?\Z", re.DOTALL)
_FORBIDDEN = frozenset('<>:"|?*\\/')


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One finished file of an output folder.

    Attributes:
        name: Path relative to the folder, with ``/``.
        size: Size in bytes.
        record: Details from the writer: ``xxh3`` (xxh3-128 of the whole file, hex), ``sha256``, or keys of its own.
    """

    name: str
    size: int
    record: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the entry in the manifest."""
        return {**self.record, "size": self.size}


def check_output_name(path: Path) -> None:
    """Refuse a name that no file system takes, or that programs cannot be told, before the output is computed.

    Raises:
        UsageError: the name is too long, or holds what cannot be printed, as a line break or bytes that are no UTF-8.
    """
    if (size := len(os.fsencode(path.name))) > _LONGEST:
        raise UsageError(f"its name has {size} bytes, and file systems allow {_LONGEST}", file=path)
    if not path.name.isprintable():
        raise UsageError("its name cannot be printed", file=path, hint="use letters, digits and the like")


def safe_name(name: str) -> tuple[str, ...]:
    """Return the one or two path components of `name`.

    Names may come from files (an index, a pipeline), so only plain components are allowed: no absolute or parent
    paths, no separators of other systems, nothing unprintable, no names that the writer uses itself.

    Raises:
        FitError: `name` cannot be the name of an output file.
    """
    parts = tuple(name.split("/"))
    reserved = parts[0] == MANIFEST or name.startswith(".surgery") or any(part.endswith(".part") for part in parts)
    if reserved or len(parts) > 2 or not all(_is_plain(part) for part in parts):
        raise FitError(f"'{show(name)}' cannot be the name of an output file")
    return parts


def is_safe_name(name: str) -> bool:
    """Whether `safe_name` accepts `name`."""
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
    """Return the hex digest of the whole file; `kind` is ``xxh3`` (xxh3-128) or ``sha256``.

    Raises:
        NotFoundError, MalformedError: the file cannot be read.
    """
    state = new_hash(kind)
    opened = open_file(path)
    for block in opened.blocks(0, opened.size):
        state.update(block)
    return state.hexdigest()


def digests_of(data: bytes) -> dict[str, str]:
    """The record of a small file."""
    return {"xxh3": xxhash.xxh3_128_hexdigest(data), "sha256": hashlib.sha256(data).hexdigest()}


def manifest_bytes(manifest: Mapping[str, Any], plan_id: str, files: Mapping[str, FileRecord]) -> bytes:
    """Render the manifest: sorted keys, no NaN, one newline at the end; equal inputs give equal bytes.

    ``digest`` is that of all other files together (`root_digest`), where each has one.

    An entry ``plan`` in `manifest` replaces `plan_id`, which may depend on where the inputs lie.
    """
    entries = {name: record.as_json() for name, record in files.items()}
    document = {"plan": plan_id, **manifest, "format": FORMAT, "files": entries}
    hashes = {name: record.record["sha256"] for name, record in files.items() if "sha256" in record.record}
    if hashes.keys() == files.keys():  # a hard link to a file of another folder has none
        document["digest"] = {"sha256": root_digest(hashes)}
    # Not `json.dumps`: the pieces of its text, which it holds all together, take seven times what they make.
    pieces, data = json.JSONEncoder(sort_keys=True, indent=1, allow_nan=False).iterencode(document), bytearray()
    while some := "".join(islice(pieces, 1 << 14)):
        data += some.encode()
    data += b"\n"
    return bytes(data)


def verify_folder(
    path: str | os.PathLike[str], *, added: Collection[str] = (), explain: Explain | None = None
) -> dict[str, Any]:
    """Check that the folder holds exactly the files of its manifest, with their sizes and recorded hashes.

    Args:
        path: The folder.
        added: Names of files that may have been added since.
        explain: Called with the name and the entry of a file whose hash differs; may raise an error that says more.

    Returns:
        The manifest.

    Raises:
        NotFoundError: there is no manifest.
        MalformedError: the manifest is not valid.
        ProofError: a file is missing, unknown, or has changed since it was written.
    """
    folder = to_path(path)
    source = folder / MANIFEST
    manifest = read_object(source, MANIFEST_LIMIT)
    entries = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(entries, dict):
        raise MalformedError(f"not a {FORMAT} manifest", file=source)
    present = _files_below(folder) - {MANIFEST}
    if missing := sorted(entries.keys() - present):
        raise ProofError(f"missing: {listing(missing)}", file=folder)
    if extra := sorted(present - entries.keys() - set(added)):
        raise ProofError(f"not in the manifest: {listing(extra)}", file=folder)
    verify_files(folder, entries, source, explain)
    return manifest


def verify_files(folder: Path, entries: Mapping[str, Any], source: Path, explain: Explain | None = None) -> None:
    """Check that the files of `entries` (`FileRecord.as_json` by name) are in `folder`, with their sizes and hashes.

    `source`, named in messages, is the file that holds the entries; `explain` is as in `verify_folder`. A thread per core
    hashes, each one file at a time.

    Raises:
        MalformedError: an entry is not valid.
        ProofError: a file is missing or has changed since it was written.
    """
    for name, entry in sorted(entries.items()):
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
            raise MalformedError(f"the entry of '{show(name)}' has no size", file=source)
        if not is_safe_name(name):
            raise MalformedError(f"'{show(name)}' cannot be the name of an output file", file=source)
    if missing := sorted(name for name in entries if not exists(folder / name, links=True)):
        raise ProofError(f"missing: {listing(missing)}", file=folder)
    with hash_threads() as threads:
        found = {name: threads.submit(_change, folder / name, entry) for name, entry in sorted(entries.items())}
        try:
            for name, change in found.items():
                if (said := change.result()) is not None:
                    if explain is not None and said.startswith(_CHANGED):
                        explain(name, entries[name])
                    raise ProofError(said, file=folder / name)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _change(path: Path, entry: Mapping[str, Any]) -> str | None:
    """What is not as the entry of a file says, in words."""
    size = open_file(path).size
    if size != entry["size"]:
        return f"has {size} bytes, but had {entry['size']} when written"
    kind = next((kind for kind in ("sha256", "xxh3") if kind in entry), None)
    if kind is not None and file_digest(path, kind) != entry[kind]:
        return f"{_CHANGED} ({kind})"
    return None


def _files_below(folder: Path) -> set[str]:
    """Return the names of everything below `folder` except folders, with ``/``; links are not followed."""

    def fail(error: OSError) -> None:
        raise NotFoundError(error.strerror or "cannot be listed", file=error.filename) from error

    if isinstance(folder, RemotePath):
        return folder.store.all_below(folder.key).keys() - {UNFINISHED}
    paths: set[Path] = set()
    for at, folders, files in os.walk(folder, onerror=fail):
        paths.update(Path(at, name) for name in files)
        paths.update(link for name in folders if (link := Path(at, name)).is_symlink())
    return {path.relative_to(folder).as_posix() for path in paths}
