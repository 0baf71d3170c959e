# SPDX-License-Identifier: Apache-2.0
"""TINYLORA: factors of each module around a vector that groups of modules share (PEFT 0.21, ``tuners/tinylora``).

The file has vectors by the number of their group, and groups are runs of modules in the order of the model, which no file has. But
each module's random tensor was drawn from the seed plus its number in that order: so the tensor itself tells the number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.keys import ROOT
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.arrays import Array, to_cpu
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, TinyLoRA, Update
from surgery_formats.updates.draws import TorchDraws

__all__ = ["TINYLORA"]

_V = "tinylora_v"
_NEAR = 0.02  # of two drawings; a tensor stored as bfloat16 is as near to its own


def _read(module: Module) -> ModuleUpdates:
    A, B = module.matrix("tinylora_A"), module.matrix("tinylora_B")
    if "tinylora_P" not in module.parts:
        raise FitError(
            "its random tensors are not in the file (save_projection is off): PEFT draws them again by the number of a module "
            "in the model, which no file has",
            file=A.file.path,
            tensor=A.name,
            hint="load it with PEFT, set save_projection in its configuration, and save it again",
        )
    P = module.part("tinylora_P")
    rank = A.shape[0]
    if len(P.shape) != 3 or P.shape[1:] != (rank, rank) or B.shape[1] != rank or not P.numel:
        raise malformed(P, f"between {list(B.shape)} and {list(A.shape)}")
    name = f"{_V}.{_group(module, P)}"
    v = module.shared.get(name)
    if v is None:
        raise MalformedError(f"'{ROOT}{name}' is missing", file=P.file.path, tensor=P.name)
    if v.shape != P.shape[:1]:
        raise malformed(v, f"'tinylora_P' is {list(P.shape)}")
    embedding = module.path.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings")
    site = Site(f"{module.path}.weight", module_kind="embedding" if embedding else "")
    update = TinyLoRA(Factor.of(v), Factor.of(P), Factor.of(A), Factor.of(B))
    return ModuleUpdates({site: (update,)})


def _group(module: Module, P: StoredTensor) -> int:
    """Which vector a module has.

    Raises:
        FitError: its number cannot be told.
    """
    config, modules = module.config, len(module.wrappers)
    groups = max(1, round(modules * (1.0 - config.number("weight_tying", 0.0))))
    if groups == 1:
        return 0
    seed, stored = config.integer("projection_seed", 42, low=-(1 << 31)), to_cpu(P.read()).reshape(-1)
    found = set()
    for number in range(modules):
        drawn = _normal(seed + number, P.numel)
        if abs(drawn / math.sqrt(P.shape[1]) - stored).max() < _NEAR * abs(stored).max():
            found.add(min(number // max(1, modules // groups), groups - 1))
    if len(found) == 1:  # a few numbers may look like several drawings
        return found.pop()
    raise FitError(
        "which of the shared vectors this module has cannot be told: its random tensor is not one that 'projection_seed' gives",
        file=P.file.path,
        tensor=P.name,
        hint="merge it with PEFT",
    )


@lru_cache(maxsize=1024)
def _normal(seed: int, count: int) -> Array:
    return TorchDraws(seed).normal(count)


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """An adapter's own file keeps the numbers of its vectors; another has one vector for all."""
    shared: dict[str, Factor] = {}
    ranks = []

    def put(key: str, update: TinyLoRA) -> float:
        shared[update.v.tensors[0].name if file.own is not None else f"{ROOT}{_V}.0"] = update.v
        for name, factor in (("A", update.A), ("B", update.B), ("P", update.P)):
            file.put(f"{key}.tinylora_{name}", factor, times=update.scale if name == "B" else 1.0)
        ranks.append(update.rank)
        return update.scale

    why = "all modules of a file share one vector (PEFT numbers several by the order of the model)"
    written = put_each(file, updates, TinyLoRA, put, lambda update: (update.v, update.P.shape[0]), why)
    for name, factor in shared.items():
        file.put(name, factor)
    file.defaults = {"fan_in_fan_out": False, "init_weights": True, "tinylora_dropout": 0.0}
    file.fields = {
        "r": max(ranks, default=2),
        "save_projection": True,
        "target_modules": targets(file),
        "u": written.P.shape[0] if written else 64,
        **({} if file.own else {"weight_tying": 1.0}),
    }


TINYLORA = PeftKind(
    name="TINYLORA",
    factors=frozenset(f"tinylora_{name}" for name in "ABP"),
    read=_read,
    writes=frozenset([TinyLoRA.kind]),
    write=_write,
    ranks={"tinylora_A": 0},
    switches=Switches(
        COMMON | {"init_v_bound", "tinylora_dropout", "u"},
        frozenset(["r", "bias", "modules_to_save", "projection_seed", "save_projection", "weight_tying"]),
    ),
    shared=frozenset([f"{_V}."]),
)
