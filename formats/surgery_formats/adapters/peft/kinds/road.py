# SPDX-License-Identifier: Apache-2.0
"""ROAD: rotations of pairs of outputs (PEFT 0.21, ``tuners/road/layer.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import Factor, RoAd, Update

__all__ = ["ROAD"]

_VARIANTS: dict[str, Literal[1, 2, 4]] = {"road_1": 1, "road_2": 2, "road_4": 4}


def _read(module: Module) -> ModuleUpdates:
    """What a module gives is turned: its weight, and its bias if it has one."""
    angles, lengths = module.vector("road_theta"), module.vector("road_alpha")
    variant = _VARIANTS[module.config.choice("variant", tuple(_VARIANTS))]
    size = module.config.integer("group_size", 64, low=2)
    if angles.numel != lengths.numel:
        raise malformed(lengths, f"'road_theta' has {angles.numel}")
    if size % 2 or angles.numel * 2 % (variant * size):
        raise malformed(angles, f"no groups of {size} outputs in the variant road_{variant}")
    update = RoAd(Factor.of(angles), Factor.of(lengths), variant, size)
    site = module.site()
    bias = replace(site, path=f"{module.path}.bias")
    return ModuleUpdates({site: (update,), bias: (update,)}, frozenset([bias]))


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    known, first = dict(updates), None
    for site, update in updates:
        module, _, leaf = site.path.rpartition(".")
        beside = known.get(replace(site, path=f"{module}.weight"))
        if not isinstance(update, RoAd):
            file.hold_other(site, update)
            continue
        first = first or update
        key = f"{file.prefix}{file.module_of(site, update)[0] if leaf == 'weight' else module}"
        if leaf == "bias" and isinstance(beside, RoAd) and _factors(beside) == _factors(update):
            file.ledger.keep(site, update, "exact", key)
        elif leaf != "weight":
            file.drop(site, update, "this format turns a bias only together with its weight")
        elif _variant(update) != _variant(first):
            file.drop(site, update, "all modules of a file have one variant and one size of groups")
        else:
            file.put(f"{key}.road_theta", update.angles)
            file.put(f"{key}.road_alpha", update.lengths)
            file.ledger.keep(site, update, "exact", key)
    variant, size = _variant(first) if first is not None else (1, 64)
    file.defaults = {"init_weights": True}
    file.fields = {"group_size": size, "target_modules": targets(file), "variant": f"road_{variant}"}


def _variant(update: RoAd) -> tuple[int, int]:
    return update.variant, update.rows_in_group


def _factors(update: RoAd) -> tuple[Factor, Factor, tuple[int, int]]:
    return update.angles, update.lengths, _variant(update)


ROAD = PeftKind(
    name="ROAD",
    factors=frozenset(["road_theta", "road_alpha"]),
    read=_read,
    writes=frozenset([RoAd.kind]),
    write=_write,
    switches=Switches(COMMON, frozenset(["variant", "group_size", "modules_to_save"])),
)
