# SPDX-License-Identifier: Apache-2.0
"""An adapter in the parts that programs tell apart. Only headers are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from surgery.algebra.group import applicable_updates
from surgery.consumers.part import AdapterPart
from surgery.consumers.parts_of_folder import parts_of_folder
from surgery.consumers.parts_of_updates import parts_of_updates
from surgery.engine.input_checks import check_base_id
from surgery_formats.adapters.peft.recognise import dialect_of
from surgery_formats.binding.bind import bind
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.consumption import check_consumed
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.eras import expert_counts
from surgery_formats.models.families.denoisers import COMPONENTS, denoiser_of
from surgery_formats.updates import Update

__all__ = ["AdapterFacts", "bound_facts", "facts_of", "lacks_experts"]

_EXPERTS = ".experts."
_PROJECTIONS = 3  # of an expert: gate, up, down; unless the base stores others


@dataclass(frozen=True)
class AdapterFacts:
    """What rules look at.

    Attributes:
        adapter: The adapter.
        base: The model it belongs to.
        parts: Every update, field and file that a program may treat in a way of its own.
        updates: Its updates with the sizes that the base tells, without optional ones that it lacks.
        greatest_rank: What the program was started with; None if nothing was said.
    """

    adapter: Adapter
    base: Checkpoint
    parts: tuple[AdapterPart, ...]
    updates: Mapping[Site, tuple[Update, ...]]
    greatest_rank: int | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The adapter's own configuration."""
        return self.adapter.config

    @cached_property
    def dialect(self) -> str:
        """How a PEFT folder holds experts, see `surgery_formats.adapters.peft.dialects`; empty without any."""
        found = dialect_of(self.adapter)
        return "" if found is None else found.name

    @property
    def main(self) -> Component:
        """The base, or the first part of a pipeline: what rules about language models look at."""
        return next(iter(self.base.components.values()))

    @cached_property
    def model_type(self) -> str:
        """Of the base's language model."""
        config = self.main.config
        nested = config.get("text_config")
        return str((nested if isinstance(nested, Mapping) else config).get("model_type", ""))

    @cached_property
    def denoiser(self) -> str:
        """Family of the denoiser, by the adapter's names or, where it is of a text encoder alone, by the base's; or nothing."""
        if self.adapter.provenance.family:
            return self.adapter.provenance.family
        networks = [component for name, component in self.base.components.items() if name in (*COMPONENTS, "")]
        found = denoiser_of(path.rpartition(".")[0] for network in networks for path in network.parameters)
        return "" if found is None else found.name

    @cached_property
    def incomplete_layers(self) -> frozenset[str]:
        """Paths of layers with LoRAs of single experts, and not of all projections of all experts."""
        trained, stored = _by_layer(self.modules), _by_layer(self.main.parameters)
        count = max(expert_counts(self.main.config), default=0)
        lacking = set()
        for layer, paths in trained.items():
            numbers = {path.partition(".")[0] for path in paths}
            own = [name for name in stored.get(layer, ()) if name.startswith("0.") and name.endswith(".weight")]
            if len(numbers) < count or len(paths) < (len(own) or _PROJECTIONS) * len(numbers):
                lacking.add(layer)
        return frozenset(lacking)

    @cached_property
    def _class_modules(self) -> frozenset[str]:
        """Paths of the modules in the model's code."""
        live = self.main.names.eras.live
        return frozenset(live(name).rpartition(".")[0] for name in self.main.parameters)

    def is_renamed_again(self, part: AdapterPart) -> bool:
        """Whether a program that renames a file's factors, as if they had names on disk, would miss this LoRA."""
        if part.scale is None:
            return False
        stack = part.trait == "LoRA of stacked experts"
        module = part.module.rpartition(".")[0] if stack else part.module
        return module in self._class_modules and self.main.names.misses_factors(module)

    @cached_property
    def modules(self) -> frozenset[str]:
        """Paths of the modules with a LoRA."""
        return frozenset(part.module for part in self.parts if part.scale is not None)


def lacks_experts(part: AdapterPart, facts: AdapterFacts) -> bool:
    """Whether its layer has LoRAs of single experts, and not of all projections of all experts."""
    return part.module.partition(_EXPERTS)[0] in facts.incomplete_layers


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of single experts' modules or parameters, from the expert's number on, by the path of their layer."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layer, found, rest = name.partition(_EXPERTS)
        if found and rest.partition(".")[0].isdecimal():
            layers.setdefault(layer, []).append(rest)
    return layers


def facts_of(adapter: Adapter, base: Checkpoint, greatest_rank: int | None = None) -> AdapterFacts:
    """Take an adapter apart."""
    updates = applicable_updates(adapter, base)
    parts = [*parts_of_updates(adapter, base, updates)]
    if adapter.prompt is not None:
        parts.append(AdapterPart(adapter.prompt.table.name, "virtual tokens", adapter.kind))
    if adapter.format == "peft":
        parts += parts_of_folder(adapter, base)
    return AdapterFacts(adapter, base, tuple(parts), updates, greatest_rank)


def bound_facts(
    adapter: Adapter, base: Checkpoint, greatest_rank: int | None = None
) -> tuple[AdapterFacts, tuple[str, ...]]:
    """An adapter that was found to belong to a base, taken apart, and what binding it warns of.

    Biases of layers that have none in the base are no fault here: rules speak of them.

    Raises:
        FitError: tensors that no update uses, or a base that the adapter was not made for.
    """
    check_consumed(adapter)
    warnings = adapter.known_issues()
    if adapter.updates:
        warnings = bind([(adapter, 1.0)], base, new_biases=True).warnings
        check_base_id(base, [adapter])
    return facts_of(adapter, base, greatest_rank), warnings
