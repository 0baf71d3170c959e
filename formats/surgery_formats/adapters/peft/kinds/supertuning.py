# SPDX-License-Identifier: Apache-2.0
"""SUPERTUNING: values at stored places of a weight, and a LoRA where it has a rank (PEFT 0.21, ``tuners/supertuning/layer.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.adapters.writing import copied, places_of, rate_of
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.names import extent
from surgery_formats.updates import Factor, LoRA, SuperTuning, Update

__all__ = ["SUPERTUNING"]

_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


def _read(module: Module) -> ModuleUpdates:
    config, values = module.config, module.vector("supertuning_values")
    if "supertuning_indices" not in module.parts:
        raise FitError(
            "its places are not in the file (save_precomputed_indices is off): PEFT chooses them again by the weight's sizes, "
            "in which equal ones have no order",
            file=values.file.path,
            tensor=values.name,
            hint="load it with PEFT, set save_precomputed_indices in its configuration, and save it again",
        )
    places = module.vector("supertuning_indices")
    if places.numel != values.numel or places.dtype not in (DType.I32, DType.I64):
        raise malformed(places, f"no places of {values.numel} values")
    updates: list[Update] = [SuperTuning(Factor.of(values), places)]
    if _A in module.parts or _B in module.parts:
        A, B = module.matrix(_A), module.matrix(_B)
        if A.shape[0] != B.shape[1]:
            raise malformed(B, f"'supertuning_lora_A' is {list(A.shape)}")
        updates.append(LoRA(Factor.of(A), Factor.of(B), config.alpha / A.shape[0], config.alpha))
    return ModuleUpdates({module.site(): tuple(updates)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """PEFT gives every module of a file values, and all of them a LoRA of one rank and scale, or none."""
    sparse = {site for site, update in updates if isinstance(update, SuperTuning)}
    loras = {site for site, update in updates if isinstance(update, LoRA) and site in sparse}
    rank, alpha = 0, 0.0
    shares: list[tuple[int, int]] = []
    for site, update in updates:
        key = f"{file.prefix}{site.path.removesuffix('.weight')}"
        if isinstance(update, SuperTuning):
            if loras and site not in loras:
                file.drop(site, update, "either all modules of a file have a LoRA, or none has")
                continue
            size = (
                math.prod(extent(places_of(site, file.base, update.tensors))) if file.base else math.prod(update.shape)
            )
            if not size and file.own is None:
                file.drop(
                    site, update, "the part of its weight that it changes is stated, and only the base tells the size"
                )
                continue
            shares.append((update.values.shape[0], size))
            file.put(f"{key}.supertuning_values", update.values, times=update.scale)
            file.add(copied(f"{key}.supertuning_indices", update.places))
            file.ledger.keep(site, update, "exact" if update.scale == 1.0 else "folded", f"{key}.supertuning_values")
        elif isinstance(update, LoRA) and site in sparse:
            rank, alpha = rank or update.rank, alpha or file.alpha_of(update.rank, update.scale)
            if update.rank != rank:
                file.drop(site, update, "all modules of a file have one rank")
                continue
            times = update.scale * rank / alpha if alpha else 1.0
            file.put(f"{key}.{_A}", update.A)
            file.put(f"{key}.{_B}", update.B, times=times)
            file.ledger.keep(site, update, "exact" if times == 1.0 else "folded", f"{key}.{_A}")
        else:
            file.hold_other(site, update)
    file.defaults = {"init_weights": True, "lora_dropout": 0.0, "select_top": True}
    file.fields = {
        "lora_alpha": alpha if rank else None,
        "r": rank or None,
        "save_precomputed_indices": True,
        **({} if file.own else {"sparsity": 1 - rate_of(shares)}),
        "target_modules": targets(file),
    }


SUPERTUNING = PeftKind(
    name="SUPERTUNING",
    factors=frozenset(["supertuning_values", "supertuning_indices", _A, _B]),
    read=_read,
    writes=frozenset([SuperTuning.kind, LoRA.kind]),
    write=_write,
    ranks={_A: 0},
    switches=Switches(
        COMMON | {"lora_dropout", "select_top", "sparsity"},
        frozenset(["r", "lora_alpha", "modules_to_save", "save_precomputed_indices"]),
    ),
)
