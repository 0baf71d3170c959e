# SPDX-License-Identifier: Apache-2.0
"""How a file spells each of its modules, as plain values: what is needed to write it again under its own keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery_formats.adapters.grammar.module import ModuleTensors
from surgery_formats.canonical.adapter import Adapter, Site

__all__ = ["ModuleSpelling", "SpeltModules"]


@dataclass(frozen=True, slots=True)
class ModuleSpelling:
    """The spelling of one module.

    Attributes:
        stem: What stands before the leaf.
        leaves: Spellings by role, of the roles that the file has.
    """

    stem: str
    leaves: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SpeltModules:
    """The spelling of a file.

    Attributes:
        modules: By component and path of the module.
    """

    modules: Mapping[str, ModuleSpelling] = field(default_factory=dict)

    @classmethod
    def of(cls, modules: Iterable[ModuleTensors]) -> SpeltModules:
        """The spelling of modules that were read."""
        return cls({module.name: ModuleSpelling(module.stem, module.leaves) for module in modules})

    @classmethod
    def in_adapter(cls, adapter: Adapter, format: str) -> SpeltModules:
        """The spelling of an adapter's modules in files of a format; empty if none was read from one."""
        stored = adapter.spelling.get(format, {})
        return cls({name: ModuleSpelling(stem, leaves) for name, (stem, leaves) in stored.items()})

    def as_values(self) -> dict[str, Any]:
        """Plain values, for `Adapter.spelling`."""
        return {name: [module.stem, dict(module.leaves)] for name, module in self.modules.items()}

    @classmethod
    def joined(cls, adapters: Sequence[Adapter], format: str) -> SpeltModules:
        """The spelling of all modules of several adapters; the first that has a module spells it."""
        modules: dict[str, ModuleSpelling] = {}
        for adapter in adapters:
            modules = {**cls.in_adapter(adapter, format).modules, **modules}
        return cls(modules)

    def at(self, site: Site) -> ModuleSpelling | None:
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
