# SPDX-License-Identifier: Apache-2.0
"""PEANUT: the layers of a network that makes an addition of the weight (PEFT 0.21, ``tuners/peanut/layer.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import FitError
from surgery_formats.text import listing, show
from surgery_formats.updates import ACTIVATIONS, Factor, PEANuT, Update

__all__ = ["PEANUT"]

_DEEPEST = 64


def _read(module: Module) -> ModuleUpdates:
    config = module.config
    A, B = module.matrix("peanut_A.weight"), module.matrix("peanut_B.weight")
    if A.shape != B.shape[::-1]:
        raise malformed(B, f"'peanut_A' is {list(A.shape)}")
    depth = config.integer("depth", 0)
    if depth > _DEEPEST:
        raise FitError(f"a network of {depth} layers", file=config.file)
    square = (A.shape[0], A.shape[0])
    layers = []
    for side in ("encoders", "decoders"):
        found = [module.matrix(f"peanut_{side}.{i}.weight") for i in range(depth)]
        for stored in found:
            if stored.shape != square:
                raise malformed(stored, f"a layer of width {A.shape[0]}")
        layers.append(tuple(Factor.of(stored) for stored in found))
    act = config.raw.get("act_fn", "relu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise FitError(
            f"'act_fn' is '{show(str(act))}', which is not known",
            file=config.file,
            hint=f"known: {listing(sorted(ACTIVATIONS))}",
        )
    encoders, decoders = layers
    update = PEANuT(Factor.of(A), Factor.of(B), encoders, decoders, act, config.number("scaling", 1.0))
    return ModuleUpdates({module.site(): (update,)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    def put(key: str, update: PEANuT) -> None:
        layers = {"A": update.A, "B": update.B}
        layers |= {f"encoders.{i}": layer for i, layer in enumerate(update.encoders)}
        layers |= {f"decoders.{i}": layer for i, layer in enumerate(update.decoders)}
        for name, layer in layers.items():
            file.put(f"{key}.peanut_{name}.weight", layer)

    why = "all modules of a file have one rank, depth, activation and scale"
    written = put_each(file, updates, PEANuT, put, _setting, why)
    file.defaults = {"init_weights": True}
    if written:
        file.fields = {
            "act_fn": written.act,
            "depth": len(written.encoders),
            "r": written.rank,
            "scaling": written.scale,
            "target_modules": targets(file),
        }


def _setting(update: PEANuT) -> tuple[object, ...]:
    return update.rank, len(update.encoders), update.act, update.scale


PEANUT = PeftKind(
    name="PEANUT",
    factors=frozenset(
        ["peanut_A.weight", "peanut_B.weight"]
        + [f"peanut_{side}.{i}.weight" for side in ("encoders", "decoders") for i in range(_DEEPEST)]
    ),
    read=_read,
    writes=frozenset([PEANuT.kind]),
    write=_write,
    ranks={"peanut_A.weight": 0},
    switches=Switches(COMMON, frozenset(["r", "act_fn", "depth", "modules_to_save", "scaling"])),
)
