# SPDX-License-Identifier: Apache-2.0
"""What came of one piece of work, as a file of a share: figures and arrays.

"surgery piece 1", line feed    length of the head, 8 bytes, little-endian    head, JSON    arrays
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from surgery_formats.errors import ProofError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.files.raw import File, open_file

__all__ = ["Payload", "PieceFile", "open_piece", "other_bytes", "write_piece"]

_MAGIC = b"surgery piece 1\n"
_BEGIN = len(_MAGIC) + 8  # of the head


class Payload(NamedTuple):
    """An array of a piece.

    Attributes:
        nbytes: Its size.
        load: Its bytes.
    """

    nbytes: int
    load: Callable[[], memoryview]


def write_piece(folder: OutputFolder, name: str, head: Mapping[str, Any], arrays: Iterable[Payload]) -> None:
    """Write a piece; its arrays lie behind each other, and are loaded one by one.

    Raises:
        FitError, ResourceError: as `OutputFolder.create`.
    """
    raw, arrays = json.dumps(head, allow_nan=False).encode(), tuple(arrays)
    begin = _MAGIC + len(raw).to_bytes(8, "little") + raw
    file = folder.create(name, len(begin) + sum(array.nbytes for array in arrays))
    file.pwrite(memoryview(begin), 0)
    whole, at = xxhash.xxh3_128(begin), len(begin)
    for array in arrays:
        data = array.load()
        file.pwrite(data, at)
        whole.update(data)
        at += array.nbytes
    # with the first hash, a rerun of a killed worker tells that it is whole; with the other, whoever reads it
    file.finish({"xxh3": whole.hexdigest(), "head": xxhash.xxh3_128_hexdigest(raw)})


@dataclass(frozen=True, slots=True)
class PieceFile:
    """A piece, opened.

    Attributes:
        file: The file.
        begin: Where its arrays begin.
        head: The figures.
    """

    file: File
    begin: int
    head: Mapping[str, Any]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with what lies at `offset` among the arrays; its hash is the caller's to compare."""
        self.file.read_into(buffer, self.begin + offset)


def open_piece(path: Path, record: Mapping[str, Any]) -> PieceFile:
    """Open a piece; `record` is what the manifest beside it says about it.

    Raises:
        ProofError: the head is not what was written.
    """
    file = open_file(path)
    size = int.from_bytes(file.read(0, _BEGIN)[len(_MAGIC) :], "little") if file.size >= _BEGIN else 0
    raw = file.read(_BEGIN, size) if _BEGIN + size <= file.size else bytearray()
    if xxhash.xxh3_128_hexdigest(raw) != record.get("head") or record.get("size") != file.size:
        raise other_bytes(path)
    return PieceFile(file, _BEGIN + size, parse_object(raw, file=path))


def other_bytes(path: Path) -> ProofError:
    """The error for a piece that is damaged."""
    return ProofError("is not what the worker computed", file=path, hint="remove its folder, and run the share again")
