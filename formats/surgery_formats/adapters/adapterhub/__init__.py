# SPDX-License-Identifier: Apache-2.0
"""AdapterHub's library ``adapters`` (before: adapter-transformers): a folder with adapter_config.json and pytorch_adapter.bin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery_formats.adapters.adapterhub.files import CONFIG_FILE, WEIGHT_FILES
from surgery_formats.files.places import is_file
from surgery_formats.files.raw import first_bytes

if TYPE_CHECKING:
    from surgery_formats.adapters.format import Rendering
    from surgery_formats.canonical.adapter import Adapter
    from surgery_formats.canonical.inserted import InsertedModule
    from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["ADAPTERHUB"]


@dataclass(frozen=True, slots=True)
class _AdapterHub:
    name: str = "adapterhub"
    title: str = "AdapterHub folder: LoRA, DoRA, (IA)^3, VeRA; bottlenecks for graphs; prefixes and prompts are shown"
    needs_base: bool = False
    single_file: bool = False
    file_stems: tuple[str, ...] = ("pytorch_adapter", "adapter", "pytorch_model_head", "model_head")

    def detect(self, path: Path) -> bool:
        """A folder with one of its weight files, whose adapter_config.json has a ``config`` and no peft_type."""
        head = first_bytes(path / CONFIG_FILE, 1 << 20) or b""
        if b'"config"' not in head or b'"peft_type"' in head:
            return False
        return any(is_file(path / name) for name in WEIGHT_FILES)

    def read(self, path: Path) -> Adapter:
        """See `read.read_adapterhub`."""
        from surgery_formats.adapters.adapterhub.read import read_adapterhub

        return read_adapterhub(path)

    def inserted(self, adapter: Adapter) -> tuple[InsertedModule, ...]:
        """See `inserted.inserted_modules`, which is imported only for an adapter with modules of its own."""
        if not adapter.unmergeable:
            return ()
        from surgery_formats.adapters.adapterhub.inserted import inserted_modules

        return inserted_modules(adapter)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_adapterhub`, which is imported only to write."""
        from surgery_formats.adapters.adapterhub.write import render_adapterhub

        return render_adapterhub(adapter, base)


ADAPTERHUB = _AdapterHub()
