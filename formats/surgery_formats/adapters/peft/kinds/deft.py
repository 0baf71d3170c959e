# SPDX-License-Identifier: Apache-2.0
"""DEFT: a projection and what takes its place; PaRa has the projection alone (PEFT 0.21, ``tuners/deft/layer.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import MalformedError
from surgery_formats.updates import DEFT as Filled
from surgery_formats.updates import Factor, Update

__all__ = ["DEFT"]

_METHODS = {"relu": False, "qr": True}


def _read(module: Module) -> ModuleUpdates:
    config, P = module.config, module.matrix("deft_P")
    method = config.raw.get("decomposition_method", "relu")
    if not isinstance(method, str) or method not in _METHODS:
        raise MalformedError("'decomposition_method' is neither 'relu' nor 'qr'", file=config.file)
    rank, R = P.shape[1], None
    if rank > P.shape[0]:
        raise malformed(P, f"it has no {rank} directions")
    if config.flag("para") != ("deft_R" not in module.parts):
        raise malformed(P, "'para' and 'deft_R' exclude each other, and one of them is needed")
    if "deft_R" in module.parts:
        R = module.matrix("deft_R")
        if R.shape[0] != rank:
            raise malformed(R, f"'deft_P' is {list(P.shape)}")
    alpha = config.number("alpha", 0.0)
    scale = alpha / rank if alpha else 1.0
    return ModuleUpdates({module.site(): (Filled(Factor.of(P), Factor.of(R) if R else None, _METHODS[method], scale),)})


def _setting(update: Filled) -> tuple[object, ...]:
    return update.R is None, update.orthonormal, update.rank, update.scale


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    def put(key: str, update: Filled) -> None:
        file.put(f"{key}.deft_P", update.P)
        if update.R:
            file.put(f"{key}.deft_R", update.R)

    why = "all modules of a file have one rank, decomposition and alpha"
    written = put_each(file, updates, Filled, put, _setting, why)
    file.defaults = {"deft_dropout": 0.0, "fan_in_fan_out": False, "init_scale": 1.0, "init_weights": True}
    if written:
        plain = written.scale == 1.0
        file.fields = {
            "alpha": None if plain else written.scale * written.rank,
            "decomposition_method": "qr" if written.orthonormal else "relu",
            "para": written.R is None,
            "r": written.rank,
            "target_modules": targets(file),
        }


DEFT = PeftKind(
    name="DEFT",
    factors=frozenset(["deft_P", "deft_R"]),
    read=_read,
    writes=frozenset([Filled.kind]),
    write=_write,
    ranks={"deft_P": 1},
    switches=Switches(
        COMMON | {"init_scale", "deft_dropout"},
        frozenset(["r", "alpha", "bias", "decomposition_method", "modules_to_save", "para"]),
        alpha="alpha",
    ),
)
