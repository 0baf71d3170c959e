# SPDX-License-Identifier: Apache-2.0
"""Whether the weight files beside a graph are those it was made for. onnxruntime checks no offset: with another file logits are garbage."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

from surgery.onnx.graph.contract import WeightFile
from surgery_formats.errors import MalformedError, ProofError
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

__all__ = ["check_weight_files"]

_HEADER_LIMIT = 100 << 20  # bytes of a safetensors header: the reference's limit
_HINT = "the graph was made for another file; export it again"


def check_weight_files(files: Iterable[WeightFile], folder: Path) -> dict[str, int]:
    """Compare size and header of every file with the contract.

    Args:
        files: As the contract names them.
        folder: Where they lie.

    Returns:
        Bytes by name.

    Raises:
        NotFoundError: a file is missing.
        MalformedError: a name that is none of a file in the folder.
        ProofError: another file than the graph was made for.
    """
    sizes: dict[str, int] = {}
    for one in files:
        if not is_safe_name(one.name) or "/" in one.name:
            raise MalformedError(f"the graph names the weight file '{show(one.name)}'", file=folder)
        opened = open_file(folder / one.name)
        if opened.size != one.size:
            raise ProofError(f"{opened.size} bytes, not {one.size}", file=opened.path, hint=_HINT)
        length = int.from_bytes(opened.read(0, 8), "little") if opened.size >= 8 else 0
        if length > min(_HEADER_LIMIT, opened.size - 8):
            raise ProofError("not a safetensors file", file=opened.path, hint=_HINT)
        if xxhash.xxh3_128_hexdigest(bytes(opened.read(0, 8 + length))) != one.header:
            raise ProofError("its header is not the one the graph was made for", file=opened.path, hint=_HINT)
        sizes[one.name] = opened.size
    return sizes
