# SPDX-License-Identifier: Apache-2.0
"""ADALORA: low-rank factors around singular values, of ranks that training pruned; token rows (PEFT 0.21, ``tuners/adalora``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.kinds.lora import SWITCHES
from surgery_formats.adapters.peft.kinds.tokens import ROWS, put_rows, read_rows
from surgery_formats.adapters.peft.read_config import PeftConfig, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.canonical.adapter import Ignored, Site
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import StoredTensor, Tensor
from surgery_formats.updates import AdaLoRA, Factor, TokenRows, Update

__all__ = ["ADALORA"]

_INITIAL = 12  # PEFT's default for init_r
_ALPHA = 8.0
_SMALL = 1e-5  # what PEFT adds to the initial rank


def _read(module: Module) -> ModuleUpdates:
    if "tokens" in module.parts and len(module.parts) == 1:
        return ModuleUpdates({module.site(): (read_rows(module.path, module.parts["tokens"], module.config),)})
    A, B, E = (module.part(f"lora_{name}") for name in "ABE")
    rank = A.shape[0] if A.shape else 0
    if len(A.shape) != 2 or len(B.shape) != 2 or B.shape[1] != rank or E.shape != (rank, 1):
        raise malformed(A, f"lora_B is {list(B.shape)}, lora_E {list(E.shape)}")
    config = module.config
    initial, kept = _initial(config), config.rank_pattern.get(f"{module.path}.lora_E")
    if rank != (initial if kept is None else kept):
        raise malformed(A, f"'init_r' and 'rank_pattern' give rank {initial if kept is None else kept}")
    if not rank:
        return ModuleUpdates({}, ignored=tuple(Ignored(stored, "pruned to rank 0") for stored in (A, B, E)))
    update = AdaLoRA(Factor.of(A), Factor.of(B), Factor.of(E), _scale(config, A), config.alpha)
    return ModuleUpdates({module.site(): (update,)})


def _initial(config: PeftConfig) -> int:
    return config.integer("init_r", _INITIAL, low=1)


def _scale(config: PeftConfig, stored: Tensor) -> float:
    if config.alpha <= 0 and config.rank_pattern:
        raise FitError(
            "lora_alpha is not positive, and ranks were pruned: PEFT trains with one scale and loads with another",
            file=stored.path,
            tensor=stored.name,
            hint="give it the lora_alpha that was meant",
        )
    initial = _initial(config)
    return (config.alpha if config.alpha > 0 else initial) / (initial + _SMALL)


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """All modules have one scale and one initial rank; other scales go into the singular values."""
    held = [update for _, update in updates if isinstance(update, AdaLoRA)]
    initial = max((update.rank for update in held), default=_INITIAL)
    scale = held[0].scale if held else 1.0
    if file.own is not None and held:
        scale = _scale(file.own, file.adapter.tensors[0])
    kept: dict[str, list[bool]] = {}

    def put(key: str, update: AdaLoRA) -> float:
        times = 1.0 if update.scale == scale else update.scale / scale
        file.put(f"{key}.lora_A", update.A)
        file.put(f"{key}.lora_B", update.B)
        file.put(f"{key}.lora_E", update.values, times=times)
        if update.rank != initial:
            module = key.removeprefix(file.prefix)
            kept[f"{module}.lora_E"] = [row < update.rank for row in range(initial)]
        return times

    for site, update in updates:
        if isinstance(update, TokenRows):
            put_rows(file, site, update)
    put_each(file, [pair for pair in updates if not isinstance(pair[1], TokenRows)], AdaLoRA, put)
    file.defaults = {"fan_in_fan_out": False, "init_lora_weights": True, "lora_dropout": 0.0, "total_step": 1}
    file.fields = {
        "init_r": initial,
        "lora_alpha": scale * (initial + _SMALL),
        "rank_pattern": kept or None,
        "target_modules": targets(file),
        "trainable_token_indices": {module: list(rows) for module, rows in file.rows.items()} or None,
    }


def _issues(config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Iterable[str]:
    if "lora_alpha" not in config:
        yield "no lora_alpha in its configuration: PEFT's default, 8, is used"
    alpha = config.get("lora_alpha")
    if isinstance(alpha, int | float) and alpha <= 0:
        yield f"lora_alpha is not positive ({alpha:g}): PEFT takes init_r in its place"


_TRAINING = {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
ADALORA = PeftKind(
    name="ADALORA",
    factors=frozenset(["lora_A", "lora_B", "lora_E", ROWS]),
    read=_read,
    writes=frozenset([AdaLoRA.kind, TokenRows.kind]),
    write=_write,
    switches=Switches(
        # r and alpha_pattern belong to LoRA, from which PEFT's configuration inherits; AdaLoRA does not look at them
        SWITCHES.harmless
        | _TRAINING
        | {"r", "alpha_pattern", "use_rslora", "init_lora_weights", "ensure_weight_tying"},
        frozenset(["init_r", "lora_alpha", "bias", "modules_to_save", "rank_pattern", "trainable_token_indices"]),
        SWITCHES.refused,
        signed=False,
        least_rank=0,
        rank_lists=True,
    ),
    issues=_issues,
)
