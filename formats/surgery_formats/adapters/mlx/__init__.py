# SPDX-License-Identifier: Apache-2.0
"""MLX-LM: a folder with adapters.safetensors and adapter_config.json, or an older adapters.npz."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.mlx.files import OLD_FILE, TENSOR_FILE, is_old_file
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.files.places import is_file
from surgery_formats.files.raw import first_bytes
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["MLX"]


@dataclass(frozen=True, slots=True)
class _Mlx:
    """The format.

    Attributes:
        alpha: The scale of files that do not state it; None where they have to.
    """

    name: str = "mlx"
    title: str = "MLX-LM folder: LoRA, DoRA, stacked experts, full layers"
    needs_base: bool = False
    single_file: bool = False
    file_stems: tuple[str, ...] = ("adapters", "*_adapters")
    alpha: float | None = None

    def detect(self, path: Path) -> bool:
        """A folder whose adapter_config.json speaks mlx-lm's language, or with mlx-lm's file names; an older file."""
        if is_old_file(path):
            return True
        head = first_bytes(path / "adapter_config.json", 1 << 20) or b""
        speaks = b'"fine_tune_type"' in head or b'"lora_parameters"' in head
        return speaks or any(is_file(path / name) for name in (TENSOR_FILE, OLD_FILE))

    def with_alpha(self, alpha: float) -> _Mlx:
        """The same format, reading files that state no scale with this one: MLX's alpha is not divided by the rank."""
        return replace(self, alpha=alpha)

    def read(self, path: Path) -> Adapter:
        """See `read.read_mlx`."""
        from surgery_formats.adapters.mlx.read import read_mlx

        return read_mlx(path, self.alpha)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_mlx`, which is imported only to write."""
        from surgery_formats.adapters.mlx.write import render_mlx

        return render_mlx(adapter, base)


MLX = _Mlx()
