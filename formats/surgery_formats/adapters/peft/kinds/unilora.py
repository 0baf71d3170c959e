# SPDX-License-Identifier: Apache-2.0
"""UNILORA: indices of each module into one trained vector (PEFT 0.21, ``tuners/unilora``)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.keys import ROOT
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, PeftConfig, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.adapters.writing import copied
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, UniLoRA, Update

__all__ = ["UNILORA"]

_THETA = "unilora_theta_d"
_WHOLE_NUMBERS = (DType.I64, DType.I32)


def _read(module: Module) -> ModuleUpdates:
    indices = tuple(_indices(module, f"unilora_indices_{side}") for side in "AB")
    scales = tuple(module.matrix(f"unilora_scales_{side}") for side in "AB")
    for at, times in zip(indices, scales, strict=True):
        if at.shape != times.shape:
            raise malformed(times, f"its indices are {list(at.shape)}")
    if indices[0].shape[0] != indices[1].shape[1]:
        raise malformed(indices[1], f"the other factor is {list(indices[0].shape)}")
    theta = module.shared.get(_THETA)
    if theta is None:
        raise MalformedError(f"'{ROOT}{_THETA}' is missing", file=indices[0].file.path)
    if len(theta.shape) != 1 or not theta.numel:
        raise malformed(theta, "not a vector")
    a, b = (Factor.of(times) for times in scales)
    return ModuleUpdates({module.site(): (UniLoRA(Factor.of(theta), (indices[0], indices[1]), (a, b)),)})


def _indices(module: Module, name: str) -> StoredTensor:
    stored = module.matrix(name)
    if stored.dtype not in _WHOLE_NUMBERS:
        raise MalformedError(f"indices of type {stored.dtype.label}", file=stored.file.path, tensor=stored.name)
    return stored


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """All modules share the first one's vector; another factor on one module's addition goes into the scales of its B."""

    def put(key: str, update: UniLoRA) -> float:
        for side, at, times in zip("AB", update.places, update.scales, strict=True):
            file.add(copied(f"{key}.unilora_indices_{side}", at))
            file.put(f"{key}.unilora_scales_{side}", times, times=update.scale if side == "B" else 1.0)
        return update.scale

    written = put_each(
        file, updates, UniLoRA, put, _setting, "all modules of a file share one vector and have one rank"
    )
    file.defaults = {"fan_in_fan_out": False, "init_weights": True, "unilora_dropout": 0.0}
    if written:
        file.put(f"{ROOT}{_THETA}", written.theta)
        file.fields = {
            "r": written.rank,
            "save_indices": True,
            "target_modules": targets(file),
            "theta_d_length": written.theta.shape[0],
        }


def _setting(update: UniLoRA) -> tuple[object, ...]:
    return update.theta, update.rank


def _lacks(config: PeftConfig) -> str:
    if config.flag("save_indices"):
        return ""
    return (
        "'save_indices' is off: the file has one vector and not which modules use which of its elements, which PEFT draws "
        "again in the order of the modules. Load it with PEFT, set save_indices in its configuration, and save it again"
    )


UNILORA = PeftKind(
    name="UNILORA",
    factors=frozenset(f"unilora_{what}_{side}" for what in ("indices", "scales") for side in "AB"),
    read=_read,
    writes=frozenset([UniLoRA.kind]),
    write=_write,
    ranks={"unilora_indices_A": 0},
    switches=Switches(
        COMMON | {"proj_seed", "unilora_dropout", "init_theta_d_bound"},
        frozenset(["r", "bias", "modules_to_save", "save_indices", "theta_d_length"]),
    ),
    shared=frozenset([_THETA]),
    lacks=_lacks,
)
