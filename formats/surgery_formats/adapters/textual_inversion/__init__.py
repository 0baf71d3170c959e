# SPDX-License-Identifier: Apache-2.0
"""Textual inversions: rows of an embedding for one new token, as A1111 and ComfyUI have them, and as diffusers does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery_formats.adapters.textual_inversion.files import layout_at

if TYPE_CHECKING:
    from surgery_formats.adapters.format import Rendering
    from surgery_formats.canonical.adapter import Adapter
    from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["EMBEDDING", "LEARNED_EMBEDS"]


@dataclass(frozen=True, slots=True)
class _TextualInversion:
    name: str
    title: str
    needs_base: bool = False
    single_file: bool = True
    file_stems: tuple[str, ...] = ()

    def detect(self, path: Path) -> bool:
        """A file of the layout that bears this name."""
        return layout_at(path) == self.name

    def read(self, path: Path) -> Adapter:
        """See `read.read_textual_inversion`."""
        from surgery_formats.adapters.textual_inversion.read import read_textual_inversion

        return read_textual_inversion(path, self.name)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_textual_inversion`."""
        from surgery_formats.adapters.textual_inversion.write import render_textual_inversion

        return render_textual_inversion(adapter, self.name)


EMBEDDING = _TextualInversion("embedding", "textual inversion of A1111, ComfyUI and kohya: one token (.pt is read)")
LEARNED_EMBEDS = _TextualInversion(
    "learned-embeds", "textual inversion of diffusers: one token of one text encoder", file_stems=("learned_embeds",)
)
