# SPDX-License-Identifier: Apache-2.0
"""The role of each adapter in an export: merged into weights, in slots, or in front of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.inputs import AdaptersLike, as_weighted
from surgery.onnx.export.prompt_past import unique
from surgery_formats.errors import FitError
from surgery_formats.models.identity import fingerprint

if TYPE_CHECKING:
    from surgery_formats.canonical.adapter import Adapter
    from surgery_formats.canonical.inserted import InsertedModule
    from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["AdapterRoles", "NamedAdapter", "entry", "issues_of", "sort_adapters"]


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter and its name in the export.

    Attributes:
        name: From its file, and unique.
        adapter: The adapter.
        weight: The weight it is merged with, or that its slots hold.
        modules: The modules that it inserts, unless it is merged.
    """

    name: str
    adapter: Adapter
    weight: float = 1.0
    modules: tuple[InsertedModule, ...] = ()

    @property
    def rest(self) -> Adapter:
        """The adapter without its modules: updates of weights."""
        out = frozenset().union(*(module.sites for module in self.modules))
        return self.adapter.only(site for site in self.adapter.updates if site not in out) if out else self.adapter


@dataclass(frozen=True, slots=True)
class AdapterRoles:
    """All adapters of an export by role, in the caller's order.

    Attributes:
        merge: Adapters merged into weights.
        swap: Adapters for slots.
        prefix: Soft prompts in front of the text.
        insert: Adapters whose modules become a part of the graph.
    """

    merge: tuple[NamedAdapter, ...] = ()
    swap: tuple[NamedAdapter, ...] = ()
    prefix: tuple[NamedAdapter, ...] = ()
    insert: tuple[NamedAdapter, ...] = ()

    @property
    def named(self) -> tuple[NamedAdapter, ...]:
        """All adapters with their names, role by role."""
        return (*self.merge, *self.swap, *self.prefix, *self.insert)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All adapters."""
        return tuple(named.adapter for named in self.named)

    @property
    def merged(self) -> list[tuple[Adapter, float]]:
        """The adapters that change weights, with their weights: merged ones, and heads and LoRAs trained beside others."""
        heads = [
            replace(adapter, prompt=None, tensors=tuple(t for t in adapter.tensors if t is not adapter.prompt.table))
            for adapter in (named.adapter for named in self.prefix)
            if adapter.prompt is not None and adapter.updates
        ]
        heads += [rest for rest in (named.rest for named in self.insert) if rest.updates]
        return [*((named.adapter, named.weight) for named in self.merge), *((head, 1.0) for head in heads)]


def sort_adapters(
    adapters: AdaptersLike = (),
    merge: AdaptersLike = (),
    swap: AdaptersLike = (),
    prefix: AdaptersLike = (),
) -> AdapterRoles:
    """Read all adapters and assign their roles.

    Args:
        adapters: Adapters whose kind decides: soft prompts go in front, bottlenecks are inserted, all others are merged.
        merge: Adapters to merge, with weights.
        swap: Adapters for slots, with weights.
        prefix: Adapters in front of the text.

    Raises:
        InputError: an adapter cannot be read.
        FitError: a weight for an adapter that is neither merged nor in slots.
    """
    from surgery_formats.adapters.registry import inserted_modules

    roles: dict[str, list[NamedAdapter]] = {"merged": [], "swappable": [], "prefix": [], "inserted": []}
    groups = (
        (adapters, "adapters", None),
        (merge, "merge", "merged"),
        (swap, "swap", "swappable"),
        (prefix, "prefix", "prefix"),
    )
    names: set[str] = set()
    for weighted, role in [(item, role) for group, name, role in groups if group for item in as_weighted(group, name)]:
        adapter, weight = weighted.adapter, weighted.weight
        modules = () if role == "merged" else inserted_modules(adapter)
        chosen = role or ("prefix" if adapter.prompt is not None else "inserted" if modules else "merged")
        if chosen not in ("merged", "swappable") and weight != 1.0:
            raise FitError(
                f"has the weight {weight:g} but is neither merged nor in slots",
                file=adapter.path,
                hint="`merge=` or `swap=`",
            )
        name = unique(names, _name(adapter.path))
        names.add(name)
        roles[chosen].append(NamedAdapter(name, adapter, weight, modules))
    return AdapterRoles(*(tuple(roles[role]) for role in ("merged", "swappable", "prefix", "inserted")))


def _name(path: Path) -> str:
    """``adapters/sql/adapter_model.safetensors`` -> ``sql``; only letters, digits and ``._-``."""
    from surgery_formats.adapters.registry import is_adapter_file

    resolved = path.resolve()
    name = resolved.name if resolved.is_dir() else resolved.stem
    if not resolved.is_dir() and (name == "model" or is_adapter_file(resolved.name)):  # as many others are called
        name = resolved.parent.name
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name).lstrip(".") or "adapter"


def entry(named: NamedAdapter, mode: str, **fields: Any) -> dict[str, Any]:
    """The entry of an adapter in the contract and the manifest; without paths."""
    files = sorted({fingerprint(file) for file in named.adapter.files})
    digest = files[0] if len(files) == 1 else hashlib.sha256("".join(files).encode()).hexdigest()
    return {"name": named.name, "mode": mode, "kind": named.adapter.kind_name, "id": digest, **fields}


def issues_of(adapters: Iterable[NamedAdapter], checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the user should know of adapters for a base, adapter by adapter: issues of their own, and another base's name."""
    from surgery_formats.binding.bind import warn_of_other_base

    return tuple(
        text
        for named in adapters
        for text in (*named.adapter.known_issues(), *warn_of_other_base([named.adapter], checkpoint))
    )
