# SPDX-License-Identifier: Apache-2.0
"""MLX-LM: a folder with adapters.safetensors and adapter_config.json."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.mlx.files import TENSOR_FILE
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.files.raw import first_bytes
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["MLX"]


@dataclass(frozen=True, slots=True)
class _Mlx:
    name: str = "mlx"
    title: str = "MLX-LM folder: LoRA, DoRA, stacked experts, full layers"
    needs_base: bool = False
    single_file: bool = False
    file_stems: tuple[str, ...] = ("adapters", "*_adapters")

    def detect(self, path: Path) -> bool:
        """A folder whose adapter_config.json speaks mlx-lm's language, or with mlx-lm's file names."""
        head = first_bytes(path / "adapter_config.json", 1 << 20) or b""
        speaks = b'"fine_tune_type"' in head or b'"lora_parameters"' in head
        return speaks or any(os.path.isfile(path / name) for name in (TENSOR_FILE, "adapters.npz"))

    def read(self, path: Path) -> Adapter:
        """See `read.read_mlx`."""
        from surgery_formats.adapters.mlx.read import read_mlx

        return read_mlx(path)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_mlx`, which is imported only to write."""
        from surgery_formats.adapters.mlx.write import render_mlx

        return render_mlx(adapter, base)


MLX = _Mlx()
