# SPDX-License-Identifier: Apache-2.0
"""Which adapter goes where in an export: merged into weights, into slots, or in front of the text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.inputs import AdaptersLike, as_weighted
from surgery.onnx.export.prompts import unique
from surgery_formats.errors import FitError
from surgery_formats.models.identity import fingerprint

if TYPE_CHECKING:
    from surgery_formats.canonical.adapter import Adapter

__all__ = ["AdapterRoles", "Named", "entry", "sort_adapters"]

_GENERIC = frozenset(
    {"adapter_model", "adapters", "pytorch_lora_weights", "model"}
)  # names that every adapter's file has


@dataclass(frozen=True, slots=True)
class Named:
    """An adapter and what it is called in the export.

    Attributes:
        name: Of its file, unlike all others.
        adapter: The adapter.
        weight: It is merged with.
    """

    name: str
    adapter: Adapter
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class AdapterRoles:
    """All adapters of an export, by where they go; the order is the caller's.

    Attributes:
        merge: Into weights.
        swap: Into slots.
        prefix: In front of the text.
    """

    merge: tuple[Named, ...] = ()
    swap: tuple[Named, ...] = ()
    prefix: tuple[Named, ...] = ()

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All of them."""
        return tuple(one.adapter for one in (*self.merge, *self.swap, *self.prefix))

    @property
    def merged(self) -> list[tuple[Adapter, float]]:
        """What changes weights: merged adapters, and the heads that were trained beside soft prompts."""
        heads = [
            replace(one, prompt=None, tensors=tuple(tensor for tensor in one.tensors if tensor is not one.prompt.table))
            for one in (named.adapter for named in self.prefix)
            if one.prompt is not None and one.updates
        ]
        return [*((one.adapter, one.weight) for one in self.merge), *((one, 1.0) for one in heads)]


def sort_adapters(
    adapters: AdaptersLike = (),
    merge: AdaptersLike = (),
    swap: AdaptersLike = (),
    prefix: AdaptersLike = (),
) -> AdapterRoles:
    """Read all adapters.

    Args:
        adapters: To be placed by kind: a soft prompt goes in front, all else is merged.
        merge: To merge, with weights.
        swap: For slots.
        prefix: In front.

    Raises:
        InputError: one cannot be read.
        FitError: a weight where none is of use.
    """
    placed: dict[str, list[Named]] = {"merged": [], "swappable": [], "prefix": []}
    roles = (
        (adapters, "adapters", None),
        (merge, "merge", "merged"),
        (swap, "swap", "swappable"),
        (prefix, "prefix", "prefix"),
    )
    names: set[str] = set()
    for weighted, role in [(one, role) for given, name, role in roles if given for one in as_weighted(given, name)]:
        adapter, weight = weighted.adapter, weighted.weight
        place = role or ("prefix" if adapter.prompt is not None else "merged")
        if place != "merged" and weight != 1.0:
            raise FitError(
                f"a weight of {weight:g} for what is not merged", file=adapter.path, hint="merge it: --merge"
            )
        name = unique(names, _name(adapter.path))
        names.add(name)
        placed[place].append(Named(name, adapter, weight))
    return AdapterRoles(tuple(placed["merged"]), tuple(placed["swappable"]), tuple(placed["prefix"]))


def _name(path: Path) -> str:
    """``adapters/sql/adapter_model.safetensors`` -> ``sql``; only letters, digits and ``._-``."""
    whole = path.resolve()
    name = whole.name if whole.is_dir() else whole.stem
    if not whole.is_dir() and name in _GENERIC:
        name = whole.parent.name
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name).lstrip(".") or "adapter"


def entry(one: Named, mode: str, **more: Any) -> dict[str, Any]:
    """What the contract and the manifest say of an adapter; no paths."""
    files = sorted({fingerprint(file) for file in one.adapter.files})
    digest = files[0] if len(files) == 1 else hashlib.sha256("".join(files).encode()).hexdigest()
    return {"name": one.name, "mode": mode, "kind": one.adapter.kind, "id": digest, **more}
