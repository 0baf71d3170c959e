# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM: a folder with ``model.lora_weights.npy`` and ``model.lora_config.npy``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.tensorrt_llm.files import CONFIG_FILE, TENSOR_FILE, own_folder
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.containers.npy import MAGIC
from surgery_formats.files.raw import first_bytes
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["TENSORRT_LLM"]


@dataclass(frozen=True, slots=True)
class _TensorrtLlm:
    name: str = "tensorrt-llm"
    title: str = "TensorRT-LLM folder (model.lora_weights.npy): LoRA of blocks with Llama's names; DoRA is read"
    needs_base: bool = True
    single_file: bool = False
    file_stems: tuple[str, ...] = ("model.lora_weights",)

    def detect(self, path: Path) -> bool:
        """A folder with both arrays, or one of them beside the other."""
        return all(first_bytes(own_folder(path) / name, len(MAGIC)) == MAGIC for name in (TENSOR_FILE, CONFIG_FILE))

    def read(self, path: Path) -> Adapter:
        """See `read.read_tensorrt_llm`."""
        from surgery_formats.adapters.tensorrt_llm.read import read_tensorrt_llm

        return read_tensorrt_llm(path)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_tensorrt_llm`."""
        from surgery_formats.adapters.tensorrt_llm.write import render_tensorrt_llm

        return render_tensorrt_llm(adapter, base)


TENSORRT_LLM = _TensorrtLlm()
