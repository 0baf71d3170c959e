# SPDX-License-Identifier: Apache-2.0
"""Microsoft's loralib: a torch file with the ``lora_A`` and ``lora_B`` of a model, and nothing that states their scale."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.grammar.files import keys_at, weights_at
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.containers.torch import TORCH
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["LORALIB"]

_KEY = re.compile(r"(?!.*\.loras\.)(?:.+\.)?(?:lora_A|lora_B|bias)")


@dataclass(frozen=True, slots=True)
class _Loralib:
    """The format.

    Attributes:
        alpha: What all layers were trained with; None until it is told.
    """

    name: str = "loralib"
    title: str = "loralib's torch file: LoRA, biases; its alpha has to be told"
    needs_base: bool = False
    single_file: bool = True
    file_stems: tuple[str, ...] = ()
    alpha: float | None = None

    def detect(self, path: Path) -> bool:
        """A torch file with the factors of layers, without ``.weight``, and at most biases beside them."""
        file = weights_at(path)
        if file is None or not file.name.endswith(TORCH.suffixes):
            return False
        names = keys_at(path)
        return any(name.endswith(".lora_A") for name in names) and all(_KEY.fullmatch(name) for name in names)

    def with_alpha(self, alpha: float) -> _Loralib:
        """The same format, reading with this alpha."""
        return replace(self, alpha=float(alpha))

    def read(self, path: Path) -> Adapter:
        """See `read.read_loralib`."""
        from surgery_formats.adapters.loralib.read import read_loralib

        return read_loralib(path, self.alpha)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_loralib`."""
        from surgery_formats.adapters.loralib.write import render_loralib

        return render_loralib(adapter, base, self.alpha)


LORALIB = _Loralib()
