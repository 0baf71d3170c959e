# SPDX-License-Identifier: Apache-2.0
"""How a file spells each of its modules, as plain values: what is needed to write it again under its own keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery_formats.adapters.grammar.module import ModuleTensors
from surgery_formats.canonical.adapter import Adapter, Site

__all__ = ["Layout", "ModuleLayout"]

_FIELD = "layout"  # of an adapter's configuration


@dataclass(frozen=True, slots=True)
class ModuleLayout:
    """The spelling of one module.

    Attributes:
        stem: What stands before the leaf.
        leaves: Spellings by role, of the roles that the file has.
    """

    stem: str
    leaves: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Layout:
    """The spelling of a file.

    Attributes:
        modules: By component and path of the module.
    """

    modules: Mapping[str, ModuleLayout] = field(default_factory=dict)

    @classmethod
    def of(cls, modules: Iterable[ModuleTensors]) -> Layout:
        """The spelling of modules that were read."""
        return cls({module.name: ModuleLayout(module.stem, module.leaves) for module in modules})

    @classmethod
    def in_config(cls, config: Mapping[str, Any]) -> Layout:
        """The spelling in an adapter's configuration; empty if it has none."""
        stored = config.get(_FIELD, {})
        return cls({name: ModuleLayout(stem, leaves) for name, (stem, leaves) in stored.items()})

    def as_config(self) -> dict[str, Any]:
        """Plain values, for an adapter's configuration."""
        return {_FIELD: {name: [module.stem, dict(module.leaves)] for name, module in self.modules.items()}}

    @classmethod
    def joined(cls, adapters: Sequence[Adapter]) -> Layout:
        """The spelling of all modules of several files; the first file that has a module spells it."""
        modules: dict[str, ModuleLayout] = {}
        for adapter in adapters:
            modules = {**cls.in_config(adapter.config).modules, **modules}
        return cls(modules)

    def at(self, site: Site) -> ModuleLayout | None:
        """The spelling of the module of a site; None if no file had it."""
        return self.modules.get(f"{site.component}:{site.path.rpartition('.')[0]}")

    @property
    def usual(self) -> Mapping[str, str]:
        """The commonest spelling of each role, for modules that get other roles than they had."""
        counts: dict[str, Counter[str]] = {}
        for module in self.modules.values():
            for role, leaf in module.leaves.items():
                counts.setdefault(role, Counter())[leaf] += 1
        return {role: counted.most_common(1)[0][0] for role, counted in counts.items()}

    @property
    def has_alphas(self) -> bool:
        """Whether scales stand beside factors."""
        return any("alpha" in module.leaves for module in self.modules.values())
