# SPDX-License-Identifier: Apache-2.0
"""LoRA files of kohya's sd-scripts, as A1111, ComfyUI and diffusers load them: one file, flattened module names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.kohya.prefixes import PREFIXES
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.containers.sharded import open_shards
from surgery_formats.containers.weight_files import is_weight_file
from surgery_formats.errors import SurgeryError
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["KOHYA"]

_MARKS = (*PREFIXES, "oft_unet_")


@dataclass(frozen=True, slots=True)
class _Kohya:
    name: str = "kohya"
    title: str = "kohya sd-scripts file (SD1, SD2, SDXL): LoRA, LoCon, DoRA, differences"
    needs_base: bool = True
    single_file: bool = True
    file_stems: tuple[str, ...] = ("pytorch_lora_weights",)

    def detect(self, path: Path) -> bool:
        """A file of weights with a key that begins like ``lora_unet_``."""
        if not os.path.isfile(path) or not is_weight_file(path.name):
            return False
        try:
            names = open_shards(path).tensors
        except SurgeryError:
            return False
        return any(name.startswith(_MARKS) for name in names)

    def read(self, path: Path) -> Adapter:
        """See `read.read_kohya`."""
        from surgery_formats.adapters.kohya.read import read_kohya

        return read_kohya(path)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_kohya`, which is imported only to write."""
        from surgery_formats.adapters.kohya.write import render_kohya

        return render_kohya(adapter, base)


KOHYA = _Kohya()
