# SPDX-License-Identifier: Apache-2.0
"""Files of kohya's sd-scripts and all who follow it (A1111, musubi-tuner, OneTrainer, LyCORIS): flattened module names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery_formats.adapters.grammar.files import keys_at
from surgery_formats.adapters.kohya.dialect import DIALECT

if TYPE_CHECKING:
    from surgery_formats.adapters.format import Rendering
    from surgery_formats.canonical.adapter import Adapter
    from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["KOHYA"]


@dataclass(frozen=True, slots=True)
class _Kohya:
    name: str = DIALECT.name
    title: str = (
        "kohya sd-scripts file (and musubi-tuner, OneTrainer, LyCORIS): LoRA, DoRA, LyCORIS' kinds, differences"
    )
    needs_base: bool = True
    single_file: bool = True
    file_stems: tuple[str, ...] = ("pytorch_lora_weights",)

    def detect(self, path: Path) -> bool:
        """A file of weights with a key that begins like ``lora_unet_``."""
        names = keys_at(path)
        return bool(names) and DIALECT.claims(names.keys())

    def read(self, path: Path) -> Adapter:
        """See `surgery_formats.adapters.grammar.reader.read_weight_file`."""
        from surgery_formats.adapters.grammar.reader import read_weight_file

        return read_weight_file(path, DIALECT)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_kohya`, which is imported only to write."""
        from surgery_formats.adapters.kohya.write import render_kohya

        return render_kohya(adapter, base)

    def spelt_as(self, adapters: Sequence[Adapter]) -> Mapping[str, Any]:
        """The spelling of all modules of `adapters`, for what was made from them."""
        from surgery_formats.adapters.grammar.spelt_modules import SpeltModules

        return SpeltModules.joined(adapters, self.name).as_values()


KOHYA = _Kohya()
