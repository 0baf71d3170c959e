# SPDX-License-Identifier: Apache-2.0
"""A format whose adapters are one file of weights, made of a dialect: what most packages of formats hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.files import keys_at

if TYPE_CHECKING:
    from surgery_formats.adapters.format import Rendering
    from surgery_formats.canonical.adapter import Adapter
    from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["WeightFileFormat"]


@dataclass(frozen=True, slots=True)
class WeightFileFormat:
    """A format: `surgery_formats.adapters.format.Format`.

    Attributes:
        dialect: How it spells.
        title: One line for ``surgery formats``.
        needs_base: Whether names of other formats' adapters come from a base.
        file_stems: Names that its files have.
    """

    dialect: Dialect
    title: str
    needs_base: bool = False
    single_file: bool = True
    file_stems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The dialect's."""
        return self.dialect.name

    def detect(self, path: Path) -> bool:
        """A file of weights whose keys the dialect claims, or a folder with such a file and no model."""
        names = keys_at(path)
        return bool(names) and self.dialect.claims(names.keys())

    def read(self, path: Path) -> Adapter:
        """See `reader.read_weight_file`."""
        from surgery_formats.adapters.grammar.reader import read_weight_file

        return read_weight_file(path, self.dialect)

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """See `writer.render_weight_file`."""
        from surgery_formats.adapters.grammar.writer import render_weight_file

        return render_weight_file(adapter, base, self.dialect)

    def spelt_as(self, adapters: Sequence[Adapter]) -> Mapping[str, Any]:
        """The spelling of all modules of `adapters`, for what was made from them."""
        from surgery_formats.adapters.grammar.spelt_modules import SpeltModules

        return SpeltModules.joined(adapters, self.name).as_values()
