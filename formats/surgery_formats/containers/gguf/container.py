# SPDX-License-Identifier: Apache-2.0
"""One file of GGUF: opened, and laid out with the key-values of the file it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery_formats.containers.base import FileLayout, Shard, ShardSet, TensorSpec
from surgery_formats.containers.gguf.constants import ALIGNMENT, MAGIC
from surgery_formats.errors import FitError, SurgeryError
from surgery_formats.files.raw import open_file

if TYPE_CHECKING:
    from surgery_formats.containers.gguf.header import Header

__all__ = ["GGUF", "open_gguf", "shard_of"]

_TYPES = {"adapter": "a LoRA for llama.cpp, not a model", "mmproj": "a vision or audio encoder, not a language model"}


def open_gguf(path: Path) -> Header:
    """Open and check one file.

    Raises:
        NotFoundError, MalformedError: see `read_header`.
        FitError: it holds no model.
    """
    from surgery_formats.containers.gguf.header import read_header  # most models are none

    header = read_header(open_file(path))
    kind = header.value("general.type")
    if kind in _TYPES:
        raise FitError(f"its general.type is '{kind}': {_TYPES[kind]}", file=path)
    return header


def shard_of(header: Header) -> Shard:
    """The file as a shard."""
    file = header.file
    return Shard(file.path, "gguf", file, header.tensors, header_nbytes=header.begin)


@dataclass(frozen=True, slots=True)
class _Gguf:
    name: str = "gguf"
    title: str = "model.gguf of llama.cpp"
    written_as: str = "gguf"
    suffixes: tuple[str, ...] = (".gguf",)

    def detect(self, path: Path) -> bool:
        """A file that begins with ``GGUF``."""
        try:
            file = open_file(path)
            return file.size >= len(MAGIC) and file.read(0, len(MAGIC)) == MAGIC
        except (SurgeryError, OSError):
            return False

    def open(self, path: Path) -> dict[str, ShardSet]:
        """One file; of splits, this one alone."""
        from surgery_formats.containers.gguf.config import model_config

        header = open_gguf(path)
        return {"": ShardSet(path.parent, (shard_of(header),), config=model_config(header), self_contained=True)}

    def lay_out(self, tensors: Sequence[TensorSpec], like: Shard | None = None, alignment: int = 1) -> FileLayout:
        """With the key-values of `like`, of which those stay true that speak of types."""
        from surgery_formats.containers.gguf.header import read_header
        from surgery_formats.containers.gguf.layout import lay_out

        same = like is not None and like.container == self.name
        header = read_header(like.file) if like is not None and same else None
        if header is None and alignment & (alignment - 1):
            raise FitError(f"{alignment} is no alignment of a GGUF: it is no power of two")
        return lay_out(tensors, header, max(alignment, ALIGNMENT))


GGUF = _Gguf()
