# SPDX-License-Identifier: Apache-2.0
"""LOHA: products by element of two low-rank pairs (PEFT 0.21, ``tuners/loha/layer.py``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.kinds.lycoris import SWITCHES, alpha_issue, low_rank_pair, put_pair
from surgery_formats.adapters.peft.write_config import ranks_and_alphas, targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import LoHa, Update

__all__ = ["LOHA"]


def _read(module: Module) -> ModuleUpdates:
    (A1, B1), (A2, B2) = [low_rank_pair(module, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2)]
    if A1.shape != A2.shape or B1.shape != B2.shape:
        raise malformed(
            module.part("hada_w2_a"), f"the first pair makes {[A1.shape[0], B1.shape[1]]}, of rank {A1.shape[1]}"
        )
    module.config.check_rank(module.path, A1.shape[1], module.part("hada_w1_a"))
    alpha = module.config.alpha_of(module.path)
    site = module.site(module.parts["hada_t1"].shape[2:] if "hada_t1" in module.parts else ())
    return ModuleUpdates({site: (LoHa(A1, B1, A2, B2, alpha / A1.shape[1], alpha),)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    cores = set()
    for site, update in updates:
        if not isinstance(update, LoHa):
            file.hold_other(site, update)
            continue
        module = file.module_of(site, update)[0]
        key = f"{file.prefix}{module}"
        for i, (A, B) in enumerate(((update.A1, update.B1), (update.A2, update.B2)), 1):
            cores.add(put_pair(file, key, (A, B), (f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}")))
        file.settings[module] = (update.rank, file.alpha_of(update.rank, update.scale))
        file.ledger.keep(site, update, "exact", f"{key}.hada_w1_a")
    file.defaults = {"module_dropout": 0.0, "rank_dropout": 0.0, "init_weights": True}
    file.fields = {
        **ranks_and_alphas(file, "alpha"),
        "target_modules": targets(file),
        "use_effective_conv2d": True in cores,
    }


def _issues(config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Iterable[str]:
    return alpha_issue(config)


LOHA = PeftKind(
    name="LOHA",
    factors=frozenset(["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"]),
    read=_read,
    writes=frozenset([LoHa.kind]),
    write=_write,
    switches=SWITCHES,
    issues=_issues,
)
