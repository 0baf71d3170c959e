# SPDX-License-Identifier: Apache-2.0
"""GGUF LoRA of llama.cpp: one file whose ``general.type`` is ``adapter``."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.grammar.files import weights_at
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.containers.gguf.constants import MAGIC
from surgery_formats.files.raw import first_bytes
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["GGUF_LORA"]

_HEAD = 1 << 16  # llama.cpp's converter writes its type first
_TYPE = struct.pack("<Q12sIQ7s", 12, b"general.type", 8, 7, b"adapter")


@dataclass(frozen=True, slots=True)
class _GgufLora:
    name: str = "gguf"
    title: str = "GGUF LoRA of llama.cpp: linear layers, embedding, head, stacked experts"
    needs_base: bool = True
    single_file: bool = True
    file_stems: tuple[str, ...] = ()

    def detect(self, path: Path) -> bool:
        """A GGUF that says it is an adapter, or a folder that holds such a file and no other weights."""
        file = weights_at(path)
        head = first_bytes(file, _HEAD) if file is not None and file.suffix == ".gguf" else None
        return head is not None and head.startswith(MAGIC) and _TYPE in head

    def read(self, path: Path) -> Adapter:
        """See `read.read_gguf`."""
        from surgery_formats.adapters.gguf.read import read_gguf

        return read_gguf(path)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_gguf`."""
        from surgery_formats.adapters.gguf.write import render_gguf

        return render_gguf(adapter, base)


GGUF_LORA = _GgufLora()
