# SPDX-License-Identifier: Apache-2.0
"""``.onnx_adapter`` files with the factors of a LoRA, under the names that Olive and our own export give a graph's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery_formats.containers.onnx_adapter import is_onnx_adapter

if TYPE_CHECKING:
    from surgery_formats.adapters.format import Rendering
    from surgery_formats.canonical.adapter import Adapter
    from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["ONNX_ADAPTER"]


@dataclass(frozen=True, slots=True)
class _OnnxAdapter:
    name: str = "onnx-adapter"
    title: str = ".onnx_adapter file of onnxruntime, Olive and onnxruntime-genai: LoRA"
    needs_base: bool = False
    single_file: bool = True
    file_stems: tuple[str, ...] = ()

    def detect(self, path: Path) -> bool:
        """A file with the identifier ``TORT`` behind its first four bytes."""
        return is_onnx_adapter(path)

    def read(self, path: Path) -> Adapter:
        """See `read.read_onnx_adapter`."""
        from surgery_formats.adapters.onnx_adapter.read import read_onnx_adapter

        return read_onnx_adapter(path)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_onnx_adapter`."""
        from surgery_formats.adapters.onnx_adapter.write import render_onnx_adapter

        return render_onnx_adapter(adapter, base)


ONNX_ADAPTER = _OnnxAdapter()
