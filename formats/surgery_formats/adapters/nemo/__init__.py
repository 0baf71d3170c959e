# SPDX-License-Identifier: Apache-2.0
"""NeMo 1.x: a ``.nemo`` archive with the LoRA of a decoder, read only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from surgery_formats.adapters.format import Rendering
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.containers.tar import is_tar
from surgery_formats.files.raw import first_bytes
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["NEMO"]


@dataclass(frozen=True, slots=True)
class _Nemo:
    """The format.

    Attributes:
        only_read: Why it is not written.
        alpha: For an archive that does not tell it in numbers.
    """

    name: str = "nemo"
    title: str = "NeMo's .nemo of a LoRA: models with Llama's names, fused and canonical"
    needs_base: bool = False
    single_file: bool = True
    file_stems: tuple[str, ...] = ()
    only_read: str = "a .nemo describes its whole model"
    alpha: float | None = None

    def detect(self, path: Path) -> bool:
        """An archive whose name ends in ``.nemo``; what is in it is said by `read`."""
        return path.name.endswith(".nemo") and (is_tar(path) or first_bytes(path, 2) == b"\x1f\x8b")

    def with_alpha(self, alpha: float) -> _Nemo:
        """The same format, reading archives that state no alpha in numbers with this one."""
        return replace(self, alpha=alpha)

    def read(self, path: Path) -> Adapter:
        """See `read.read_nemo`."""
        from surgery_formats.adapters.nemo.read import read_nemo

        return read_nemo(path, self.alpha)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """Nothing: an archive describes the whole model, down to the program that trains it."""
        from surgery_formats.adapters.writing import nothing_written

        return nothing_written("adapter.nemo", adapter, self.only_read)


NEMO = _Nemo()
