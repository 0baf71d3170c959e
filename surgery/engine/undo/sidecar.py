# SPDX-License-Identifier: Apache-2.0
"""The file of what a merge lost, beside the merged model.

It is laid out like a safetensors file, and has another name on purpose: programs that load every ``*.safetensors`` of a
folder would take it for weights. Every tensor of it is a run of bytes, in segments: their number, their lengths, and then
one after the other. What they mean is in one JSON object in the metadata.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery_formats.containers.safetensors import layout, open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.files.output.kernel_copy import write_all
from surgery_formats.files.output.output_file import output_faults
from surgery_formats.files.raw import File
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["FORMAT", "Sidecar", "SidecarWriter", "open_sidecar"]

FORMAT = "surgery-base-rounding/1"
_KEY = "surgery"
_PIECE = 4 << 20


class SidecarWriter:
    """Takes segments in any order and from any thread; their number and sizes are known only at the end."""

    def __init__(self, folder: OutputFolder) -> None:
        self._shown = folder.shown
        with output_faults(self._shown):
            self._file = tempfile.TemporaryFile(dir=folder.staged)  # noqa: SIM115  # closed by `finish`
        self._segments: dict[str, list[tuple[int, int]]] = {}
        self._end = 0
        self._lock = threading.Lock()

    def add(self, key: str, data: bytes | memoryview) -> None:
        """The next segment of `key`."""
        with self._lock:
            at, self._end = self._end, self._end + len(data)
            self._segments.setdefault(key, []).append((at, len(data)))
        with output_faults(self._shown, len(data)):
            write_all(self._file.fileno(), memoryview(data), at)

    def begin(self, key: str) -> None:
        """`key` has segments, perhaps none."""
        with self._lock:
            self._segments.setdefault(key, [])

    def drop(self, key: str) -> None:
        """Forget the segments of `key`."""
        with self._lock:
            self._segments.pop(key, None)

    def finish(self, folder: OutputFolder, name: str, facts: Mapping[str, Any]) -> int:
        """Write the file into an output; returns its size."""
        tables = {key: _table([nbytes for _, nbytes in parts]) for key, parts in sorted(self._segments.items())}
        sizes = {key: len(table) + sum(n for _, n in self._segments[key]) for key, table in tables.items()}
        metadata = {_KEY: json.dumps({"format": FORMAT, **facts}, sort_keys=True, separators=(",", ":"))}
        header, ranges = layout([(key, DType.U8, (size,)) for key, size in sizes.items()], metadata)
        nbytes = len(header) + sum(sizes.values())
        out = folder.create(name, nbytes)
        out.pwrite(header, 0)
        for key, table in tables.items():
            at = ranges[key][0]
            for piece in (table, *self._pieces(key)):
                out.pwrite(piece, at)
                at += len(piece)
        self._file.close()
        out.finish({})
        return nbytes

    def _pieces(self, key: str) -> Iterator[bytes]:
        for at, nbytes in self._segments[key]:
            for start in range(0, nbytes, _PIECE):
                yield os.pread(self._file.fileno(), min(_PIECE, nbytes - start), at + start)

    def close(self) -> None:
        """Give up what was taken; may be called twice."""
        self._file.close()


def _table(lengths: list[int]) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in (len(lengths), *lengths))


@dataclass(frozen=True)
class Sidecar:
    """An open file of what a merge lost.

    Attributes:
        path: The file.
        file: The same, open.
        facts: What is known of the base, of the merge, and of every part.
        parts: The runs of bytes by key.
    """

    path: Path
    file: File
    facts: Mapping[str, Any]
    parts: Mapping[str, StoredTensor]

    def segments(self, key: str) -> Segments:
        """The segments of one key.

        Raises:
            MalformedError: there are none, or their lengths do not fit.
        """
        tensor = self.parts.get(key)
        if tensor is None:
            raise MalformedError("a part of it is missing", file=self.path, tensor=key)
        count = int.from_bytes(self.file.read(tensor.offset, 8), "little") if tensor.nbytes >= 8 else -1
        if not 0 <= count <= tensor.nbytes // 8 - 1:
            raise MalformedError("a part of it is damaged", file=self.path, tensor=key)
        table = self.file.read(tensor.offset + 8, 8 * count)
        lengths = [int.from_bytes(table[at : at + 8], "little") for at in range(0, 8 * count, 8)]
        if 8 + 8 * count + sum(lengths) != tensor.nbytes:
            raise MalformedError("a part of it is damaged", file=self.path, tensor=key)
        return Segments(self.file, tensor.offset + 8 + 8 * count, tuple(lengths))


class Segments:
    """The segments of a key, read in order."""

    def __init__(self, file: File, at: int, lengths: tuple[int, ...]) -> None:
        self._file, self._at, self._lengths = file, at, lengths
        self._next = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def take(self) -> bytearray:
        """The next one.

        Raises:
            MalformedError: there is no more.
        """
        if self._next == len(self._lengths):
            raise MalformedError("a part of it ends early", file=self._file.path)
        data = self._file.read(self._at, self._lengths[self._next])
        self._at += self._lengths[self._next]
        self._next += 1
        return data


def open_sidecar(path: Path) -> Sidecar:
    """Open the file of what a merge lost.

    Raises:
        NotFoundError: there is none.
        MalformedError: it is something else, or damaged.
        FitError: it is of a later version.
    """
    shard = open_safetensors(path)
    try:
        facts = json.loads(shard.metadata[_KEY])
        known = facts["format"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise MalformedError(
            "not a file of what a merge lost",
            file=path,
            hint="`surgery merge` writes it, asked for with `reversible=True`",
        ) from error
    if known != FORMAT:
        raise FitError(f"is of the format {known!r:.40}, and {FORMAT} is read", file=path)
    return Sidecar(path, shard.file, facts, {tensor.name: tensor for tensor in shard.tensors})
