# SPDX-License-Identifier: Apache-2.0
"""BEFT: additions to biases alone (PEFT 0.21, ``tuners/beft``; Huang et al. 2025, arXiv:2509.15974)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import Factor, Offset, Update

__all__ = ["BEFT"]


def _read(module: Module) -> ModuleUpdates:
    """A base without the bias gets one, which PEFT's merge refuses and its attached model has."""
    stored = module.part("beft_bias")
    if len(stored.shape) != 2 or stored.shape[0] != 1 or not stored.numel:
        raise malformed(stored, "not one row")
    offset = Offset(Factor((stored,), (stored.numel,)))
    return ModuleUpdates({Site(f"{module.path}.bias", module_kind="linear"): (offset,)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    for site, update in updates:
        module, _, leaf = site.path.rpartition(".")
        if not isinstance(update, Offset) or leaf != "bias":
            file.hold_other(site, update)
            continue
        key = f"{file.prefix}{module}.beft_bias"
        file.put(key, update.value, (1, update.value.shape[0]), times=update.scale)
        file.ledger.keep(site, update, "exact" if update.scale == 1.0 else "folded", key)
    file.defaults = {"init_weights": True}
    file.fields = {"target_modules": targets(file)}


BEFT = PeftKind(
    name="BEFT",
    factors=frozenset(["beft_bias"]),
    read=_read,
    writes=frozenset([Offset.kind]),
    write=_write,
    switches=Switches(COMMON, frozenset(["modules_to_save"])),
)
