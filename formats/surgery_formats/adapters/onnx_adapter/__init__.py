# SPDX-License-Identifier: Apache-2.0
"""``.onnx_adapter`` files with the factors of a LoRA, under the names that Olive and our own export give a graph's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery_formats.containers.onnx_adapter import is_onnx_adapter

if TYPE_CHECKING:
    from surgery_formats.adapters.format import Rendering
    from surgery_formats.adapters.onnx_adapter.graph_slots import GraphSlots
    from surgery_formats.canonical.adapter import Adapter
    from surgery_formats.dtypes import DType
    from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["ONNX_ADAPTER"]


@dataclass(frozen=True, slots=True)
class _OnnxAdapter:
    name: str = "onnx-adapter"
    title: str = ".onnx_adapter file of onnxruntime, Olive and onnxruntime-genai: LoRA"
    needs_base: bool = False
    single_file: bool = True
    file_stems: tuple[str, ...] = ()
    slots: GraphSlots | None = None
    filled: Mapping[str, Any] | None = None

    @property
    def element(self) -> DType | None:
        """Type of the graph's slots."""
        return None if self.slots is None else self.slots.dtype

    def for_graph(self, path: Path) -> _OnnxAdapter:
        """For the slots of the graph `path`, see `graph_slots.slots_in`."""
        from surgery_formats.adapters.onnx_adapter.graph_slots import slots_in

        return replace(self, slots=slots_in(path))

    def reading(self, filled: Mapping[str, Any]) -> _OnnxAdapter:
        """With what each input is, see `read.FilledSlot`."""
        return replace(self, filled=filled)

    def detect(self, path: Path) -> bool:
        """A file with the identifier ``TORT`` behind its first four bytes."""
        return is_onnx_adapter(path)

    def read(self, path: Path) -> Adapter:
        """See `read.read_onnx_adapter`."""
        from surgery_formats.adapters.onnx_adapter.read import read_onnx_adapter

        return read_onnx_adapter(path, self.filled)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_onnx_adapter`."""
        from surgery_formats.adapters.onnx_adapter.write import render_onnx_adapter

        return render_onnx_adapter(adapter, base, self.slots)


ONNX_ADAPTER = _OnnxAdapter()
