# SPDX-License-Identifier: Apache-2.0
"""Are the bytes of a folder those that were written, and those of the base where they should be?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from surgery_formats.containers.weight_files import is_weight_file, open_shard
from surgery_formats.errors import MalformedError, NotFoundError, ProofError
from surgery_formats.files.raw import File, open_file
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["compare_copied", "compare_files", "recorded_tensors"]

_CHUNK = 4 << 20


def _blocks(file: File, offset: int, nbytes: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_CHUNK, nbytes)))
    for start in range(0, nbytes, _CHUNK):
        block = buffer[: nbytes - start]
        file.read_into(block, offset + start)
        yield block


def _digest(tensor: StoredTensor) -> str:
    state = xxhash.xxh3_128()
    for block in _blocks(tensor.file, tensor.offset, tensor.nbytes):
        state.update(block)
    return state.hexdigest()


def recorded_tensors(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Compare every computed tensor with the hash that was taken when it was written.

    Args:
        folder: Of the manifest.
        manifest: Its contents, its files already checked.

    Returns:
        How many there were.

    Raises:
        ProofError: a tensor's bytes changed, or it is gone.
    """
    checked = 0
    for name, entry in sorted(manifest["files"].items()):
        tensors = entry.get("tensors")
        if not isinstance(tensors, Mapping) or not is_weight_file(name):
            continue
        stored = {tensor.name: tensor for tensor in open_shard(folder / name).tensors}
        for key, facts in sorted(tensors.items()):
            wanted = facts.get("xxh3") if isinstance(facts, Mapping) else None
            if wanted is None:
                continue
            if key not in stored:
                raise ProofError("was written and is gone", file=folder / name, tensor=key)
            if _digest(stored[key]) != wanted:
                raise ProofError("its bytes changed since it was written", file=folder / name, tensor=key)
            checked += 1
    return checked


def compare_copied(folder: Checkpoint, base: Checkpoint, manifest: Mapping[str, Any]) -> int:
    """Compare every tensor that the ledger calls copied with the base's.

    Returns:
        How many there were.

    Raises:
        MalformedError: the manifest has no ledger.
        ProofError: a tensor differs.
    """
    ledger = manifest.get("ledger")
    tensors = ledger.get("tensors") if isinstance(ledger, Mapping) else None
    if not isinstance(tensors, Mapping):
        raise MalformedError("the manifest has no ledger of tensors", file=folder.path)
    ours, theirs = _labelled(folder), _labelled(base)
    checked = 0
    for label, entry in sorted(tensors.items()):
        if not isinstance(entry, Mapping) or entry.get("class") != "copied":
            continue
        source = entry.get("source")
        origin = source.get("tensor", label) if isinstance(source, Mapping) else label
        prefix = label.rpartition(":")[0]
        there = theirs.get(label) or theirs.get(f"{prefix}:{origin}" if prefix else str(origin))
        if label not in ours or there is None:
            raise ProofError("is not in both", file=folder.path, tensor=label)
        if ours[label].nbytes != there.nbytes or _digest(ours[label]) != _digest(there):
            raise ProofError("was copied, and is not the base's", file=folder.path, tensor=label)
        checked += 1
    return checked


def _labelled(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    return {
        f"{name}:{tensor.name}" if name else tensor.name: tensor
        for name, component in checkpoint.components.items()
        for tensor in component.tensors.values()
    }


def compare_files(folder: Path, names: list[str], base: Checkpoint) -> list[str]:
    """Compare weight files with the base's of the same name, byte by byte; one that is the base's own needs no comparison.

    Returns:
        Names of those that the base has too.

    Raises:
        ProofError: a file differs.
    """
    theirs = {shard.path.name: shard.file for component in base.components.values() for shard in component.shards}
    found = []
    for name in names:
        if name not in theirs:
            continue
        try:
            ours = open_file(folder / name)
        except NotFoundError as error:
            raise ProofError("the weight file is missing", file=folder / name) from error
        found.append(name)
        if ours.identity == theirs[name].identity:
            continue
        if ours.size != theirs[name].size:
            raise ProofError(f"{ours.size} bytes, the base's has {theirs[name].size}", file=folder / name)
        place = 0
        both = zip(_blocks(ours, 0, ours.size), _blocks(theirs[name], 0, ours.size), strict=True)
        for one, other in both:
            if one != other:
                raise ProofError(
                    f"differs from the base's between bytes {place} and {place + len(one)}",
                    file=folder / name,
                    hint=f"the base is {show(base.path, 200)}",
                )
            place += len(one)
    return found
