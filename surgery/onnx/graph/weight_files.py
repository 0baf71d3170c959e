# SPDX-License-Identifier: Apache-2.0
"""The files beside a graph that hold its initializers, as its contract knows them.

onnxruntime checks no offsets: with another weight file the logits are garbage, so these files are compared with the contract.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from surgery_formats.errors import MalformedError, ProofError
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

__all__ = ["WeightFile", "check_weight_files"]

_HEADER_LIMIT = 100 << 20  # bytes of a safetensors header: the reference's limit
_HINT = "the graph was made for another file; export it again"


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file that holds initializers of the graph.

    Attributes:
        name: Name, relative to the graph's folder.
        size: Size in bytes.
        header: xxh3-128 of the safetensors header with its eight bytes of length, in hexadecimal; it covers names,
            types, shapes and offsets.
    """

    name: str
    size: int
    header: str


def check_weight_files(
    files: Iterable[WeightFile], folder: Path, read: Collection[str] | None = None
) -> dict[str, int]:
    """Compare size and header of every file with the contract; sizes in bytes, by name.

    Of files that are not among those that the graph `read`s (its weights are inside) only the names are looked at.

    Raises:
        NotFoundError: a file is missing.
        MalformedError: the name is not that of a file in the folder.
        ProofError: the file differs from the one the graph was exported with.
    """
    sizes: dict[str, int] = {}
    for record in files:
        if not is_safe_name(record.name) or "/" in record.name:
            raise MalformedError(f"the graph refers to the weight file '{show(record.name)}'", file=folder)
        if read is not None and record.name not in read:
            continue
        opened = open_file(folder / record.name)
        if opened.size != record.size:
            raise ProofError(f"has {opened.size} bytes instead of {record.size}", file=opened.path, hint=_HINT)
        length = int.from_bytes(opened.read(0, 8), "little") if opened.size >= 8 else 0
        if length > min(_HEADER_LIMIT, opened.size - 8):
            raise ProofError("not a safetensors file", file=opened.path, hint=_HINT)
        if xxhash.xxh3_128_hexdigest(bytes(opened.read(0, 8 + length))) != record.header:
            raise ProofError("its header differs from the graph's contract", file=opened.path, hint=_HINT)
        sizes[record.name] = opened.size
    return sizes
