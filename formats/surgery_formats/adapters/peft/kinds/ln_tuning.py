# SPDX-License-Identifier: Apache-2.0
"""LN_TUNING: trained copies of normalisation layers (PEFT 0.21, ``tuners/ln_tuning``)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.format import NewTensor
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import Factor, Replacement, Update, is_replacing

__all__ = ["LN_TUNING"]


def _read(module: Module) -> ModuleUpdates:
    return ModuleUpdates(
        {
            Site(f"{module.path}.{name.rpartition('.')[2]}", module_kind="norm"): (
                Replacement(Factor.of(tensor), "copy"),
            )
            for name, tensor in module.parts.items()
        }
    )


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """Copies of normalisation layers; a module of another kind that was trained in full is saved as with every kind."""
    file.targets = set()
    for site, update in updates:
        if is_replacing(update) and site.module_kind == "norm":
            module, _, leaf = site.path.rpartition(".")
            key = f"{file.prefix}{module}.ln_tuning_layers.{leaf}"
            file.add(NewTensor(key, update.stored.dtype, update.stored.shape, update.stored.read))
            file.ledger.keep(site, update, "exact", key)
            file.targets.add(module)
    for site, update in updates:
        if not (is_replacing(update) and site.module_kind == "norm"):
            file.hold_other(site, update)
    file.fields = {"target_modules": targets(file)}


LN_TUNING = PeftKind(
    name="LN_TUNING",
    factors=frozenset(["ln_tuning_layers.weight", "ln_tuning_layers.bias"]),
    read=_read,
    writes=frozenset([Replacement.kind]),
    write=_write,
    switches=Switches(COMMON, frozenset(["modules_to_save"])),
)
