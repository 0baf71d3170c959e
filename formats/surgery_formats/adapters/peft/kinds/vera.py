# SPDX-License-Identifier: Apache-2.0
"""VERA: two vectors for each module around random projections that all share (PEFT 0.21, ``tuners/vera``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.keys import ROOT
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.kinds.shared import shared_pair
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, Seed, Update, VeRA

__all__ = ["VERA"]

_SHARED = ("vera_A", "vera_B")


def _read(module: Module) -> ModuleUpdates:
    b, d = module.vector("vera_lambda_b"), module.vector("vera_lambda_d")
    stored = shared_pair(module, _SHARED, (2, 2))
    if stored is None:
        if d.numel != module.config.integer("r", 256, low=1):
            raise malformed(d, "its size is not 'r', with which the projections were drawn")
        drawn = Seed(module.config.integer("projection_prng_key", 0, low=-(1 << 31)))
        return ModuleUpdates({module.site(): (VeRA(Factor.of(b), Factor.of(d), drawn),)})
    A, B = stored
    if A.shape[0] != d.numel or B.shape[1] != d.numel:
        raise malformed(d, f"the shared projections have the ranks {A.shape[0]} and {B.shape[1]}")
    if B.shape[0] < b.numel:
        raise malformed(b, f"the shared 'vera_B' has only {B.shape[0]} rows")
    return ModuleUpdates({module.site(): (VeRA(Factor.of(b), Factor.of(d), stored),)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """All modules share the first one's projections, so that what has others is dropped."""
    shared: VeRA | None = None
    for site, update in updates:
        if not isinstance(update, VeRA):
            file.hold_other(site, update)
            continue
        shared = shared or update
        if _drawn(update) != _drawn(shared):
            file.drop(site, update, "all modules of a file share their projections")
            continue
        module = file.module_of(site, update)[0]
        key = f"{file.prefix}{module}.vera_lambda_b"
        file.put(key, update.b, times=update.scale)
        file.put(f"{file.prefix}{module}.vera_lambda_d", update.d)
        file.ledger.keep(site, update, "exact" if update.scale == 1.0 else "folded", key)
    drawn = shared.projections if shared else Seed(0)
    if not isinstance(drawn, Seed):
        for name, factor in zip(_SHARED, drawn, strict=True):
            file.put(f"{ROOT}{name}", factor)
    file.defaults = {"d_initial": 0.1, "fan_in_fan_out": False, "init_weights": True, "vera_dropout": 0.0}
    file.fields = {
        "projection_prng_key": drawn.key if isinstance(drawn, Seed) else 0,
        "r": shared.rank if shared else 256,
        "save_projection": not isinstance(drawn, Seed),
        "target_modules": targets(file),
    }


def _drawn(update: VeRA) -> tuple[object, ...]:
    """What two modules must have in common to be in one file."""
    projections = update.projections
    if isinstance(projections, Seed):
        return update.rank, projections.key
    return update.rank, *(factor.tensors for factor in projections), *(factor.shape for factor in projections)


def _issues(config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Iterable[str]:
    if not any("vera_A" in tensor.name for tensor in tensors):
        yield "its random projections are not in the file: they are drawn again from projection_prng_key, as PEFT does"


VERA = PeftKind(
    name="VERA",
    factors=frozenset(["vera_lambda_b", "vera_lambda_d"]),
    read=_read,
    writes=frozenset([VeRA.kind]),
    write=_write,
    ranks={"vera_lambda_d": 0},
    switches=Switches(
        COMMON | {"vera_dropout", "d_initial"},
        frozenset(["r", "bias", "modules_to_save", "projection_prng_key", "save_projection"]),
    ),
    shared=frozenset(_SHARED),
    issues=_issues,
)
