# SPDX-License-Identifier: Apache-2.0
"""C3A: circulant blocks that are added to modules (PEFT 0.21, ``tuners/c3a``)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import setting_and_pattern, targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import C3A as Circulant
from surgery_formats.updates import Factor, Update

__all__ = ["C3A"]


def _read(module: Module) -> ModuleUpdates:
    stored = module.part("c3a_kernel")
    if len(stored.shape) != 3 or not stored.numel:
        raise malformed(stored, "not a grid of kernels")
    return ModuleUpdates({module.site(): (Circulant(Factor.of(stored)),)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    sizes: dict[str, int] = {}

    def put(key: str, update: Circulant) -> float:
        file.put(f"{key}.c3a_kernel", update.kernels, times=update.scale)
        sizes[key.removeprefix(file.prefix)] = update.kernels.shape[2]
        return update.scale

    put_each(file, updates, Circulant, put)
    size, pattern = setting_and_pattern(sizes or {"": 256}, anchored=False)
    file.defaults = {"init_weights": "xavier_uniform"}
    file.fields = {"block_size": size, "block_size_pattern": pattern, "target_modules": targets(file)}


C3A = PeftKind(
    name="C3A",
    factors=frozenset(["c3a_kernel"]),
    read=_read,
    writes=frozenset([Circulant.kind]),
    write=_write,
    switches=Switches(COMMON | {"block_size", "block_size_pattern"}, frozenset(["bias", "modules_to_save"])),
)
