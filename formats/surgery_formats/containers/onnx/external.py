# SPDX-License-Identifier: Apache-2.0
"""External data: the files beside a graph that hold its weights.

A tensor names a file by a path relative to the graph's folder, an offset and a length (onnx.proto, "external_data"). All
three are untrusted. onnxruntime checks no more than that the range is inside the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from surgery_formats.errors import MalformedError, NotFoundError
from surgery_formats.files.raw import File, open_file, stays_inside
from surgery_formats.text import show

__all__ = ["ExternalFiles", "is_inside"]

_NUMBER = re.compile(r"[0-9]{1,19}")
_DRIVE = re.compile(r"[A-Za-z]:")


def is_inside(location: str) -> bool:
    """Whether a location is a plain path below the graph's folder; where links lead is another question."""
    if not location or not location.isprintable() or "\\" in location:
        return False
    return not location.startswith("/") and ".." not in location.split("/") and not _DRIVE.match(location)


class ExternalFiles:
    """The files that a graph's tensors lie in, each opened once.

    Attributes:
        graph: The graph.
        files: By location, in order of their first use.
    """

    def __init__(self, graph: Path) -> None:
        self.graph = graph
        self.files: dict[str, File] = {}
        self._folder = graph.parent.resolve()

    def place(self, name: str, entries: Mapping[str, str], nbytes: int) -> tuple[File, int]:
        """The open file and the offset of a tensor's bytes.

        Args:
            name: Of the tensor, for messages.
            entries: What the tensor says: ``location``, ``offset``, ``length``.
            nbytes: What its type and shape take.

        Raises:
            NotFoundError: the file is missing.
            MalformedError: a location outside the folder, or a range that is none, or is not inside the file.
        """
        location = entries.get("location", "")
        file = self.files.get(location)
        if file is None:
            file = self.files[location] = self._open(name, location)
        offset, length = (self._number(name, entries, key) for key in ("offset", "length"))
        if length is not None and length != nbytes:
            raise MalformedError(
                f"{length} bytes in '{show(location)}' for a type and shape that take {nbytes}",
                file=self.graph,
                tensor=name,
            )
        if (offset or 0) + nbytes > file.size:
            raise MalformedError(
                f"ends at byte {(offset or 0) + nbytes} of '{show(location)}', which has {file.size}",
                file=self.graph,
                tensor=name,
                hint="the file of weights is incomplete, or belongs to another graph",
            )
        return file, offset or 0

    def _open(self, name: str, location: str) -> File:
        if not is_inside(location):
            raise MalformedError(
                f"its data is said to lie at '{show(location)}', which is no path inside the graph's folder",
                file=self.graph,
                tensor=name,
            )
        path = self.graph.parent / location
        try:
            if not path.parent.resolve().is_relative_to(self._folder) or not stays_inside(path):
                raise MalformedError(
                    f"its data at '{show(location)}' leads out of the graph's folder",
                    file=self.graph,
                    tensor=name,
                    hint="links may lead into the blobs of a Hugging Face cache only",
                )
            return open_file(path)
        except (OSError, RuntimeError) as error:
            if isinstance(error, NotFoundError) and "many" not in error.message:
                text = f"its data lies in '{show(location)}': {error.message}"
                hint = "files of weights belong beside the graph: download or copy them, too"
                raise NotFoundError(text, file=self.graph, tensor=name, hint=hint) from error
            if isinstance(error, NotFoundError):
                hint = "the graph has a file for each tensor: allow more open files with 'ulimit -n'"
                raise NotFoundError(error.message, file=path, tensor=name, hint=hint) from error
            raise MalformedError(
                f"its data at '{show(location)}' cannot be found", file=self.graph, tensor=name
            ) from error

    def _number(self, name: str, entries: Mapping[str, str], key: str) -> int | None:
        text = entries.get(key)
        if not text:
            return None
        if not _NUMBER.fullmatch(text) or int(text) >= 1 << 63:
            raise MalformedError(f"'{show(text, 40)}' is no {key} of its data", file=self.graph, tensor=name)
        return int(text)
