# SPDX-License-Identifier: Apache-2.0
"""A model in several files of GGUF, as ``llama-gguf-split`` makes them: ``model-00001-of-00003.gguf``.

The first has the key-values of the model, all have ``split.no``, ``split.count`` and ``split.tensors.count``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from surgery_formats.containers.base import ShardSet
from surgery_formats.containers.gguf.constants import MAGIC
from surgery_formats.containers.gguf.container import open_gguf, shard_of
from surgery_formats.errors import MalformedError
from surgery_formats.files.places import is_folder, names_in
from surgery_formats.files.raw import first_bytes, stays_inside
from surgery_formats.text import show

__all__ = ["GGUF_SPLITS", "series"]

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MOST = 4096  # files


@dataclass(frozen=True, slots=True)
class _GgufSplits:
    name: str = "gguf-splits"
    title: str = "model-00001-of-00002.gguf of llama.cpp, a file or a folder of them"
    written_as: str = "gguf-splits"

    def detect(self, path: Path) -> bool:
        """One of the files, or a folder with the files of one model and no other weights in GGUF."""
        try:
            files = _files_at(path)
        except OSError:
            return False
        return bool(files) and first_bytes(files[0], len(MAGIC)) == MAGIC

    def open(self, path: Path) -> dict[str, ShardSet]:
        """All files.

        Raises:
            MalformedError: one is missing, or they do not belong together.
        """
        from surgery_formats.containers.gguf.config import model_config

        files = _files_at(path)
        if not files:
            raise MalformedError("is no file of a split GGUF", file=path)
        headers = []
        for number, file in enumerate(files):
            if not file.exists():
                hint = "the download is incomplete" if number else "it holds the model's key-values"
                raise MalformedError(f"the split '{show(file.name)}' is missing", file=path, hint=hint)
            if not stays_inside(file):
                raise MalformedError("is a link out of its folder", file=file)
            header = open_gguf(file)
            said = header.value("split.no"), header.value("split.count")
            if said != (number, len(files)):
                raise MalformedError(
                    f"says it is split {said[0]} of {said[1]}, not {number} of {len(files)}", file=file
                )
            headers.append(header)
        tensors = sum(len(header.tensors) for header in headers)
        if len({tensor.name for header in headers for tensor in header.tensors}) != tensors:
            raise MalformedError("two of its splits have a tensor of one name", file=path)
        if (said_tensors := headers[0].value("split.tensors.count")) != tensors:
            raise MalformedError(f"its splits have {tensors} tensors, not {said_tensors}", file=files[0])
        whole = model_config(headers[0], [tensor for header in headers for tensor in header.tensors])
        shards = tuple(shard_of(header) for header in headers)
        return {"": ShardSet(files[0].parent, shards, config=whole, self_contained=True)}


GGUF_SPLITS = _GgufSplits()


def _files_at(path: Path) -> list[Path]:
    """The files of the model at `path`, whether they are there or not; empty if it is no split GGUF."""
    if not is_folder(path):
        return series(path) if path.suffix == ".gguf" else []
    names = [name for name in names_in(path) if not name.startswith(".")]
    first = [name for name in names if name.endswith(".gguf")]
    if not first or any(name.endswith((".safetensors", ".bin", ".pt", ".pth")) for name in names):
        return []
    files = series(path / first[0])
    return files if {file.name for file in files} >= set(first) else []


def series(path: Path) -> list[Path]:
    """The names of all splits of a model, by one of them; empty for any other name."""
    match = _NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= (count := int(match["count"])) <= _MOST:
        return []
    return [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
