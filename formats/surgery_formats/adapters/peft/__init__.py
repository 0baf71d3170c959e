# SPDX-License-Identifier: Apache-2.0
"""Hugging Face PEFT: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery_formats.adapters.peft.keys import WEIGHTS
from surgery_formats.adapters.peft.lone_weights import holds_lone_weights
from surgery_formats.files.places import exists, is_folder
from surgery_formats.files.raw import first_bytes

if TYPE_CHECKING:
    from surgery_formats.adapters.format import Rendering, Scaling
    from surgery_formats.canonical.adapter import Adapter, Site
    from surgery_formats.models.checkpoint import Checkpoint
    from surgery_formats.updates import Update

__all__ = ["PEFT"]


@dataclass(frozen=True, slots=True)
class _Peft:
    """The format.

    Attributes:
        scaling: How ranks and scales are stated; None keeps an adapter's own way.
        dialect: Name of the way in which experts are held (`dialects`); empty for the nearest to an adapter's own.
        alpha: For weights without a configuration; None where they have one.
    """

    name: str = "peft"
    title: str = (
        "Hugging Face PEFT folder: LoRA, DoRA, and every other kind that can merge; trained tokens, soft prompts"
    )
    needs_base: bool = False
    single_file: bool = False
    file_stems: tuple[str, ...] = (f"{WEIGHTS}*",)
    scaling: Scaling | None = None
    dialect: str = ""
    alpha: float | None = None

    def detect(self, path: Path) -> bool:
        """A folder whose adapter_config.json mentions a peft_type, or PEFT's weights, with or without it."""
        config = path / "adapter_config.json"
        head = first_bytes(config, 1 << 20)
        if head is not None:
            return b'"peft_type"' in head or any(path.glob(f"{WEIGHTS}*"))
        if is_folder(path) and exists(config):
            return True  # a pipe of that name: the reader refuses it by name
        return holds_lone_weights(path)

    def with_alpha(self, alpha: float) -> _Peft:
        """The same format, reading weights without a configuration with this alpha."""
        return replace(self, alpha=alpha)

    def read(self, path: Path) -> Adapter:
        """See `read_peft` and `read_unconfigured`."""
        if holds_lone_weights(path):
            from surgery_formats.adapters.peft.unconfigured import read_unconfigured

            return read_unconfigured(path, self.alpha)
        from surgery_formats.adapters.peft.read import read_peft

        return read_peft(path, self.alpha)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `render_peft`."""
        from surgery_formats.adapters.peft.write import render_peft

        if not self.dialect:
            return render_peft(adapter, base, self.scaling)
        from surgery_formats.adapters.peft.dialects import dialect_named

        return render_peft(adapter, base, self.scaling, dialect_named(self.dialect))

    @property
    def dialects(self) -> tuple[str, ...]:
        """See `peft.dialects`."""
        from surgery_formats.adapters.peft.dialects import BUILT_IN

        return tuple(dialect.name for dialect in BUILT_IN)

    def with_dialect(self, name: str) -> _Peft:
        """The same format, holding experts as the dialect `name` does.

        Raises:
            NotFoundError: no such dialect.
        """
        from surgery_formats.adapters.peft.dialects import dialect_named

        return replace(self, dialect=dialect_named(name).name)

    def with_scaling(self, scaling: Scaling) -> _Peft:
        """The same format, stating ranks and scales as `scaling` says."""
        return replace(self, scaling=scaling)

    def described(self, adapter: Adapter) -> Adapter:
        """See `write.described`."""
        from surgery_formats.adapters.peft.write import described

        return described(adapter, self.scaling)

    def inherited(self, adapters: Sequence[Adapter], updates: Mapping[Site, tuple[Update, ...]]) -> Mapping[str, Any]:
        """See `write_config.inherited`."""
        from surgery_formats.adapters.peft.write_config import inherited

        return inherited(adapters, updates)


PEFT = _Peft()
