# SPDX-License-Identifier: Apache-2.0
"""GRALORA: LoRAs of blocks, and of the whole weight beside them (hybrid) (PEFT 0.21, ``tuners/gralora/layer.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import Factor, GraLoRA, Update

__all__ = ["GRALORA"]

_GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")
_ALPHA = 64.0  # PEFT's default


def _read(module: Module) -> ModuleUpdates:
    A, B = module.part("gralora_A"), module.part("gralora_B")
    k, _, rank = A.shape if len(A.shape) == 3 else (0, 0, 0)
    if len(B.shape) != 3 or B.shape[:2] != (k, rank) or not A.numel or not B.numel or rank % k:
        raise malformed(A, f"'gralora_B' is {list(B.shape)}")
    general: tuple[Factor, Factor] | tuple[()] = ()
    beside = 0
    if any(name in module.parts for name in _GENERAL):
        down, up = map(module.matrix, _GENERAL)
        beside = down.shape[0]
        if (down.shape[1], *up.shape) != (k * A.shape[1], k * B.shape[2], beside):
            raise malformed(up, f"beside {list(down.shape)} and blocks of {list(A.shape)}, {list(B.shape)}")
        general = Factor.of(down), Factor.of(up)
    if beside != module.config.integer("hybrid_r", 0):
        raise malformed(A, f"'hybrid_r' does not say that the general LoRA has rank {beside}")
    alpha = module.config.number("alpha", _ALPHA)
    update = GraLoRA(Factor.of(A), Factor.of(B), alpha / (rank + beside), general, alpha)
    return ModuleUpdates({module.site(): (update,)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """All modules have the first one's ranks and scale; another scale goes into the factors of B."""
    scale = next((update.scale for _, update in updates if isinstance(update, GraLoRA)), 1.0)
    if file.own is not None:
        raw = file.own
        scale = raw.number("alpha", _ALPHA) / (raw.integer("r", 32) + raw.integer("hybrid_r", 0))

    def put(key: str, update: GraLoRA) -> float:
        times = 1.0 if update.scale == scale else update.scale / scale
        file.put(f"{key}.gralora_A", update.A)
        file.put(f"{key}.gralora_B", update.B, times=times)
        for name, factor, part in zip(_GENERAL, update.general, (1.0, times), strict=False):
            file.put(f"{key}.{name}", factor, times=part)
        return times

    first = put_each(
        file, updates, GraLoRA, put, _sizes, "all modules of a file have one number of blocks and the same ranks"
    )
    k, rank, beside = _sizes(first) if first is not None else (2, 32, 0)
    file.defaults = {"fan_in_fan_out": False, "gralora_dropout": 0.0, "init_weights": True}
    file.fields = {
        "alpha": scale * (rank + beside),
        "gralora_k": k,
        "hybrid_r": beside,
        "r": rank,
        "target_modules": targets(file),
    }


def _sizes(update: GraLoRA) -> tuple[int, int, int]:
    """Blocks along an axis, their rank, and that of the general LoRA."""
    return update.A.shape[0], update.A.shape[2], update.general[0].shape[0] if update.general else 0


GRALORA = PeftKind(
    name="GRALORA",
    factors=frozenset(["gralora_A", "gralora_B", *_GENERAL]),
    read=_read,
    writes=frozenset([GraLoRA.kind]),
    write=_write,
    ranks={"gralora_A": 2},
    switches=Switches(
        COMMON | {"r", "gralora_k", "gralora_dropout"},
        frozenset(["alpha", "hybrid_r", "bias", "modules_to_save"]),
        alpha="alpha",
    ),
)
