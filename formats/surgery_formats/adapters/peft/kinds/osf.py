# SPDX-License-Identifier: Apache-2.0
"""OSF: the lower part of a weight's singular values and vectors, trained (PEFT 0.21, ``tuners/osf/layer.py``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, PeftConfig, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import OSF as Lower
from surgery_formats.updates import Factor, Update

__all__ = ["OSF"]

_PARTS = ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low")


def _read(module: Module) -> ModuleUpdates:
    U, S, V = module.matrix(_PARTS[0]), module.vector(_PARTS[1]), module.matrix(_PARTS[2])
    if not U.shape[1] == S.numel == V.shape[0] or S.numel > min(U.shape[0], V.shape[1]):
        raise malformed(S, f"between {list(U.shape)} and {list(V.shape)}")
    smallest = min(U.shape[0], V.shape[1])
    stays, stated = smallest - S.numel, _stated(module.config, smallest)
    if not module.config.raw.get("rank_pattern") and stays != stated:
        raise malformed(S, f"{stays} of {smallest} singular values stay, but 'effective_rank' says {stated}")
    return ModuleUpdates({module.site(): (Lower(Factor.of(U), Factor.of(S), Factor.of(V)),)})


def _stated(config: PeftConfig, smallest: int) -> int:
    """How many of a weight's singular values stay: a number, or a share of them; half by default."""
    stated = config.number("effective_rank", 0.5)
    share = not isinstance(config.raw.get("effective_rank"), int) and 0 < stated <= 1
    return min(smallest, int(smallest * stated if share else stated))


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """How many singular values stay is stated for each module: what remains is the rank of what is stored."""
    kept = {}

    def put(key: str, update: Lower) -> None:
        for name, factor in zip(_PARTS, (update.U, update.S, update.V), strict=True):
            file.put(f"{key}.{name}", factor)
        kept[key.removeprefix(file.prefix)] = min(update.shape) - update.rank

    put_each(file, updates, Lower, put)
    file.defaults = {"init_weights": True}
    file.fields = {
        "effective_rank": min(kept.values(), default=1),
        "rank_pattern": {f"^{module}$".replace(".", r"\."): rank for module, rank in kept.items()},
        "target_modules": targets(file),
    }


def _issues(config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Iterable[str]:
    yield (
        "OSF: the lower part of the base's singular values is taken away before it is added, "
        "so the base must have the very weights it was trained on"
    )


OSF = PeftKind(
    name="OSF",
    factors=frozenset(_PARTS),
    read=_read,
    writes=frozenset([Lower.kind]),
    write=_write,
    switches=Switches(
        COMMON | {"effective_rank", "rank_pattern", "target_svd_config"},  # the tensors tell
        frozenset(["modules_to_save"]),
    ),
    issues=_issues,
)
