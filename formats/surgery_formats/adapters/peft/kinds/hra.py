# SPDX-License-Identifier: Apache-2.0
"""HRA: reflections of the inputs of modules (PEFT 0.21, ``tuners/hra/layer.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import HRA as Reflections
from surgery_formats.updates import Factor, Update

__all__ = ["HRA"]


def _read(module: Module) -> ModuleUpdates:
    stored = module.matrix("hra_u")
    return ModuleUpdates({module.site(): (Reflections(Factor.of(stored), module.config.flag("apply_GS")),)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    def put(key: str, update: Reflections) -> None:
        file.put(f"{key}.hra_u", update.vectors)

    first = put_each(
        file,
        updates,
        Reflections,
        put,
        lambda update: (update.rank, update.gram_schmidt),
        "all modules of a file have one rank and one way to reflect",
    )
    file.defaults = {"init_weights": True}
    file.fields = {
        "apply_GS": first is not None and first.gram_schmidt,
        "r": 8 if first is None else first.rank,
        "target_modules": targets(file),
    }


HRA = PeftKind(
    name="HRA",
    factors=frozenset(["hra_u"]),
    read=_read,
    writes=frozenset([Reflections.kind]),
    write=_write,
    ranks={"hra_u": 1},
    switches=Switches(COMMON | {"r"}, frozenset(["bias", "modules_to_save", "apply_GS"])),
)
