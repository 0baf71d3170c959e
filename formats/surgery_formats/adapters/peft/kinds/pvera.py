# SPDX-License-Identifier: Apache-2.0
"""PVERA: VeRA around a distribution, of which the mean is merged (PEFT 0.21, ``tuners/pvera``)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.keys import ROOT
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.kinds.shared import shared_pair
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, PVeRA, Seed, Update

__all__ = ["PVERA"]

_SHARED = ("pvera_A", "pvera_B")


def _read(module: Module) -> ModuleUpdates:
    b, d = module.vector("pvera_lambda_b"), module.vector("pvera_lambda_d")
    rank = d.numel // 2
    if d.numel % 2:
        raise malformed(d, "not one half for means and one for variances")
    module.config.check_rank(module.path, rank, d)
    stored = shared_pair(module, _SHARED, (2, 2))
    if stored is None:
        if rank != module.config.integer("r", 256, low=1):
            raise malformed(d, "its size is not twice 'r', with which the projections were drawn")
        drawn = Seed(module.config.integer("projection_prng_key", 0, low=-(1 << 31)), twice=True)
        return ModuleUpdates({module.site(): (PVeRA(Factor.of(b), Factor.of(d), drawn),)})
    A, B = stored
    if A.shape[0] != d.numel or B.shape[1] != rank or B.shape[0] < b.numel:
        raise malformed(d, f"the shared projections are {list(A.shape)} and {list(B.shape)}")
    return ModuleUpdates({module.site(): (PVeRA(Factor.of(b), Factor.of(d), stored),)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    def put(key: str, update: PVeRA) -> float:
        file.put(f"{key}.pvera_lambda_b", update.b, times=update.scale)
        file.put(f"{key}.pvera_lambda_d", update.d)
        return update.scale

    first = put_each(file, updates, PVeRA, put, _projections, "all modules of a file share their projections")
    drawn = first.projections if first is not None else Seed(0, twice=True)
    if not isinstance(drawn, Seed):
        for name, factor in zip(_SHARED, drawn, strict=True):
            file.put(f"{ROOT}{name}", factor)
    file.defaults = {"d_initial": 0.1, "fan_in_fan_out": False, "init_weights": True, "pvera_dropout": 0.0}
    file.fields = {
        "projection_prng_key": drawn.key if isinstance(drawn, Seed) else 0,
        "r": first.rank if first is not None else 256,
        "save_projection": not isinstance(drawn, Seed),
        "target_modules": targets(file),
    }


def _projections(update: PVeRA) -> Hashable:
    """What two modules must have in common to be in one file."""
    projections = update.projections
    if isinstance(projections, Seed):
        return update.rank, projections.key
    return update.rank, *(factor.tensors for factor in projections), *(factor.shape for factor in projections)


def _issues(config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Iterable[str]:
    if not any("pvera_A" in tensor.name for tensor in tensors):
        yield "its random projections are not in the file: they are drawn again from projection_prng_key, as PEFT does"
    if config.get("sample_at_inference"):
        yield "attached, it draws its inner values at random; merged it gives their mean, as PEFT's merge does"


PVERA = PeftKind(
    name="PVERA",
    factors=frozenset(["pvera_lambda_b", "pvera_lambda_d"]),
    read=_read,
    writes=frozenset([PVeRA.kind]),
    write=_write,
    switches=Switches(
        COMMON | {"pvera_dropout", "d_initial", "generator_seed"},
        frozenset(["r", "bias", "modules_to_save", "projection_prng_key", "save_projection", "sample_at_inference"]),
    ),
    shared=frozenset(_SHARED),
    issues=_issues,
)
