# SPDX-License-Identifier: Apache-2.0
"""SHIRA: single weights that were trained (PEFT 0.21, ``tuners/shira``)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.adapters.writing import copied
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.updates import Factor, SHiRA, Update

__all__ = ["SHIRA"]


def _read(module: Module) -> ModuleUpdates:
    """PEFT stores indices as whole numbers, and on Windows as float32."""
    values, indices = module.vector("shira_weight"), module.part("shira_indices")
    if indices.shape != (2, values.numel) or (indices.dtype.is_float and indices.dtype is not DType.F32):
        raise malformed(indices, f"not a row and a column for each of {values.numel} values")
    return ModuleUpdates({module.site(): (SHiRA(Factor.of(values), indices),)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """PEFT builds ``r * (in + out)`` values for each module, with one r for all."""

    def put(key: str, update: SHiRA) -> float:
        file.put(f"{key}.shira_weight", update.values, times=update.scale)
        file.add(copied(f"{key}.shira_indices", update.places))
        return update.scale

    held = [(site, update) for site, update in updates if isinstance(update, SHiRA)]
    ranks = {_rank(file, site, update) for site, update in held}
    file.defaults = {"fan_in_fan_out": False, "init_weights": True, "mask_type": "random"}
    if file.own is None and (len(ranks) != 1 or None in ranks) and held:
        for site, update in updates:
            if isinstance(update, SHiRA):
                file.drop(site, update, "PEFT has as many values for each module as a LoRA of one rank: give the base")
            else:
                file.hold_other(site, update)
        return
    put_each(file, updates, SHiRA, put)
    file.fields = {"r": next(iter(ranks), 32), "target_modules": targets(file)}


def _rank(file: PeftFile, site: Site, update: SHiRA) -> int | None:
    """The r that gives the module as many values; None without one, or where the base is not known."""
    _, shape = file.module_of(site, update)
    rank, rest = divmod(update.values.shape[0], max(sum(shape), 1))
    return rank if not rest and all(shape) else None


SHIRA = PeftKind(
    name="SHIRA",
    factors=frozenset(["shira_weight", "shira_indices"]),
    read=_read,
    writes=frozenset([SHiRA.kind]),
    write=_write,
    switches=Switches(COMMON | {"r", "mask_type", "random_seed"}, frozenset(["modules_to_save"])),
)
