# SPDX-License-Identifier: Apache-2.0
"""IA3: vectors on the outputs of modules, or on their inputs (PEFT 0.21, ``tuners/ia3/layer.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import MalformedError
from surgery_formats.updates import IA3 as Vector
from surgery_formats.updates import Factor, Update

__all__ = ["IA3"]


def _read(module: Module) -> ModuleUpdates:
    """A row or a column vector; for convolutions both are (1, n, 1, 1), and the configuration tells."""
    stored = module.part("ia3_l")
    size, sizes = stored.numel, stored.shape
    inputs = module.config.selects("feedforward_modules", module.path)
    if len(sizes) == 2 and inputs is None:
        inputs = sizes[0] == 1 and size > 1
    if inputs is None:
        raise MalformedError("no 'feedforward_modules': inputs or outputs cannot be told", file=module.config.file)
    if sizes != _sizes(size, len(sizes) - 2, inputs=inputs) or not size:
        raise malformed(stored, f"a vector on the {'inputs' if inputs else 'outputs'}, going by 'feedforward_modules'")
    update = Vector(Factor((stored,), (size,)), per_row=not inputs)
    kernel = (0,) * (len(sizes) - 2)
    site = Site(f"{module.path}.weight", module_kind="convolution" if kernel else "linear", kernel=kernel)
    if inputs:
        return ModuleUpdates({site: (update,)})
    bias = replace(site, path=f"{module.path}.bias")
    return ModuleUpdates({site: (update,), bias: (update,)}, frozenset([bias]))


def _sizes(size: int, axes: int, *, inputs: bool) -> tuple[int, ...]:
    """As PEFT stores the vector of a module whose kernel has `axes` axes."""
    if axes > 0:
        return (1, size, *(1,) * axes)
    return (1, size) if inputs else (size, 1)


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    known = dict(updates)
    inputs = set()
    for site, update in updates:
        module, _, leaf = site.path.rpartition(".")
        key = f"{file.prefix}{module}.ia3_l"
        beside = known.get(replace(site, path=f"{module}.weight"))
        if not isinstance(update, Vector):
            file.hold_other(site, update)
        elif (
            leaf == "bias" and isinstance(beside, Vector) and beside.per_row and beside.vector == update.vector
        ):  # PEFT stretches what a module gives, its bias too
            file.ledger.keep(site, update, "exact", key)
        elif leaf != "weight":
            file.drop(site, update, "this format stretches a bias only together with its weight")
        else:
            axes = len(site.kernel) or len(file.module_of(site, update)[1]) - 2
            file.put(key, update.vector, _sizes(update.vector.shape[0], axes, inputs=not update.per_row))
            inputs |= set() if update.per_row else {module}
            file.ledger.keep(site, update, "exact", key)
    file.defaults = {"fan_in_fan_out": False, "init_ia3_weights": True}
    file.fields = {"feedforward_modules": sorted(inputs), "target_modules": targets(file)}


IA3 = PeftKind(
    name="IA3",
    factors=frozenset(["ia3_l"]),
    read=_read,
    writes=frozenset([Vector.kind]),
    write=_write,
    switches=Switches(COMMON | {"init_ia3_weights"}, frozenset(["feedforward_modules", "modules_to_save"])),
)
