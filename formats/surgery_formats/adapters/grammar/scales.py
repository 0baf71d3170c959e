# SPDX-License-Identifier: Apache-2.0
"""Where the scale of a module's factors comes from: a tensor beside them, the header, or nowhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery_formats.adapters.grammar.header import configs_of
from surgery_formats.adapters.grammar.module import ModuleTensors, malformed
from surgery_formats.adapters.grammar.scalars import scalar
from surgery_formats.adapters.grammar.training import stated_dims
from surgery_formats.canonical.provenance import ScaleSource
from surgery_formats.models.families.denoisers import COMPONENTS
from surgery_formats.tensors.tensor import StoredTensor

if TYPE_CHECKING:
    from surgery_formats.adapters.peft.read_config import PeftConfig

__all__ = ["Scale", "StatedScales"]


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale of one module's factors.

    Attributes:
        value: What their product is multiplied by.
        alpha: As written; None where nothing is.
        source: Where it was read.
        noted: The tensor it was read from.
    """

    value: float
    alpha: float | None
    source: ScaleSource
    noted: tuple[StoredTensor, ...] = ()


@dataclass(frozen=True, slots=True)
class StatedScales:
    """The rules of one file.

    Attributes:
        configs: ``LoraConfig`` by component, of the header.
        trained: ``(dim, alpha)`` by the metadata of sd-scripts, where no module has an alpha of its own: of all modules,
            and of convolutions.
    """

    configs: Mapping[str, PeftConfig]
    trained: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, metadata: Mapping[str, str], *, with_alphas: bool, path: Path) -> StatedScales:
        """The rules by a file's header.

        Args:
            metadata: Of the header.
            with_alphas: Whether some module has an alpha beside its factors: then the others mean their rank.
            path: The file, for errors.

        Raises:
            MalformedError, FitError: see `header.configs_of`.
        """
        return cls(configs_of(metadata, path), () if with_alphas else stated_dims(metadata))

    def of_module(self, module: ModuleTensors, rank: int, counted: int | None = None) -> Scale:
        """The scale of a module.

        Args:
            module: Its tensors.
            rank: Inner size of its factors.
            counted: The rank that alpha counts against, if that is another.

        Raises:
            MalformedError: an alpha of 0, or that is no number.
        """
        if stored := module.parts.get("scale"):  # of A1111, which takes it whatever alpha there is
            value = scalar(stored, "a scale")
            if value == 0 or not math.isfinite(value):
                raise malformed(stored, f"a scale of {value}")
            noted = tuple(module.parts[role] for role in ("alpha", "scale") if role in module.parts)
            return Scale(value, value * rank, "alpha", noted)
        if stored := module.parts.get("alpha"):
            value = scalar(stored)
            if value == 0 or not math.isfinite(value):
                raise malformed(stored, f"an alpha of {value}")
            against = counted or rank
            return Scale(value / against, value * rank / against, "alpha", (stored,))
        if config := self._config(module.component):
            alpha = config.alpha_of(module.path)
            config.check_rank(module.path, rank, next(iter(module.parts.values())))
            return Scale(config.scale_of(module.path, rank), alpha, "adapter metadata")
        for dim, alpha in self.trained:
            if dim == rank:
                return Scale(alpha / rank, alpha, "training metadata")
        return Scale(1.0, None, "rank")

    def _config(self, component: str) -> PeftConfig | None:
        if component in self.configs:
            return self.configs[component]
        others = [name for name in self.configs if name in COMPONENTS or not name]
        return self.configs[others[0]] if len(others) == 1 and component in (*COMPONENTS, "") else None
