# SPDX-License-Identifier: Apache-2.0
"""Compact: surgery's own folder format, with LoRA factors stored as 8-bit or 4-bit codes (docs/compact.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from surgery_formats.adapters.compact.files import CONFIG_FILE, MARK
from surgery_formats.adapters.format import Rendering
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError
from surgery_formats.files.raw import first_bytes
from surgery_formats.linalg.coding import CODINGS, Coding
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing, show

__all__ = ["COMPACT"]


@dataclass(frozen=True, slots=True)
class _Compact:
    name: str = "compact"
    title: str = "compact folder: factors as int8 or int4 codes, everything else as it was"
    needs_base: bool = False
    single_file: bool = False
    file_stems: tuple[str, ...] = ("adapter",)
    coding: Coding = CODINGS["int8"]

    def detect(self, path: Path) -> bool:
        """A folder whose compact.json says it is one."""
        return MARK.encode() in (first_bytes(path / CONFIG_FILE, 1 << 12) or b"")

    def read(self, path: Path) -> Adapter:
        """See `read.read_compact`."""
        from surgery_formats.adapters.compact.read import read_compact

        return read_compact(path)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_compact`, which is imported only to write; a base is not needed."""
        from surgery_formats.adapters.compact.write import render_compact

        return render_compact(adapter, self.coding)

    def with_factors(self, factors: str) -> _Compact:
        """The same format with other codes."""
        if factors not in CODINGS:
            raise FitError(f"no type of factors '{show(factors, 40)}'", hint=f"there are {listing(CODINGS)}")
        return replace(self, coding=CODINGS[factors])


COMPACT = _Compact()
