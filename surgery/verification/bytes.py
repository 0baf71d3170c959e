# SPDX-License-Identifier: Apache-2.0
"""Check that the bytes of a folder are those that were written, and those of the base where they were copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery_formats.containers.base import Shard
from surgery_formats.containers.onnx import open_graph
from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.containers.weight_files import is_weight_file, open_shard
from surgery_formats.errors import MalformedError, NotFoundError, ProofError
from surgery_formats.files.raw import open_file
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.identity import tensor_digest
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["changed_tensors", "compare_copied", "compare_files", "data_shard", "recorded_tensors"]


def recorded_tensors(folder: Path, manifest: Mapping[str, Any]) -> int:
    """The number of computed tensors, all as they were when they were written.

    Those of a file that has a hash were compared with it, and are not read again.

    Raises:
        ProofError: a tensor has changed or is missing.
    """
    checked = 0
    graphs = [other for other in manifest["files"] if other.endswith(".onnx")]
    for name, entry in sorted(manifest["files"].items()):
        if isinstance(entry, Mapping) and {"xxh3", "sha256"} & entry.keys():
            checked += len(_expected(entry))
        elif isinstance(entry, Mapping):
            checked += changed_tensors(folder, name, entry, graphs)
    return checked


def _expected(entry: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the computed tensors of a file."""
    tensors = entry.get("tensors")
    rows = tensors.items() if isinstance(tensors, Mapping) else ()
    return {key: facts["xxh3"] for key, facts in rows if isinstance(facts, Mapping) and facts.get("xxh3") is not None}


def changed_tensors(folder: Path, name: str, entry: Mapping[str, Any], graphs: Sequence[str]) -> int:
    """Compare the computed tensors of a file with their hashes; returns their number.

    `graphs` are those of the folder, which call its tensors by names of their own.

    Raises:
        ProofError: a tensor has changed or is missing.
    """
    expected = _expected(entry)
    if not expected or not (graphs or is_weight_file(name)):
        return 0
    component = name.rpartition("/")[0]  # a pipeline's tensors are recorded with the network that they are of
    prefix = f"{component}:" if any(key.startswith(f"{component}:") for key in expected) else ""
    stored = {f"{prefix}{tensor.name}": tensor for tensor in _tensors_in(folder, name, graphs)}
    for key, digest in sorted(expected.items()):
        if key not in stored:
            raise ProofError("was written but is missing", file=folder / name, tensor=key)
        if tensor_digest(stored[key]) != digest:
            raise ProofError("its bytes have changed since it was written", file=folder / name, tensor=key)
    return len(expected)


def _tensors_in(folder: Path, name: str, graphs: Iterable[str]) -> Iterable[StoredTensor]:
    """The tensors of a file of weights, and of a graph's, inside or beside it, those of the graphs in the folder.

    A merge into a graph records them as the graph calls them, even those of a file of safetensors.
    """
    inside = [tensor for graph in graphs for tensor in open_graph(folder / graph).tensors.values()]
    if is_weight_file(name):
        return [*inside, *open_shard(folder / name).tensors]
    if SAFETENSORS.detect(folder / name):  # under a name that another program looks for
        return [*inside, *data_shard(folder / name).tensors]
    return inside


def compare_copied(folder: Checkpoint, base: Checkpoint, manifest: Mapping[str, Any]) -> int:
    """Compare every tensor that the ledger lists as copied with the base's.

    Returns:
        Number of tensors compared.

    Raises:
        MalformedError: the manifest has no ledger.
        ProofError: a tensor differs.
    """
    ledger = manifest.get("ledger")
    tensors = ledger.get("tensors") if isinstance(ledger, Mapping) else None
    if not isinstance(tensors, Mapping):
        raise MalformedError("the manifest has no ledger of tensors", file=folder.path)
    written, originals = _labelled(folder), _labelled(base)
    checked = 0
    for label, entry in sorted(tensors.items()):
        if not isinstance(entry, Mapping) or entry.get("class") != "copied":
            continue
        source = entry.get("source")
        origin = source.get("tensor", label) if isinstance(source, Mapping) else label
        prefix = label.rpartition(":")[0]
        original = originals.get(f"{prefix}:{origin}" if prefix else str(origin)) or originals.get(label)
        if label not in written or original is None:
            raise ProofError("is not in both", file=folder.path, tensor=label)
        if written[label].nbytes != original.nbytes or tensor_digest(written[label]) != tensor_digest(original):
            raise ProofError("was copied, but differs from the base's", file=folder.path, tensor=label)
        checked += 1
    return checked


def _labelled(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    return {
        f"{name}:{tensor.name}" if name else tensor.name: tensor
        for name, component in checkpoint.components.items()
        for tensor in component.tensors.values()
    }


def data_shard(path: Path) -> Shard:
    """A file of safetensors, whatever its name is."""
    if is_weight_file(path.name):
        return open_shard(path)
    return next(iter(SAFETENSORS.open(path).values())).shards[0]


def compare_files(
    folder: Path, names: list[str], base: Checkpoint, renamed: Mapping[str, str] | None = None
) -> list[str]:
    """Compare weight files with the base's files of the same name, byte by byte; the base's own files are skipped.

    Args:
        folder: Where they lie.
        names: Their names there.
        base: The base.
        renamed: Their names in the base, where those are others.

    Returns:
        Names of the files that the base has too.

    Raises:
        ProofError: a file differs.
    """
    known = {shard.path.name: shard.file for component in base.components.values() for shard in component.shards}
    originals = {name: known[old] for name in names if (old := (renamed or {}).get(name, name)) in known}
    shared = []
    for name in names:
        if name not in originals:
            continue
        try:
            written = open_file(folder / name)
        except NotFoundError as error:
            raise ProofError("the weight file is missing", file=folder / name) from error
        shared.append(name)
        if written.identity == originals[name].identity:
            continue
        if written.size != originals[name].size:
            raise ProofError(f"has {written.size} bytes, but the base's has {originals[name].size}", file=folder / name)
        position = 0
        blocks = zip(written.blocks(0, written.size), originals[name].blocks(0, written.size), strict=True)
        for block, original_block in blocks:
            if block != original_block:
                raise ProofError(
                    f"differs from the base's between bytes {position} and {position + len(block)}",
                    file=folder / name,
                    hint=f"the base is {show(base.path, 200)}",
                )
            position += len(block)
    return shared
