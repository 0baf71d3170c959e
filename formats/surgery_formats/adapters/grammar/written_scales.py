# SPDX-License-Identifier: Apache-2.0
"""Where a file that is written states its scales: beside factors, in its header, or nowhere, so that they are in the factors.

`scales` is the other way round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.header import ADAPTER_METADATA, header_of
from surgery_formats.adapters.grammar.leaves import LEAVES, longest_leaf
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.adapters.grammar.spelt_modules import SpeltModules
from surgery_formats.adapters.writing import commonest, restate, surviving_metadata
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.updates import LoRA, Update, low_rank_part

__all__ = ["StatedRanks", "WrittenScales", "factors_beside"]

StatedRanks = Mapping[str, Mapping[str, tuple[int, float]]]
"""Rank and alpha of modules that the header states, by component and path."""


@dataclass(frozen=True)
class WrittenScales:
    """The rules of one file.

    Attributes:
        adapter: What it holds.
        dialect: Its dialect, which decides for an adapter that was in no such file.
        spelt: How the modules were spelt in files of this format that the adapter came from.
    """

    adapter: Adapter
    dialect: Dialect
    spelt: SpeltModules

    @cached_property
    def with_alpha(self) -> bool:
        """Whether scales stand beside factors."""
        return self.spelt.has_alphas if self.spelt.modules else self.dialect.with_alpha

    @cached_property
    def in_header(self) -> bool:
        """Whether scales stand in the header."""
        if self.with_alpha:
            return False
        return ADAPTER_METADATA in self.adapter.metadata if self.spelt.modules else self.dialect.in_header

    @cached_property
    def trained(self) -> tuple[tuple[int, float], ...]:
        """Ranks, and the alphas that readers will take for them from the header, where no scale stands elsewhere."""
        if self.with_alpha or self.in_header:
            return ()
        metadata = surviving_metadata(self.adapter)
        self._restate_ranks(metadata)
        return StatedScales.of(metadata, with_alphas=False, path=self.adapter.path).trained

    def of_bias(self, site: Site) -> float:
        """What is multiplied into a bias beside factors when the file is read: their scale, if the file states it."""
        beside = factors_beside(self.adapter, site)
        return beside[0].scale if beside and (self.with_alpha or self.in_header) else 1.0

    def alpha_dtype(self, site: Site, update: Update) -> DType | None:
        """The type of a module's alpha, as its file had it; None if that had none."""
        own = self.spelt.at(site)
        if own is None:
            return DType.F32
        if "alpha" not in own.leaves:
            return None
        name = f"{own.stem}{own.leaves['alpha']}"
        return next((tensor.dtype for tensor in update.tensors if tensor.name == name), DType.F32)

    def metadata(self, names: Collection[str], ranks: StatedRanks) -> dict[str, str]:
        """What the file says of itself: what its sources said, with ranks and alphas as they are now.

        Args:
            names: Of its tensors.
            ranks: What its header has to state.
        """
        metadata = surviving_metadata(self.adapter, hashed=True)
        metadata.pop(ADAPTER_METADATA, None)
        if self.in_header:
            roles = {name: LEAVES.get(longest_leaf(name)) for name in names}
            biased, directed = (
                [owner for owner in ranks if any(roles[n] == role and n.startswith(f"{owner}.") for n in names)]
                for role in ("up_bias", "dora_scale")
            )
            metadata |= header_of(self.adapter.metadata, ranks, self.adapter.path, biased, directed)
        self._restate_ranks(metadata)
        if self.spelt.modules and "format" in self.adapter.metadata:
            metadata["format"] = self.adapter.metadata["format"]
        return metadata

    def _restate_ranks(self, metadata: dict[str, str]) -> None:
        """The numbers of sd-scripts as they are now. Where they state the scales, what is left of those is in the factors."""
        loras = [lora for chain in self.adapter.updates.values() for u in chain if (lora := low_rank_part(u))]
        if loras and "ss_network_dim" in metadata:
            restate(metadata, "ss_network_dim", commonest(lora.rank for lora in loras) or 0)
        if loras and "ss_network_alpha" in metadata and (self.with_alpha or self.in_header):
            restate(metadata, "ss_network_alpha", commonest(lora.scale * lora.rank for lora in loras) or 0.0)


def factors_beside(adapter: Adapter, site: Site) -> list[LoRA]:
    """The factors of the weight beside a bias."""
    weight = replace(site, path=f"{site.path.rpartition('.')[0]}.weight")
    return [lora for update in adapter.updates.get(weight, ()) if (lora := low_rank_part(update))]
