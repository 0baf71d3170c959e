# SPDX-License-Identifier: Apache-2.0
"""Hugging Face PEFT: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.peft.read import read_peft
from surgery_formats.adapters.peft.write import render_peft
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["PEFT"]


@dataclass(frozen=True, slots=True)
class _Peft:
    name: str = "peft"
    title: str = "Hugging Face PEFT folder: LoRA, DoRA, (IA)^3, LoHa, LoKr, OFT, VeRA, trained tokens, soft prompts"
    needs_base: bool = False
    single_file: bool = False

    def detect(self, path: Path) -> bool:
        """A folder whose adapter_config.json mentions a peft_type, or that holds PEFT's weights."""
        config = path / "adapter_config.json"
        if not config.is_file():
            return config.exists() and path.is_dir()  # a pipe of that name: the reader refuses it by name
        with open(config, "rb") as file:
            head = file.read(1 << 20)
        return b'"peft_type"' in head or (b"fine_tune_type" not in head and b"lora_parameters" not in head)

    def read(self, path: Path) -> Adapter:
        """See `read_peft`."""
        return read_peft(path)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `render_peft`."""
        return render_peft(adapter, base)


PEFT = _Peft()
