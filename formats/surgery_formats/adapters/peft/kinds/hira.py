# SPDX-License-Identifier: Apache-2.0
"""HIRA: low-rank matrices that multiply weights by element (PEFT 0.21, ``tuners/hira/layer.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.embeddings import is_embedding
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import setting_and_pattern, targets
from surgery_formats.canonical.adapter import ModuleKind, Site
from surgery_formats.updates import Factor, HiRA, Update

__all__ = ["HIRA"]


def _read(module: Module) -> ModuleUpdates:
    """Of an embedding both factors are stored transposed; of a convolution A has the kernel, and B axes of size 1."""
    embedding = "hira_embedding_A" in module.parts
    a, b = (module.part(f"hira_embedding_{name}" if embedding else f"hira_{name}") for name in "AB")
    rank, kernel = a.shape[0] if a.shape else 0, a.shape[2:]
    if len(a.shape) < 2 or not a.numel or b.shape[1:] != (rank, *(1,) * len(kernel)) or not b.numel:
        raise malformed(b, f"'{a.name}' is {list(a.shape)}")
    if rank != module.config.rank:  # PEFT 0.21 makes factors of r where rank_pattern says another
        module.config.check_rank(module.path, rank, a)
    if embedding:
        A, B = Factor((b,), (rank, b.shape[0]), lambda t: t.T), Factor((a,), (a.shape[1], rank), lambda t: t.T)
    else:
        A, B = Factor((a,), (rank, a.numel // rank)), Factor((b,), (b.shape[0], rank))
    kind: ModuleKind = "embedding" if embedding else "convolution" if kernel else ""
    site = Site(f"{module.path}.weight", module_kind=kind, kernel=kernel)
    return ModuleUpdates({site: (HiRA(A, B),)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    ranks: dict[str, int] = {}
    for site, update in updates:
        if not isinstance(update, HiRA):
            file.hold_other(site, update)
            continue
        module, shape = file.module_of(site, update)
        key, rank = f"{file.prefix}{module}", update.rank
        if is_embedding(module, file.base, site):
            file.put(f"{key}.hira_embedding_A", update.B, (rank, update.shape[0]), lambda t: t.T)
            file.put(f"{key}.hira_embedding_B", update.A, (update.shape[1], rank), lambda t: t.T)
        else:
            file.put(f"{key}.hira_A", update.A, (rank, *shape[1:]))
            file.put(f"{key}.hira_B", update.B, (shape[0], rank, *(1,) * (len(shape) - 2)))
        ranks[module] = rank
        file.ledger.keep(site, update, "exact", key)
    file.defaults = {"fan_in_fan_out": False, "hira_dropout": 0.0, "init_weights": True}
    rank, pattern = setting_and_pattern(ranks or {"": 32})
    file.fields = {"r": rank, "rank_pattern": pattern, "target_modules": targets(file)}


HIRA = PeftKind(
    name="HIRA",
    factors=frozenset(["hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"]),
    read=_read,
    writes=frozenset([HiRA.kind]),
    write=_write,
    switches=Switches(COMMON | {"r", "hira_dropout"}, frozenset(["modules_to_save", "rank_pattern"])),
)
