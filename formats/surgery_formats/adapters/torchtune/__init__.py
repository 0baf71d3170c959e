# SPDX-License-Identifier: Apache-2.0
"""torchtune's own file: ``adapter_model.pt`` of an epoch, ``adapter_0.pt`` before torchtune 0.5."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.grammar.files import file_keys
from surgery_formats.adapters.torchtune.files import KEY, own_file
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.files.places import is_file
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["TORCHTUNE"]


@dataclass(frozen=True, slots=True)
class _Torchtune:
    """The format.

    Attributes:
        alpha: For a file without a configuration; None where it has to have one.
    """

    name: str = "torchtune"
    title: str = "torchtune folder or adapter_model.pt: LoRA, DoRA in Meta's names and order of rows"
    needs_base: bool = True
    single_file: bool = False
    file_stems: tuple[str, ...] = ("adapter_model", "adapter_[0-9]*")
    alpha: float | None = None

    def detect(self, path: Path) -> bool:
        """A file with torchtune's keys alone, or a folder with one that has no PEFT weights."""
        file = own_file(path)
        names = file_keys(file) if file is not None and is_file(file) else {}
        return bool(names) and all(KEY.fullmatch(name) for name in names)

    def with_alpha(self, alpha: float) -> _Torchtune:
        """The same format, reading files without a configuration with this alpha."""
        return replace(self, alpha=alpha)

    def read(self, path: Path) -> Adapter:
        """See `read.read_torchtune`."""
        from surgery_formats.adapters.torchtune.read import read_torchtune

        return read_torchtune(path, self.alpha)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `write.render_torchtune`."""
        from surgery_formats.adapters.torchtune.write import render_torchtune

        return render_torchtune(adapter, base)


TORCHTUNE = _Torchtune()
