# SPDX-License-Identifier: Apache-2.0
"""BOFT: butterfly rotations of the inputs of modules, and lengths of their outputs (PEFT 0.21, ``tuners/boft/layer.py``).

Files of several factors are written where PEFT's CUDA extension was there, and read by PEFT only where it is. Here they
are read everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import BOFT as Butterfly
from surgery_formats.updates import Factor, Update

__all__ = ["BOFT"]


def _read(module: Module) -> ModuleUpdates:
    """The lengths are ``(out, 1)``, or ``(1, out)`` of a convolution."""
    R, s = module.part("boft_R"), module.part("boft_s")
    if len(R.shape) != 4 or not R.numel or R.shape[2] != R.shape[3]:
        raise malformed(R, "not factors of square blocks")
    factors, blocks, side, _ = R.shape
    if factors > 1 and (side % 2 or blocks % 2 ** (factors - 1)):
        raise malformed(R, f"{blocks} blocks of {side} cannot be shuffled for {factors} factors")
    if len(s.shape) != 2 or 1 not in s.shape or not s.numel:
        raise malformed(s, "not one length for each output")
    kernel = (0, 0) if s.shape[0] == 1 < s.shape[1] else ()
    return ModuleUpdates({module.site(kernel): (Butterfly(Factor.of(R), Factor((s,), (s.numel,))),)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    first: Butterfly | None = None
    for site, update in updates:
        if not isinstance(update, Butterfly):
            file.hold_other(site, update)
            continue
        first = first or update
        if file.own is None and _common(update) != _common(first):
            file.drop(site, update, "all modules of a file have blocks of one size and one number of factors")
            continue
        module, shape = file.module_of(site, update)
        out = update.lengths.shape[0]
        convolution = len(shape) > 2 or site.module_kind == "convolution"
        file.put(f"{file.prefix}{module}.boft_R", update.generators)
        file.put(f"{file.prefix}{module}.boft_s", update.lengths, (1, out) if convolution else (out, 1))
        file.ledger.keep(site, update, "exact", f"{file.prefix}{module}")
    side, factors = _common(first) if first is not None else (4, 1)
    file.defaults = {"boft_block_num": 0, "boft_dropout": 0.0, "fan_in_fan_out": False, "init_weights": True}
    file.fields = {"boft_block_size": side, "boft_n_butterfly_factor": factors, "target_modules": targets(file)}


def _common(update: Butterfly) -> tuple[int, int]:
    return update.block, update.generators.shape[0]


BOFT = PeftKind(
    name="BOFT",
    factors=frozenset(["boft_R", "boft_s"]),
    read=_read,
    writes=frozenset([Butterfly.kind]),
    write=_write,
    switches=Switches(
        # the sizes are the tensors'
        COMMON | {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"},
        frozenset(["bias", "modules_to_save"]),
    ),
)
