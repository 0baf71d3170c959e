# SPDX-License-Identifier: Apache-2.0
"""litgpt's folder: ``lit_model.pth.lora`` with ``hyperparameters.yaml`` and ``model_config.yaml`` beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.litgpt.files import own_file
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.containers.torch import TORCH
from surgery_formats.files.places import is_file
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["LITGPT"]


@dataclass(frozen=True, slots=True)
class _Litgpt:
    """The format.

    Attributes:
        alpha: For a file without hyperparameters.yaml; None where it has to have one.
    """

    name: str = "litgpt"
    title: str = "litgpt folder (lit_model.pth.lora): LoRA of models with Llama's names, one matrix for q, k and v"
    needs_base: bool = True
    single_file: bool = False
    file_stems: tuple[str, ...] = ("lit_model",)
    alpha: float | None = None

    def detect(self, path: Path) -> bool:
        """A torch file whose name ends in ``.pth.lora``, or a folder with ``lit_model.pth.lora``."""
        file = own_file(path)
        return file is not None and is_file(file) and TORCH.detect(file)

    def with_alpha(self, alpha: float) -> _Litgpt:
        """The same format, reading files without hyperparameters.yaml with this alpha."""
        return replace(self, alpha=alpha)

    def read(self, path: Path) -> Adapter:
        """See `read.read_litgpt`."""
        from surgery_formats.adapters.litgpt.read import read_litgpt

        return read_litgpt(path, self.alpha)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_litgpt`."""
        from surgery_formats.adapters.litgpt.write import render_litgpt

        return render_litgpt(adapter, base)


LITGPT = _Litgpt()
