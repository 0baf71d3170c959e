# SPDX-License-Identifier: Apache-2.0
"""KerasHub: a ``.lora.h5`` of a backbone, with the preset's ``config.json`` beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.keras.files import own_file
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.containers.hdf5 import SIGNATURE
from surgery_formats.files.raw import first_bytes
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["KERAS"]


@dataclass(frozen=True, slots=True)
class _Keras:
    name: str = "keras"
    title: str = "KerasHub's .lora.h5: LoRA of Llama, Mistral, Gemma, Qwen, GPT-2 and BERT backbones"
    needs_base: bool = True
    single_file: bool = False
    file_stems: tuple[str, ...] = ("*.lora",)

    def detect(self, path: Path) -> bool:
        """An HDF5 file whose name ends in ``.lora.h5``, or a folder with one."""
        file = own_file(path)
        return file is not None and first_bytes(file, len(SIGNATURE)) == SIGNATURE

    def read(self, path: Path) -> Adapter:
        """See `read.read_keras`."""
        from surgery_formats.adapters.keras.read import read_keras

        return read_keras(path)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_keras`."""
        from surgery_formats.adapters.keras.write import render_keras

        return render_keras(adapter, base)


KERAS = _Keras()
