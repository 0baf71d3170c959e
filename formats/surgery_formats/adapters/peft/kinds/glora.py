# SPDX-License-Identifier: Apache-2.0
"""GLORA: five supports of a linear layer's weight and bias (PEFT 0.21, ``tuners/glora/layer.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import Factor, GLoRA, GLoRABias, Support, Update

__all__ = ["GLORA"]

_SHAPES = {0: "none", 1: "vector", 2: "lora"}


def _support(module: Module, name: str) -> Support:
    """One of the five, as a matrix of the weight or a column of the bias."""
    parts = {
        key: module.parts[f"glora_{name}.{key}"] for key in ("Xd", "Xu", "X") if f"glora_{name}.{key}" in module.parts
    }
    if "X" in parts and len(parts) == 1:
        stored = parts["X"]
        if not stored.numel or len(stored.shape) > 2 or stored.shape[1:] not in ((), (1,)):
            raise malformed(stored, "neither a number nor a vector")
        return (Factor((stored,), (stored.numel, 1)),)
    if parts.keys() == {"Xd", "Xu"}:
        down, up = module.matrix(f"glora_{name}.Xd"), module.matrix(f"glora_{name}.Xu")
        if down.shape[1] != up.shape[0]:
            raise malformed(up, f"'Xd' is {list(down.shape)}")
        return Factor.of(down), Factor.of(up)
    if parts:
        raise malformed(next(iter(parts.values())), "a support in more than one form, or in part")
    return ()


def _read(module: Module) -> ModuleUpdates:
    A, B, C, D, E = (_support(module, name) for name in "ABCDE")
    site = module.site()
    updates: dict[Site, tuple[Update, ...]] = {}
    if A or B:
        updates[site] = (GLoRA(A, B),)
    if C or D or E:
        updates[replace(site, path=f"{module.path}.bias")] = (GLoRABias(C, D, E),)
    return ModuleUpdates(updates)


def _form(support: Support) -> str:
    if len(support) == 1 and support[0].shape == (1, 1):
        return "constant"
    return _SHAPES[len(support)]


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """All modules have their supports in the forms of the first; PEFT makes none for a layer without a bias."""
    forms: dict[str, str] = {}
    ranks = set()
    for site, update in updates:
        if isinstance(update, GLoRA):
            supports = {"A": update.A, "B": update.B}
        elif isinstance(update, GLoRABias):
            supports = {"C": update.C, "D": update.D, "E": update.E}
        else:
            file.hold_other(site, update)
            continue
        own = {name: _form(support) for name, support in supports.items()}
        if file.own is None and own != {name: forms.get(name, form) for name, form in own.items()}:
            file.drop(site, update, "all modules of a file have supports of one form")
            continue
        forms |= own
        module = site.path.rpartition(".")[0]
        for name, support in supports.items():
            for part, factor in zip(("Xd", "Xu") if len(support) == 2 else ("X",), support, strict=False):
                flat = len(support) == 1 and (factor.shape == (1, 1) or name in "DE")
                file.put(f"{file.prefix}{module}.glora_{name}.{part}", factor, (factor.shape[0],) if flat else None)
                ranks |= {factor.shape[1]} if part == "Xd" else set()
        file.ledger.keep(site, update, "exact", f"{file.prefix}{module}.glora_{next(iter(supports))}")
    file.fields = {
        "config_A_B": forms.get("A", "none") if forms.get("A", "none") != "none" else forms.get("B", "none"),
        "config_C": forms.get("C", "none"),
        "config_D_E": forms.get("D", "none") if forms.get("D", "none") != "none" else forms.get("E", "none"),
        "r": max(ranks, default=8),
        "target_modules": targets(file),
    }


GLORA = PeftKind(
    name="GLORA",
    factors=frozenset(f"glora_{name}.{part}" for name in "ABCDE" for part in ("X", "Xd", "Xu")),
    read=_read,
    writes=frozenset([GLoRA.kind, GLoRABias.kind]),
    write=_write,
    ranks={f"glora_{name}.Xd": 1 for name in "ABC"},
    switches=Switches(
        COMMON,
        frozenset(["r", "bias", "config_A_B", "config_C", "config_D_E", "modules_to_save"]),
    ),
    unused={"zeros": "stands for a support that was not trained"},
)
