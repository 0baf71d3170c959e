# SPDX-License-Identifier: Apache-2.0
"""MISS, and BONE as it was called before PEFT 0.19: shards that all inputs share (PEFT 0.21, ``tuners/miss/layer.py``).

What Bone meant is MiSS today (PEFT 0.14 to 0.18, ``tuners/bone/layer.py``; ``scripts/convert-bone-to-miss.py``). Its blocks
have three axes where they look at the weight, in every version that stored them, so that the tensor tells.
"""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show
from surgery_formats.updates import BAT, Factor, MiSS, Update

__all__ = ["BONE", "MISS"]


def _read(module: Module) -> ModuleUpdates:
    stored = module.part("bone_block" if module.config.kind == "BONE" else "miss_block")
    variant = module.config.raw.get("init_weights", True)
    if isinstance(variant, str) and variant not in ("bat", "mini"):
        raise FitError(f"'init_weights' is '{show(variant)}': no variant of MiSS", file=module.config.file)
    update: Update
    if len(stored.shape) == 3:
        bands, side, other = stored.shape
        if not bands or not side or side != other:
            raise malformed(stored, "not a stack of square matrices")
        if variant == "mini":
            raise malformed(stored, "'init_weights' says that they have two axes")
        update = BAT(Factor.of(stored))
    else:
        if variant == "bat":
            raise malformed(stored, "'init_weights' says that they have three axes")
        update = _added(module, stored, variant == "mini")
    return ModuleUpdates({module.site(): (update,)})


def _added(module: Module, stored: StoredTensor, repeats: bool) -> MiSS:
    if len(stored.shape) != 2 or not stored.numel:
        raise malformed(stored, "not a matrix")
    if repeats and stored.shape[1] != module.config.integer("mini_r", 1, low=1):
        raise malformed(stored, "its width is not 'mini_r'")
    return MiSS(Factor.of(stored), repeats)


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """A folder has one variant, the first update's."""
    first: MiSS | BAT | None = None
    name = "bone_block" if file.kind == "BONE" else "miss_block"
    for site, update in updates:
        if not isinstance(update, MiSS | BAT):
            file.hold_other(site, update)
            continue
        first = first or update
        if _variant(update) != _variant(first):
            file.drop(site, update, "all modules of a file have one variant")
            continue
        key = f"{file.prefix}{file.module_of(site, update)[0]}.{name}"
        times = update.scale if isinstance(update, MiSS) else 1.0
        file.put(key, update.block if isinstance(update, MiSS) else update.blocks, times=times)
        file.ledger.keep(site, update, "exact" if times == 1.0 else "folded", key)
    variant, width = _variant(first)
    file.defaults = {"miss_dropout": 0.0}
    file.fields = {
        "init_weights": variant,
        "mini_r": width,
        "r": 64 if first is None else first.group if isinstance(first, BAT) else first.block.shape[0],
        "target_modules": targets(file),
    }


def _variant(update: MiSS | BAT | None) -> tuple[bool | str, int]:
    """``init_weights`` and ``mini_r``."""
    if isinstance(update, BAT):
        return "bat", 1
    return ("mini", update.block.shape[1]) if update is not None and update.repeats else (True, 1)


_SWITCHES = Switches(COMMON | {"r", "miss_dropout"}, frozenset(["bias", "modules_to_save", "init_weights", "mini_r"]))
MISS = PeftKind(
    "MISS",
    frozenset(["miss_block"]),
    _read,
    frozenset([MiSS.kind, BAT.kind]),
    _write,
    _SWITCHES,
    ranks={"miss_block": -2},
)
BONE = PeftKind("BONE", frozenset(["bone_block"]), _read, frozenset(), _write, _SWITCHES, ranks={"bone_block": -2})
