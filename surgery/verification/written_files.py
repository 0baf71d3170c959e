# SPDX-License-Identifier: Apache-2.0
"""Check the files of a folder against what its manifest, or the account of an export, recorded when they were written."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from surgery.verification.bytes import changed_tensors, compare_copied, recorded_tensors
from surgery.verification.result import Check
from surgery_formats.errors import InputError, MalformedError
from surgery_formats.files.bounded_json import MANIFEST_LIMIT, read_object
from surgery_formats.files.output.hashing import root_digest
from surgery_formats.files.output.manifest import MANIFEST, file_digest, verify_files, verify_folder
from surgery_formats.files.places import names_in
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint
from surgery_formats.models.side_files import EXPORT_ACCOUNT
from surgery_formats.text import count

__all__ = ["SIGNATURE", "check_added", "check_manifest"]

SIGNATURE = "model.sig"
"""What OpenSSF model signing calls its signature."""
_PER_GRAPH = ("genai_config.json",)  # what an export adds besides graphs


def check_manifest(
    where: Path, recorded: Mapping[str, Any], checks: list[Check], base: Checkpoint | None = None
) -> tuple[Mapping[str, Any], str]:
    """The manifest, whose files were compared with it: names, sizes, hashes; and the digest of the folder, if it has one.

    Graphs may have been added to a folder of weights since, and a signature.

    Args:
        where: The folder.
        recorded: Files that have an account of their own.
        checks: Gets what was found.
        base: Tells which copied tensor has changed, where one has.

    Raises:
        ProofError: a file has changed. The message names the tensor, where that is known.
    """
    added = [name for name in names_in(where) if name.endswith((".onnx", ".onnx_adapter")) or name in _PER_GRAPH]
    manifest = verify_folder(
        where, added=[*added, *recorded, SIGNATURE], explain=partial(_explain, where=where, base=base)
    )
    files = manifest["files"]
    checks.append(Check("files", f"{count(len(files))} as the manifest has them"))
    if number := recorded_tensors(where, manifest):
        checks.append(Check("computed tensors", f"{count(number)}, each as it was written"))
    return manifest, _digest(where, manifest, {*added, *recorded}, checks)


def _digest(where: Path, manifest: Mapping[str, Any], added: set[str], checks: list[Check]) -> str:
    """The digest that model signing makes of the folder, where the manifest tells enough for it; else empty."""
    hashes = {name: entry.get("sha256") for name, entry in manifest["files"].items()}
    if added or not all(isinstance(value, str) for value in hashes.values()):
        return ""
    own = manifest.get("digest")
    if not isinstance(own, Mapping) or own.get("sha256") != root_digest(hashes):
        raise MalformedError("its digest is not that of its files", file=where / MANIFEST)
    digest = root_digest({**hashes, MANIFEST: file_digest(where / MANIFEST, "sha256")})
    checks.append(Check("sha256 of the folder", digest))
    return digest


def _explain(name: str, entry: Mapping[str, Any], where: Path, base: Checkpoint | None) -> None:
    """Name the tensor that has changed in a file that has, if one of those that are known by themselves has.

    Raises:
        ProofError: this one.
    """
    try:
        changed_tensors(where, name, entry, [other for other in names_in(where) if other.endswith(".onnx")])
        if base is not None:
            compare_copied(open_checkpoint(where), base, read_object(where / MANIFEST, MANIFEST_LIMIT))
    except InputError:  # its header is damaged: that the file has changed says it all
        return


def check_added(where: Path, checks: list[Check]) -> Mapping[str, Any]:
    """Files that an export with adapters added to a folder of weights, by name; none where it kept no account.

    Raises:
        ProofError: one has changed.
    """
    source = where / EXPORT_ACCOUNT
    if not source.exists():
        return {}
    entries = read_object(source, MANIFEST_LIMIT).get("files", {})
    if not isinstance(entries, Mapping):
        raise MalformedError("its account of files is none", file=source)
    verify_files(where, entries, source, partial(_explain, where=where, base=None))
    checks.append(Check("added files", f"{count(len(entries))} as {EXPORT_ACCOUNT} has them"))
    if number := recorded_tensors(where, {"files": entries}):
        checks.append(Check("merged tensors", f"{count(number)}, each as it was written"))
    return {EXPORT_ACCOUNT: {}, **entries}
