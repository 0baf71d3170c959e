# SPDX-License-Identifier: Apache-2.0
"""DELORA: low-rank additions whose strength is apart from their directions (PEFT 0.21, ``tuners/delora/layer.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import setting_and_pattern, targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import DeLoRA, Factor, Update

__all__ = ["DELORA"]


def _read(module: Module) -> ModuleUpdates:
    A, B = module.matrix("delora_A"), module.matrix("delora_B")
    strength, lengths = module.vector("delora_lambda"), module.vector("delora_w_norm")
    if B.shape[1] != A.shape[0]:
        raise malformed(B, f"'delora_A' is {list(A.shape)}")
    if lengths.numel != A.shape[1] or strength.numel != 1:
        raise malformed(lengths, f"'delora_A' is {list(A.shape)}, 'delora_lambda' {list(strength.shape)}")
    return ModuleUpdates(
        {module.site(): (DeLoRA(Factor.of(A), Factor.of(B), Factor.of(strength), Factor.of(lengths)),)}
    )


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    ranks: dict[str, int] = {}

    def put(key: str, update: DeLoRA) -> float:
        file.put(f"{key}.delora_A", update.A)
        file.put(f"{key}.delora_B", update.B)
        file.put(f"{key}.delora_lambda", update.strength, times=update.scale)
        file.put(f"{key}.delora_w_norm", update.lengths)
        ranks[key.removeprefix(file.prefix)] = update.rank
        return update.scale

    put_each(file, updates, DeLoRA, put)
    rank, pattern = setting_and_pattern(ranks or {"": 8})
    file.defaults = {"delora_lambda": 15, "init_weights": True, "lambda_pattern": {}, "module_dropout": 0.0}
    file.fields = {"r": rank, "rank_pattern": pattern, "target_modules": targets(file)}


DELORA = PeftKind(
    name="DELORA",
    factors=frozenset(["delora_A", "delora_B", "delora_lambda", "delora_w_norm"]),
    read=_read,
    writes=frozenset([DeLoRA.kind]),
    write=_write,
    ranks={"delora_A": 0},
    switches=Switches(
        # where training began; the tensors have what it came to
        COMMON | {"r", "delora_lambda", "lambda_pattern", "module_dropout"},
        frozenset(["bias", "modules_to_save", "rank_pattern"]),
    ),
)
